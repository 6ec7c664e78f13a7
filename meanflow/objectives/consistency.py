"""Consistency models in continuous time (Song et al. 2023, arXiv 2303.01469; Lu and Song 2024, arXiv 2410.11081).

r = 0 in every sample: f(z_t) = z_t − t u(z_t, 0, t) is the data point at the end of the trajectory, and the same all
along it. On the linear path, with u⁻ = sg u,

    g = sin(π t/2) [u⁻ − (v − ρ t du/dt)],   g ← g / (rms(g) + 0.1),   loss = mean (u − sg(u⁻ − g))²,

where du/dt is the derivative along (v, 0, 1), as in MeanFlow at r = 0, and ρ rises from 0 to 1 at the beginning of
training. u(z, r, t) is learnt at r = 0 alone: of several sampling steps each goes to the end, and noise is added again.
Written from the papers' formulas in the form for the linear path.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.jvp import value_and_jvp
from meanflow.objectives.base import Loss, Objective, interpolate, per_row, squared_norm
from meanflow.times import Time

SOFTENING = 0.1  # beside rms(g)


@dataclass(frozen=True)
class Consistency(Objective):
    """The loss above. Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["consistency"] = "consistency"
    time: Time = field(default_factory=Time)  # how t is drawn
    rho_warmup: float = 0.1  # fraction of training in which ρ rises linearly from 0 to 1; 0: it is 1 throughout
    needs_jvp = True
    sampler = "renoise"
    learns_velocity = False
    titles = {  # noqa: RUF012
        "error": "squared residual ‖u − (v − ρ t du/dt)‖² (unweighted)",
        "loss": "training loss, the mean square of the normalised g (flat by design)",
        "rho": "ρ: weight of the tangent",
    }

    def rho(self, progress: float) -> float:
        return min(1.0, progress / self.rho_warmup) if self.rho_warmup else 1.0

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        t = self.time.sample(n, generator)
        return torch.zeros_like(t), t

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        out, dudt = jvp(u, (z, r, t), (v, 0.0, 1.0), rows=r != t, **cond)  # both (B, …)
        rho = self.rho(progress)
        with torch.no_grad():
            residual = out - (v - rho * (per_row(t, x) - per_row(r, x)) * dudt)
            g = torch.sin(math.pi / 2 * per_row(t, x)) * residual
            rms = g.square().flatten(1).mean(1).sqrt()  # (B,)
            g = g / (per_row(rms, x) + SOFTENING)
            target = out - g
            error = squared_norm(residual)
        loss = (out - target).square().flatten(1).mean(1)  # (B,)
        return Loss(loss, {"error": error, "rho": torch.full_like(error, rho)})

    def plain(self, u, x, eps, r, t, v=None, *, progress=0.0, **cond) -> Tensor:
        """The specification: the formulas above, one `torch.func.jvp` of the whole batch. Returns (B,)."""
        r, t = r.to(x), t.to(x)
        time = t.view(-1, *[1] * (x.ndim - 1))
        z = (1 - time) * x + time * eps
        v = eps - x if v is None else v
        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
            at, along = (z, r, t), (v, torch.zeros_like(r), torch.ones_like(t))
            out, dudt = torch.func.jvp(lambda z, r, t: u(z, r, t, **cond), at, along)
        g = torch.sin(math.pi / 2 * time) * (out - (v - self.rho(progress) * (t - r).view_as(time) * dudt)).detach()
        g = g / ((g**2).flatten(1).mean(1).sqrt().view_as(time) + SOFTENING)
        return ((out - (out.detach() - g)) ** 2).flatten(1).mean(1)

    def __post_init__(self):
        if not 0 <= self.rho_warmup <= 1:
            raise ValueError(f"rho_warmup must be in [0, 1], got {self.rho_warmup}")
