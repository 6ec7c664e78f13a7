"""MeanFlow (Geng et al. 2025, arXiv 2505.13447; Section 4.1, Algorithm 1, Eqs. 9–11 and 22).

The average velocity u(z_t, r, t) over [r, t] satisfies u = v − (t − r) du/dt (Eq. 6). The network is regressed on the
right-hand side, where du/dt = v ∂_z u + ∂_t u is a Jacobian-vector product of the network itself, without gradient.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.jvp import Network, take_jvp, value_and_jvp
from meanflow.objectives.base import Loss, Objective, adaptive_weight, by_rows, interpolate, per_row, squared_norm
from meanflow.times import Times

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
    needs_jvp = True
    titles = Objective.titles | {"loss": "training loss (weighted, Eq. 22: flat by design near p = 1)"}

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self.times.sample(n, generator)

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        dr, dt = TANGENTS[self.tangent]
        u_out, dudt = jvp(u, (z, r, t), (v, dr, dt), rows=r != t, **cond)  # both (B, …); dudt is 0 where r = t

        u_tgt = v - (per_row(t, x) - per_row(r, x)) * dudt  # Eqs. (10), (11): neither v nor dudt has a graph
        error = squared_norm(u_out - u_tgt)  # Eq. (9), (B,)
        return Loss(adaptive_weight(error, self.p, self.c) * error, by_rows(error, r, t))

    def plain(self, u, x, eps, r, t, v=None, **cond) -> Tensor:
        """The specification: Algorithm 1 as printed, one `torch.func.jvp` of the whole batch. Returns (B,)."""
        r, t = r.to(x), t.to(x)
        time = t.view(-1, *[1] * (x.ndim - 1))
        z = (1 - time) * x + time * eps
        v = eps - x if v is None else v
        dr, dt = (torch.full_like(t, speed) for speed in TANGENTS[self.tangent])
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
            u_out, dudt = torch.func.jvp(lambda z, r, t: u(z, r, t, **cond), (z, r, t), (v, dr, dt))
        u_tgt = (v - (t - r).view_as(time) * dudt).detach()
        error = ((u_out - u_tgt) ** 2).flatten(1).sum(1)
        return error / (error.detach() + self.c) ** self.p

    @property
    def varying_rows(self) -> bool:
        return self.times.varying_rows

    def __post_init__(self):
        if self.p < 0:
            raise ValueError(f"p must be ≥ 0, got {self.p}")
        if self.c <= 0:
            raise ValueError(f"c must be > 0, got {self.c}")
        if self.tangent not in TANGENTS:
            raise ValueError(f"tangent must be one of {', '.join(TANGENTS)}, got {self.tangent!r}")


def meanflow_loss(
    u: Network,
    x: Tensor,
    objective: Objective = MeanFlow(),
    *,
    generator: Generator | None = None,
    method: str = "dual",
    **cond: Tensor | None,
) -> Tensor:
    """The mean loss of a batch, a scalar: Algorithm 1 with times and noise drawn here.

    u(z, r, t, **cond) → (B, …) with z (B, …), r and t (B,); x (B, …): data, about [−1, 1]. generator: of the times and
    noise, on the CPU. method: "dual" or "func", see `meanflow.jvp`; cond: labels and the like, (B, …).
    Raises NoTangentRule where "dual" does not know an operation of the network.
    """
    r, t = objective.sample_times(len(x), generator)
    eps = torch.randn(x.shape, generator=generator, dtype=x.dtype).to(x.device)
    return objective.loss(u, x, eps, r, t, jvp=take_jvp(method), **cond).mean
