"""Flow Matching (Lipman et al. 2023, arXiv 2210.02747, Eq. 14; the linear path of Liu et al. 2022), the baseline.

r = t in every sample: u(z_t, t, t) is regressed on v = ε − x. What is learnt is the velocity alone, so samples are made
by Euler's method with u(z, t, t) and need many steps. Written from the papers' formula.
"""

from dataclasses import dataclass, field
from typing import Literal

from torch import Generator, Tensor

from meanflow.jvp import value_and_jvp
from meanflow.objectives.base import Loss, Objective, adaptive_weight, check_weight, interpolate, squared_norm
from meanflow.times import Time


@dataclass(frozen=True)
class FlowMatching(Objective):
    """Eq. (14). Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["flowmatching"] = "flowmatching"
    time: Time = field(default_factory=Time)  # how t is drawn
    p: float = 0.0  # power of the adaptive weight, Eq. (22) of MeanFlow; 0 is the papers' squared error
    c: float = 1e-3  # its constant, > 0
    sampler = "euler"
    titles = {"error_r_eq_t": "squared error ‖u − v‖²", "loss": "training loss"}  # noqa: RUF012

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        t = self.time.sample(n, generator)
        return t, t

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        t = t.to(z, non_blocking=True)
        error = squared_norm(u(z, t, t, **cond) - v)  # (B,)
        return Loss(adaptive_weight(error, self.p, self.c) * error, {"error_r_eq_t": error.detach()})

    def __post_init__(self):
        check_weight(self.p, self.c)
