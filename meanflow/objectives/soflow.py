"""SoFlow (arXiv 2512.15657): solution functions learnt without a Jacobian-vector product.

The solution function f(z_t, r, t) = z_t + (r − t) F(z_t, r, t) takes z_t to time r; F is this kit's u. Two points
of one trajectory have one solution, so with l between r and t and z_l = z_t + (l − t) v,

    δ = (f(z_t, r, t) − sg f(z_l, r, l)) / (t − l),   w = 1 / (mean δ² + c)^p,   loss = −mean(F · sg(w δ)),

which has the gradient of the weighted square up to the factor 2/ρ_k, and no division in its graph. Both passes have the
same dropout mask. l comes closer to t with the training step k:

    l = min(t + (r − t) ρ_k, t − 1e-4),   ρ_k = ρ_0 (ρ_1/ρ_0)^(k/K).

Where r = t, F is regressed on v with the weight 1 / (mean e + c)^p. Written from the formulas of the paper.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from meanflow.jvp import Network, rounded_rows, rows_first, value_and_jvp
from meanflow.objectives.base import (
    Loss,
    Objective,
    adaptive_weight,
    by_rows,
    check_weight,
    interpolate,
    part_of,
    per_row,
)
from meanflow.random import generators_now
from meanflow.times import Time, spread

SMALLEST = 1e-4  # t − l, and t − r where r < t


@dataclass(frozen=True)
class SoFlow(Objective):
    """The loss above, by default as for ImageNet. Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["soflow"] = "soflow"
    ratio: float = 0.25  # fraction of samples with r < t, 1 − q in the paper, exactly this of every batch
    t: Time = field(default_factory=lambda: Time(mu=0.2, sigma=0.8))  # how t is drawn where r < t
    r: Time = field(default_factory=lambda: Time(mu=-1.0, sigma=0.8))  # and r, which is t − 1e-4 at most
    t_r_eq_t: Time = field(default_factory=lambda: Time(mu=-0.2, sigma=1.0))  # how t is drawn where r = t
    rho_start: float = 0.1  # ρ_0 in (0, 1]: (t − l)/(t − r) at the start of training
    rho_end: float = 0.002  # ρ_1: the same at its end
    p: float = 1.0  # power of the adaptive weight, ≥ 0
    c: float = 1e-2  # its constant, > 0, beside a mean square
    same_dropout = True
    titles = Objective.titles | {
        "error": "squared residual ‖δ‖², all samples (unweighted)",
        "error_r_lt_t": "squared residual ‖δ‖² at r < t",
        "loss": "training loss, −mean(F·sg(wδ)) where r < t: its gradient counts, not its value",
        "rho": "ρ: (t − l)/(t − r)",
    }

    @property
    def passes(self) -> int:
        return 1

    def rho(self, progress: float) -> float:
        return self.rho_start * (self.rho_end / self.rho_start) ** progress

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        still, t, r = (time.sample(n, generator) for time in (self.t_r_eq_t, self.t, self.r))
        t = t.clamp(min=SMALLEST)
        r = torch.minimum(r, t - SMALLEST)
        rows = spread(round(self.ratio * n), n)
        return torch.where(rows, r, still), torch.where(rows, t, still)

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        rho = self.rho(progress)
        l = torch.maximum(torch.minimum(t + (r - t) * rho, t - SMALLEST), r)  # noqa: E741 (the paper's letter), (B,)
        z_l = z + (per_row(l, x) - per_row(t, x)) * v
        out, out_l = two_passes(u, (z, z_l), r, (t, l), **cond)  # both (B, …); where r = t, out_l is not used

        rows = r != t
        factor = torch.where(rows, (l - r) / torch.where(rows, t - l, 1), 0)
        with torch.no_grad():  # δ as it is above, without the difference of two nearly equal f
            delta = v - out - per_row(factor, x) * (out - out_l)  # (B, …)
            square = delta.square().flatten(1)
            weight = adaptive_weight(square.mean(1), self.p, self.c)  # (B,)
        solution = -(out * (per_row(weight, x) * delta)).flatten(1).mean(1)
        velocity = weight * (out - v).square().flatten(1).mean(1)
        loss = torch.where(rows.to(x.device, non_blocking=True), solution, velocity)
        return Loss(loss, {**by_rows(square.sum(1), r, t), "rho": torch.full_like(weight, rho)})

    def __post_init__(self):
        check_weight(self.p, self.c)
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio}")
        if not 0 < self.rho_end <= self.rho_start <= 1:
            raise ValueError(f"rho_start ≥ rho_end must lie in (0, 1], got {self.rho_start} and {self.rho_end}")


def two_passes(
    u: Network, zs: tuple[Tensor, Tensor], r: Tensor, ts: tuple[Tensor, Tensor], **cond: Tensor | None
) -> tuple[Tensor, Tensor]:
    """u(z, r, t) with its graph, and u(z_l, r, l) with the same dropout masks and without, both (B, …).

    The samples with r < t come first, in passes of their own: masks are equal only where shapes are. The second value
    of the others is zero, at no cost.
    """
    (z, z_l), (t, l) = zs, ts  # noqa: E741
    order, n = rows_first(r != t)
    m = rounded_rows(n, len(z)) if n else 0  # few shapes
    first, rest = slice(m), slice(m, None)
    if order is not None:
        first, rest = (order[part].to(z.device, non_blocking=True) for part in (first, rest))
    r, t, l = (time.to(z, non_blocking=True) for time in (r, t, l))  # noqa: E741
    parts, out_l = [], torch.zeros_like(z)
    if m:
        restore = generators_now(z.device)
        parts.append(u(*part_of((z, r, t), first), **part_of(cond, first)))
        restore()
        with torch.no_grad():
            value = u(*part_of((z_l, r, l), first), **part_of(cond, first))
        out_l[first] = value.to(z.dtype)
    if m < len(z):
        parts.append(u(*part_of((z, r, t), rest), **part_of(cond, rest)))
    out = torch.cat(parts) if len(parts) > 1 else parts[0]
    return (out if order is None else out[torch.argsort(order).to(z.device)]), out_l
