"""The DiT: its sizes (Tables 2 and 4), its parts against plain formulas, its derivative against differences."""

import functools
import math

import pytest
import torch
import torch.nn.functional as F
from meanflow.recompute import recomputed
from torch.utils.flop_counter import FlopCounterMode

from dit import DiT, DiTConfig
from dit.model import CONDITIONINGS, unpatchify
from meanflow.jvp import JVPS, value_and_tangent
from meanflow.objectives.meanflow import LossConfig, meanflow_loss

# depth, width, heads, patch; parameters (M) and forward GFLOPs of Table 4, where L/2's 119.0 is XL/2's: DiT's own
# paper has 80.7 for it.
SIZES = {
    "B/4": ((12, 768, 12, 4), 131, 5.6),
    "B/2": ((12, 768, 12, 2), 131, 23.1),
    "M/2": ((16, 1024, 16, 2), 308, 54.0),
    "L/2": ((24, 1024, 16, 2), 459, 80.7),
    "XL/2": ((28, 1152, 16, 2), 676, 119.0),
}


def config(patch=2, width=32, depth=2, heads=4, conditioning="t,t-r", classes=10, size=8, channels=2) -> DiTConfig:
    return DiTConfig("dit", size, channels, patch, width, depth, heads, conditioning, classes)


def trained(dtype=torch.float64, **changes) -> DiT:
    """A DiT as after training: nothing is zero."""
    torch.manual_seed(0)
    net = DiT(config(**changes)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def inputs(dtype=torch.float64, n=6, size=8, channels=2):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(n, channels, size, size, generator=g, dtype=dtype)
    r, t = torch.rand(n, 2, generator=g, dtype=dtype).sort(1).values.T.contiguous()
    return z, t, r, torch.arange(n)


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
    net = DiT(config())
    z, t, r, y = inputs(torch.float32)
    assert not net(z, t, r, y).any()
    x, c = torch.randn(6, 16, 32), torch.randn(6, 32)
    assert torch.equal(net.blocks[0](x, c), x)


def test_initial_weights():
    torch.manual_seed(0)
    net = DiT(config(width=256, depth=1))
    bound = math.sqrt(6 / (256 + 3 * 256))  # Xavier
    qkv = net.blocks[0].qkv.weight
    assert 0.98 * bound < qkv.abs().max() <= bound  # of a uniform distribution
    patch = net.patch_embed.weight.view(256, -1)
    assert 0.95 * math.sqrt(6 / sum(patch.shape)) < patch.abs().max() <= math.sqrt(6 / sum(patch.shape))
    for weight in (net.time_embed["t"].fc1.weight, net.time_embed["t-r"].fc2.weight, net.label_embed.weight):
        assert weight.detach().std() == pytest.approx(0.02, rel=0.05)
    zero = [net.blocks[0].modulation, net.final.modulation, net.final.linear]
    assert not any(p.any() for layer in zero for p in layer.parameters())
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize("patch", [1, 2, 4])
def test_unpatchify_after_patchify_is_the_identity(patch):
    image = torch.randn(3, 5, 8, 8)
    side = 8 // patch
    tokens = torch.stack(  # plainly: token (i, j) is the patch there, its entries (row, column, channel)
        [
            image[:, :, patch * i : patch * (i + 1), patch * j : patch * (j + 1)].permute(0, 2, 3, 1).flatten(1)
            for i in range(side)
            for j in range(side)
        ],
        dim=1,
    )
    assert torch.equal(unpatchify(tokens, side, patch), image)


def test_positions():
    """Token (y, x), 2-D sines and cosines, columns first."""
    positions = DiT(config(width=16)).positions.view(4, 4, 16)
    for y in range(4):
        for x in range(4):
            expected = [
                wave(place / 10_000 ** (k / 4)) for place in (x, y) for wave in (math.sin, math.cos) for k in range(4)
            ]
            assert torch.allclose(positions[y, x], torch.tensor(expected), atol=1e-6)


def test_time_embedding():
    """256 waves, cosines first, of t in [0, 1] as it is."""
    embedder = DiT(config()).time_embed["t"]
    t = torch.tensor([0.0, 0.3, 1.0])
    angles = torch.tensor([[x / 10_000 ** (k / 128) for k in range(128)] for x in t.tolist()])
    waves = torch.cat([angles.cos(), angles.sin()], 1)
    expected = embedder.fc2(F.silu(embedder.fc1(waves)))
    assert torch.allclose(embedder(t), expected, atol=1e-6)


def test_attention_is_per_head_softmax():
    net = trained()
    block, x = net.blocks[0], torch.randn(2, 16, 32, dtype=torch.float64)
    q, k, v = block.qkv(x).split(32, dim=2)
    heads = []
    for h in range(4):
        part = slice(8 * h, 8 * h + 8)
        weights = torch.softmax(q[..., part] @ k[..., part].mT / math.sqrt(8), dim=-1)
        heads.append(weights @ v[..., part])
    assert torch.allclose(block.attend(x), block.proj(torch.cat(heads, 2)))


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_sees_exactly_what_its_conditioning_names(conditioning):
    net, (z, t, r, y) = trained(conditioning=conditioning), inputs()
    assert list(net.time_embed) == conditioning.split(",")
    with torch.no_grad():
        out, shifted = net(z, t, r, y), net(z, t + 0.1, r + 0.1, y)
    assert torch.allclose(out, shifted) == (conditioning == "t-r")
    assert not torch.allclose(out, net(z, t, r + 0.1, y))


def test_no_label_is_the_null_class():
    net, (z, t, r, y) = trained(), inputs()
    null = torch.full_like(y, 10)
    assert torch.equal(net(z, t, r), net(z, t, r, null))
    assert not torch.allclose(net(z, t, r), net(z, t, r, y))
    unconditional = DiT(config(classes=0))
    assert unconditional.label_embed is None and unconditional(*inputs(torch.float32)[:3]).shape == z.shape


@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_derivative_equals_central_differences(jvp, conditioning):
    net, (z, t, r, y) = trained(conditioning=conditioning), inputs()
    v, rows, h = torch.randn_like(z), 4, 1e-5
    value, tangent = value_and_tangent(net, z, t, r, (v[:rows], 1.0, 0.0), rows, jvp, {"class_labels": y})
    with torch.no_grad():
        difference = (net(z + h * v, t + h, r, y) - net(z - h * v, t - h, r, y)) / (2 * h)
    assert torch.allclose(value, net(z, t, r, y), atol=1e-12)
    assert torch.allclose(tangent, difference[:rows], atol=1e-7, rtol=1e-6) and not tangent.requires_grad


def gradients(net, derivative=value_and_tangent, jvp="dual", dtype=torch.float64, **how):
    z, t, r, y = inputs(dtype)
    x, eps = z, torch.randn(z.shape, generator=torch.Generator().manual_seed(2), dtype=dtype)
    r = torch.where(torch.arange(6) < 4, r, t)
    net.zero_grad()
    u, config = functools.partial(net, **how), LossConfig(1.0, 1e-2, "(v, 0, 1)", jvp)
    loss = meanflow_loss(u, x, eps, t, r, config, derivative=derivative, class_labels=y)
    loss.mean.backward()
    return loss.mean.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


def test_recomputed_blocks_give_the_same_and_save_less():
    net = trained()
    saved = {}

    def measure(name, **how):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            result = gradients(net, **how)
        saved[name] = sum(sizes)
        return result

    kept = measure("kept")
    again = measure("again", run_block=recomputed)
    assert torch.equal(kept[0], again[0]) and torch.allclose(kept[1], again[1], rtol=1e-12, atol=1e-14)
    assert saved["again"] < 0.6 * saved["kept"]


def test_compiled_and_eager_gradients_are_the_same():
    """`aot_eager` traces forward, derivative and backward as `inductor` does and runs the graph as it stands."""
    net = trained(torch.float32)
    eager = gradients(net, jvp="func", dtype=torch.float32)
    compiled = torch.compile(value_and_tangent, backend="aot_eager", fullgraph=True, dynamic=False)
    traced = gradients(net, compiled, "func", torch.float32)
    assert torch.allclose(eager[0], traced[0], rtol=1e-5)
    assert (eager[1] - traced[1]).norm() <= 1e-4 * eager[1].norm()


def test_compiled_modulated_norm_has_the_right_gradient():
    """PyTorch issue 193061: since 2.10, silently wrong gradients of a modulated LayerNorm under torch.compile."""
    from dit.model import modulate

    def block(x, c, w):
        shift, scale = (c @ w)[:, None].chunk(2, dim=2)
        return (modulate(x, shift, scale) * x).sum()

    g = torch.Generator().manual_seed(0)
    values = [torch.randn(*shape, generator=g) for shape in ((4, 16, 32), (4, 32), (32, 64))]

    def run(function):
        leaves = [value.clone().requires_grad_() for value in values]
        function(*leaves).backward()
        return [leaf.grad for leaf in leaves]

    for eager, compiled in zip(run(block), run(torch.compile(block, fullgraph=True)), strict=True):
        assert (eager - compiled).norm() <= 1e-4 * eager.norm()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"patch": 3}, "patch"),
        ({"width": 30}, "width"),
        ({"heads": 5}, "heads"),
        ({"conditioning": "r"}, "conditioning"),
        ({"classes": -1}, "classes"),
        ({"depth": 0}, "depth"),
    ],
)
def test_impossible_shapes_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        config(**change)
