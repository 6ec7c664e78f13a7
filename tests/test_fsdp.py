"""What FSDP2 (PyTorch 2.14) does with a derivative of the network, as docs/imagenet.md states it.

FSDP2 gathers a module's parameters in hooks on its tensors. `torch.func.jvp` passes through them; a dual number is no
tensor to them, so the parameters are not gathered again for the backward pass, which fails loudly. Should one of
these tests fail in a later version, the page has to be written anew.
"""

import json

import pytest
import torch
import torch.distributed as dist
from running import context
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from dit import DiT, DiTConfig
from meanflow.jvp import value_and_tangent


def small_dit() -> DiT:
    torch.manual_seed(0)
    net = DiT(DiTConfig("dit", 8, 2, 2, 32, 2, 4, "t,t-r", 10))
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    return net


def gradient_norm(net: DiT, jvp: str) -> float:
    g = torch.Generator().manual_seed(1)
    z, v = torch.randn(2, 4, 2, 8, 8, generator=g)
    t = torch.rand(4, generator=g)
    value, _ = value_and_tangent(net, z, t, t / 2, (v, 1.0, 0.0), 4, jvp, {"class_labels": torch.arange(4)})
    value.square().mean().backward()
    gradients = [p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad for p in net.parameters()]
    return sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5


def play(jvp: str, folder: str) -> None:
    """In a process of its own: shard, differentiate, and write what came of it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    net, mesh = small_dit(), init_device_mesh("cpu", (1,))
    for block in net.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(net, mesh=mesh)
    try:
        outcome = gradient_norm(net, jvp)
    except RuntimeError as error:
        outcome = str(error)
    with open(f"{folder}/outcome.json", "w") as file:
        json.dump(outcome, file)
    dist.destroy_process_group()


@pytest.mark.parametrize("jvp", ["func", "dual"])
def test_a_derivative_through_fsdp2(tmp_path, jvp):
    process = context.Process(target=play, args=(jvp, str(tmp_path)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    if jvp == "func":
        assert outcome == pytest.approx(gradient_norm(small_dit(), "func"), rel=1e-5)
    else:
        assert "setStorage" in outcome
