"""The MeanFlow objective (Section 4.1, Algorithm 1; Eqs. 9–11 and 22). Knows only a callable u(z, t, r, …)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from meanflow.tangent import JVPS, Network, value_and_tangent

# Table 1b writes the tangent in the order (z, r, t); only the first is the total derivative d/dt of Eq. (8).
TANGENTS = {"(v, 0, 1)": (0.0, 1.0), "(v, 0, 0)": (0.0, 0.0), "(v, 1, 0)": (1.0, 0.0), "(v, 1, 1)": (1.0, 1.0)}


@dataclass(frozen=True)
class LossConfig:
    """Settings of the objective. Raises ValueError, naming the field, when one is out of range."""

    p: float  # power of the adaptive weight, Eq. (22), ≥ 0: 0 is squared L2, 0.5 near Pseudo-Huber
    c: float  # its constant, > 0: 1e-3 for CIFAR-10, 1e-2 for ImageNet (official releases)
    tangent: str  # (dz, dr, dt) of the derivative, Table 1b
    jvp: str  # how it is taken: dual or func (see meanflow.tangent)

    def __post_init__(self):
        if self.p < 0:
            raise ValueError(f"p must be ≥ 0, got {self.p}")
        if self.c <= 0:
            raise ValueError(f"c must be > 0, got {self.c}")
        if self.tangent not in TANGENTS:
            raise ValueError(f"tangent must be one of {', '.join(TANGENTS)}, got {self.tangent!r}")
        if self.jvp not in JVPS:
            raise ValueError(f"jvp must be one of {', '.join(JVPS)}, got {self.jvp!r}")


@dataclass(frozen=True)
class MeanFlowLoss:
    """`weighted` (B,) is what training averages; `squared_error` (B,) is ‖u − u_tgt‖² before the weight, detached."""

    weighted: Tensor
    squared_error: Tensor

    @property
    def mean(self) -> Tensor:
        return self.weighted.mean()


def interval_first(t: Tensor, r: Tensor) -> tuple[Tensor, int]:
    """A stable order (B,) that puts the rows with r ≠ t first, and their number n."""
    still = (t == r).to(torch.uint8)
    return torch.argsort(still, stable=True), int(t.numel() - still.sum())


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t) x + t ε (Section 3): x, eps (B, …), t (B,) → (B, …)."""
    return (1 - _per_row(t, x)) * x + _per_row(t, x) * eps


def _per_row(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.ndim - 1))


def meanflow_loss(
    u: Network,
    x: Tensor,
    eps: Tensor,
    t: Tensor,
    r: Tensor,
    config: LossConfig,
    v: Tensor | None = None,
    derivative: Callable = value_and_tangent,
    **cond,
) -> MeanFlowLoss:
    """The loss of each sample.

    x, eps (B, …): data in [−1, 1] and Gaussian noise. t ≥ r (B,) in [0, 1], best on the CPU: how many rows have
    r ≠ t is then known without waiting for the device. v (B, …): the velocity field of tangent and target, by
    default the conditional ε − x; guidance passes its own (Eq. 21). derivative: `value_and_tangent`, or it compiled.
    cond: tensors (B, …) or None for u's keywords. Rows with r = t are plain Flow Matching and pay for no derivative.
    """
    order, rows = interval_first(t, r)
    if not torch.equal(order, torch.arange(len(order), device=order.device)):
        back = torch.argsort(order)
        picked = {key: _take(y, order) for key, y in cond.items()}
        x, eps, v = (_take(y, order) for y in (x, eps, v))
        loss = meanflow_loss(u, x, eps, t[order], r[order], config, v, derivative, **picked)
        return MeanFlowLoss(_take(loss.weighted, back), _take(loss.squared_error, back))

    t, r = t.to(x, non_blocking=True), r.to(x, non_blocking=True)
    z = interpolate(x, eps, t)
    v = eps - x if v is None else v
    dr, dt = TANGENTS[config.tangent]
    u_out, dudt = derivative(u, z, t, r, (v[:rows], dt, dr), rows, config.jvp, cond)

    target = v.clone()  # Eq. (10): u_tgt = v − (t − r) du/dt, where r = t it is v
    target[:rows] -= _per_row(t - r, x)[:rows] * dudt
    squared_error = (u_out - target).square().flatten(1).sum(1)  # Eq. (9), sum over C, H, W
    with torch.no_grad():
        weight = 1 / (squared_error + config.c) ** config.p  # Eq. (22)
    return MeanFlowLoss(weight * squared_error, squared_error.detach())


def _take(x: Tensor | None, order: Tensor) -> Tensor | None:
    return x[order.to(x.device)] if isinstance(x, Tensor) else x
