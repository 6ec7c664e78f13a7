"""What FSDP2 does with a derivative of the network, as docs/imagenet.md states it.

FSDP2 gathers a module's parameters in hooks on its tensors. `torch.func.jvp` passes through them from PyTorch 2.14 on;
a dual number is no tensor to them, so the parameters are not gathered again for the backward pass, which fails loudly.
Should one of these tests fail in a later version, that page has to be revised.
"""

import json

import pytest
import torch
import torch.distributed as dist
from method_helpers import DIT, batch, loss_of, small
from running import context
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from meanflow.jvp import take_jvp


def gradient_norm(net, method: str) -> float:
    loss_of(net, batch(DIT, torch.float32), jvp=take_jvp(method)).mean().backward()
    gradients = (p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad for p in net.parameters())
    return sum(float(gradient.square().sum()) for gradient in gradients) ** 0.5


def differentiate(method: str, folder: str) -> None:
    """In another process: shard, differentiate, and write the gradient's norm or the error."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=0, world_size=1)
    net, mesh = small(DIT, torch.float32), init_device_mesh("cpu", (1,))
    for module in (*net.blocks, net):
        fully_shard(module, mesh=mesh)
    try:
        outcome = gradient_norm(net, method)
    except RuntimeError as error:
        outcome = str(error)
    with open(f"{folder}/outcome.json", "w") as file:
        json.dump(outcome, file)
    dist.destroy_process_group()


@pytest.mark.parametrize("method", ["func", "dual"])
def test_a_derivative_through_fsdp2(tmp_path, method):
    process = context.Process(target=differentiate, args=(method, str(tmp_path)))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    outcome = json.loads((tmp_path / "outcome.json").read_text())
    if method == "func" and torch.__version__ >= (2, 14):
        assert outcome == pytest.approx(gradient_norm(small(DIT, torch.float32), "func"), rel=1e-5)
    else:
        assert "storage" in outcome.lower()
