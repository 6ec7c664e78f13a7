"""Small networks of all backbones, batches for them, and how losses are compared."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit import DiTConfig, IMFConfig
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training.batches import MicroBatch
from meanflow.training.state import BACKBONES
from unet import UNetConfig

UNET = UNetConfig("unet", 8, 3, 8, (1, 2), 1, (4,), augment_labels=6, classes=10)
DIT = DiTConfig("dit", 8, 3, 2, width=32, depth=2, heads=4, classes=10)
CIFAR10 = MeanFlow(p=0.75, c=1e-3)
IMF = IMFConfig("imf", 8, 3, 2, width=32, depth=3, heads=4, head_depth=2, classes=10)
backbones = pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
all_backbones = pytest.mark.parametrize("config", [UNET, DIT, IMF], ids=["unet", "dit", "imf"])
precisions = pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)], ids=["float32", "float64"]
)


def perturbed(network: nn.Module) -> nn.Module:
    """As after training: no parameter is zero, so that every branch matters."""
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return network


def small(config: UNetConfig | DiTConfig | IMFConfig = UNET, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(BACKBONES[type(config)](config).to(dtype))


def batch(config=UNET, dtype=torch.float64, n: int = 8, r_eq_t: int = 3) -> MicroBatch:
    """Random samples, those with r = t anywhere among them."""
    g = torch.Generator().manual_seed(1)
    shape = (n, config.channels, config.image_size, config.image_size)
    x, eps = (torch.randn(shape, generator=g, dtype=dtype) for _ in range(2))
    r, t = torch.rand(n, 2, generator=g, dtype=dtype).sort(1).values.T.contiguous()
    equal = torch.randperm(n, generator=g)[:r_eq_t]
    r[equal] = t[equal]
    cond = {"class_labels": torch.arange(n) % config.classes} if config.classes else {}
    if isinstance(config, UNetConfig) and config.augment_labels:
        cond["augment_labels"] = torch.randn(n, config.augment_labels, generator=g, dtype=dtype)
    return MicroBatch(x, eps, r, t, cond, None, 0.0)


def selected(b: MicroBatch, rows) -> MicroBatch:
    x, eps, r, t = (y[rows] for y in (b.x, b.eps, b.r, b.t))
    return replace(b, x=x, eps=eps, r=r, t=t, cond={key: y[rows] for key, y in b.cond.items()})


def loss_of(network, b: MicroBatch, objective=CIFAR10, plain=False, **how) -> Tensor:
    """The loss of each sample (B,), by `objective.loss` or `objective.plain`."""
    if plain:
        return objective.plain(network, b.x, b.eps, b.r, b.t, **b.cond, **how)
    return objective.loss(network, b.x, b.eps, b.r, b.t, **b.cond, **how).per_sample


def with_gradient(network: nn.Module, loss: Tensor) -> tuple[Tensor, Tensor]:
    """The losses (B,), and the gradient of their mean in one vector."""
    network.zero_grad()
    loss.mean().backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])


def assert_close(ours, theirs, tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()
