"""The DiTs of the paper: their sizes (Tables 2 and 4) and their initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from method_helpers import DIT, batch
from torch.utils.flop_counter import FlopCounterMode

from dit import DiT, DiTConfig
from dit.model import modulate

# depth, width, heads, patch; parameters (M) and forward GFLOPs of Table 4, where L/2's 119.0 is XL/2's: DiT's own
# paper has 80.7 for it.
SIZES = {
    "B/4": ((12, 768, 12, 4), 131, 5.6),
    "B/2": ((12, 768, 12, 2), 131, 23.1),
    "M/2": ((16, 1024, 16, 2), 308, 54.0),
    "L/2": ((24, 1024, 16, 2), 459, 80.7),
    "XL/2": ((28, 1152, 16, 2), 676, 119.0),
}


@pytest.mark.parametrize("name", SIZES)
def test_parameters_and_flops_of_table_4(name):
    (depth, width, heads, patch), millions, gflops = SIZES[name]
    with torch.device("meta"):
        net = DiT(DiTConfig("dit", 32, 4, patch, width, depth, heads, "t,t-r", 1000))
        with FlopCounterMode(display=False) as counter:
            net(torch.zeros(1, 4, 32, 32), torch.zeros(1), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert round(sum(p.numel() for p in net.parameters()) / 1e6) == millions
    assert counter.get_total_flops() / 2e9 == pytest.approx(gflops, rel=0.01)  # a multiply-add counts once there


def test_output_is_zero_and_blocks_are_the_identity_at_initialisation():
    net, b = DiT(DIT), batch(DIT, torch.float32)
    assert not net(b.x, b.r, b.t, **b.cond).any()
    x, c = torch.randn(8, 16, 32), torch.randn(8, 32)
    assert torch.equal(net.blocks[0](x, c), x)


def test_initial_weights():
    torch.manual_seed(0)
    net = DiT(replace(DIT, width=256, depth=1))
    for weight in (net.blocks[0].qkv.weight, net.patch_embed.weight.view(256, -1)):
        bound = math.sqrt(6 / sum(weight.shape))  # Xavier, uniform
        assert 0.95 * bound < weight.abs().max() <= bound
    for weight in (net.time_embed["t"].fc1.weight, net.time_embed["t-r"].fc2.weight, net.label_embed.weight):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.05)
    zero = [net.blocks[0].modulation, net.final.modulation, net.final.linear]
    assert not any(p.any() for layer in zero for p in layer.parameters())
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


def test_compiled_modulated_norm_has_the_right_gradient():
    """PyTorch issue 193061: since 2.10, silently wrong gradients of a modulated LayerNorm under torch.compile."""

    def block(x, c, w):
        shift, scale = (c @ w)[:, None].chunk(2, dim=2)
        return (modulate(x, shift, scale) * x).sum()

    torch.manual_seed(0)
    values = [torch.randn(*shape, requires_grad=True) for shape in ((4, 16, 32), (4, 32), (32, 64))]
    eager, compiled = (
        torch.autograd.grad(function(*values), values) for function in (block, torch.compile(block, fullgraph=True))
    )
    for a, b in zip(compiled, eager, strict=True):
        assert (a - b).norm() <= 1e-4 * b.norm()
