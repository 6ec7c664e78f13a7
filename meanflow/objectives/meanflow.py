"""MeanFlow (Geng et al. 2025, arXiv 2505.13447; Section 4.1, Algorithm 1, Eqs. 9–11 and 22).

The average velocity u(z_t, r, t) over [r, t] satisfies u = v − (t − r) du/dt (Eq. 6). The network is regressed on the
right-hand side, where du/dt = v ∂_z u + ∂_t u is a Jacobian-vector product of the network itself, without gradient.

Two settings are later than the paper and off by default. `tangent_velocity` β puts (1 − β) v + β v̂ in place of v in
that product, with v̂ = u(z_t, t, t) the network's own velocity: β = 1 is the boundary form of improved Mean Flows
(arXiv 2512.02012), whose loss has the same gradient as this one. `time_weight` (arXiv 2511.19065) begins with short
intervals: the loss of samples with r < t times 1 − s + s (1 − Δ)/E[1 − Δ], where Δ = t − r and s = 1 − k/K.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.jvp import Network, take_jvp, value_and_jvp
from meanflow.objectives.base import (
    Loss,
    Objective,
    adaptive_weight,
    by_jvp,
    by_rows,
    check_weight,
    interpolate,
    on_rows,
    per_row,
    squared_norm,
    weighted,
)
from meanflow.times import Times, mean_complement

# Table 1b: the tangent of (z, r, t). Only the first is the total derivative d/dt of Eq. (8).
TANGENTS = {"(v, 0, 1)": (0.0, 1.0), "(v, 0, 0)": (0.0, 0.0), "(v, 1, 0)": (1.0, 0.0), "(v, 1, 1)": (1.0, 1.0)}


@dataclass(frozen=True)
class MeanFlow(Objective):
    """Algorithm 1. Settings default to those of Table 1. Raises ValueError, naming the field, for impossible ones."""

    kind: Literal["meanflow"] = "meanflow"
    times: Times = field(default_factory=Times)  # how (r, t) are drawn
    p: float = 1.0  # power of the adaptive weight, Eq. (22), ≥ 0: 0 is squared L2, 0.5 near Pseudo-Huber
    c: float = 1e-2  # its constant, > 0: 1e-3 for CIFAR-10, 1e-2 for ImageNet (official releases)
    tangent: str = "(v, 0, 1)"  # (dz, dr, dt) of the derivative, Table 1b
    tangent_velocity: float = 0.0  # β in [0, 1]: dz = (1 − β) v + β u(z, t, t); 0: the paper's, 1: iMF's boundary form
    time_weight: bool = False  # weigh r < t by 1 − s + s (1 − Δ)/E[1 − Δ], s = 1 − k/K: short intervals first
    needs_jvp = True
    titles = Objective.titles | {"loss": "training loss (weighted, Eq. 22: flat by design near p = 1)"}

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self.times.sample(n, generator)

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        dz, dr, dt = self._tangent(u, z, r, t, v, jvp, cond)  # (v, 0, 1)
        u_out, dudt = jvp(u, (z, r, t), (dz, dr, dt), rows=r != t, **cond)  # both (B, …); dudt is 0 where r = t

        u_tgt = v - (per_row(t, x) - per_row(r, x)) * dudt  # Eqs. (10), (11): neither v nor dudt has a graph
        error = squared_norm(u_out - u_tgt)  # Eq. (9), (B,)
        return Loss(self._weight(error, r, t, progress) * error, by_rows(error, r, t))

    def _tangent(self, u, z, r, t, v, jvp, cond) -> tuple[Tensor, float, float]:
        if beta := self.tangent_velocity:
            v = (1 - beta) * v + beta * on_rows(by_jvp(u, jvp), r != t, z, t, t, **cond)
        return (v, *TANGENTS[self.tangent])

    def _weight(self, error: Tensor, r: Tensor, t: Tensor, progress: float) -> Tensor:
        """Eq. (22), where r < t times the time weight: (B,)."""
        weight = adaptive_weight(error, self.p, self.c)
        return weighted(weight, r != t, self._time_weight(r, t, progress)) if self.time_weight else weight

    def _time_weight(self, r: Tensor, t: Tensor, progress: float) -> Tensor:
        """w of arXiv 2511.19065, (B,): at first (1 − Δ)/E[1 − Δ], at the end 1."""
        s = 1 - progress
        return 1 - s + s * (1 - (t - r)) / mean_complement(self.times)

    def plain(self, u, x, eps, r, t, v=None, *, progress=0.0, **cond) -> Tensor:
        """The specification: Algorithm 1 as printed, one `torch.func.jvp` of the whole batch. Returns (B,)."""
        r, t = r.to(x), t.to(x)
        time = t.view(-1, *[1] * (x.ndim - 1))
        z = (1 - time) * x + time * eps
        v = eps - x if v is None else v
        dr, dt = (torch.full_like(t, speed) for speed in TANGENTS[self.tangent])
        dz = v
        if self.tangent_velocity:
            with torch.no_grad():
                dz = (1 - self.tangent_velocity) * v + self.tangent_velocity * u(z, t, t, **cond)
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
            u_out, dudt = torch.func.jvp(lambda z, r, t: u(z, r, t, **cond), (z, r, t), (dz, dr, dt))
        u_tgt = (v - (t - r).view_as(time) * dudt).detach()
        error = ((u_out - u_tgt) ** 2).flatten(1).sum(1)
        loss = error / (error.detach() + self.c) ** self.p
        return torch.where(r == t, loss, loss * self._time_weight(r, t, progress)) if self.time_weight else loss

    @property
    def passes(self) -> int:
        return 1 + (self.tangent_velocity > 0)

    @property
    def varying_rows(self) -> bool:
        return self.times.varying_rows

    def __post_init__(self):
        check_weight(self.p, self.c)
        if self.tangent not in TANGENTS:
            raise ValueError(f"tangent must be one of {', '.join(TANGENTS)}, got {self.tangent!r}")
        if not 0 <= self.tangent_velocity <= 1:
            raise ValueError(f"tangent_velocity must be in [0, 1], got {self.tangent_velocity}")


def meanflow_loss(
    u: Network,
    x: Tensor,
    objective: Objective = MeanFlow(),
    *,
    generator: Generator | None = None,
    method: str = "dual",
    classes: int = 0,
    **cond: Tensor | None,
) -> Tensor:
    """The mean loss of a batch, a scalar: Algorithm 1 with times and noise drawn here.

    u(z, r, t, **cond) → (B, …) with z (B, …), r and t (B,); x (B, …): data, about [−1, 1]. generator: of the times and
    noise, on the CPU. method: "dual" or "func", see `meanflow.jvp`; classes: their number, also the label of no class,
    where guidance is an input; cond: labels and the like, (B, …). Raises NoTangentRule where "dual" does not know an
    operation of the network, ValueError for guidance as an input without classes.
    """
    if objective.omega_range is not None and not classes:
        raise ValueError("guidance as an input needs classes: pass their number, or set omega_max=1")
    r, t = objective.sample_times(len(x), generator)
    drawn = {name: y.to(x.device) for name, y in objective.sample_cond(r, t, classes, generator).items()}
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return objective.loss(u, x, eps, r, t, jvp=take_jvp(method), **drawn, **cond).mean
