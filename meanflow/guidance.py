"""Classifier-free guidance inside the target (Section 4.2 and appendix B.1; Eqs. 19–21): sampling stays one pass."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from meanflow.tangent import Network
from meanflow.times import spread

DROPPED = ("official", "independent")


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of guided training. Raises ValueError, naming the field, when one is out of range."""

    omega_prime: float  # ω′, the guidance scale that results, ω / (1 − κ); 1 is none
    kappa: float  # κ in [0, 1), the share of the network's own class-conditional velocity (Eq. 20)
    omega: float  # ω = (1 − κ) ω′, the weight of the conditional velocity ε − x
    t_start: float  # guided while t_start ≤ t ≤ t_end, outside trained without
    t_end: float
    label_drop: float  # probability that a sample loses its label, in [0, 1)
    dropped: str  # who loses it - official: samples with r = t first (official release); independent: anyone

    def __post_init__(self):
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa must be in [0, 1), got {self.kappa}")
        if self.omega_prime <= 0:
            raise ValueError(f"omega_prime must be > 0, got {self.omega_prime}")
        expected = (1 - self.kappa) * self.omega_prime
        if not math.isclose(self.omega, expected, rel_tol=1e-6):
            raise ValueError(
                f"omega must be (1 - kappa) * omega_prime = {expected:g} (Eq. 21) and is {self.omega:g}: "
                "set all three together"
            )
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise ValueError(f"t_start ≤ t_end must lie in [0, 1], got {self.t_start} and {self.t_end}")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
        if self.dropped not in DROPPED:
            raise ValueError(f"dropped must be one of {', '.join(DROPPED)}, got {self.dropped!r}")


def drop_labels(t: Tensor, r: Tensor, config: GuidanceConfig, generator: Generator) -> Tensor:
    """Which samples of the batch train without their label: (B,) bool, on the CPU as t and r (B,) are.

    The number is binomial. "official": they are taken from the samples with r = t, evenly spread, and from others
    only when those run out; so the null class hardly learns at r ≠ t. "independent": a coin for each sample.
    """
    dropped = torch.rand(len(t), generator=generator) < config.label_drop
    if config.dropped == "independent":
        return dropped
    number, still = int(dropped.sum()), t == r
    first = min(number, int(still.sum()))
    out = torch.zeros_like(dropped)
    out[still] = spread(first, int(still.sum()))
    out[~still] = spread(number - first, int((~still).sum()))
    return out


@torch.no_grad()
def guided_velocity(
    u: Network,
    z: Tensor,
    t: Tensor,
    v: Tensor,
    dropped: Tensor,
    null: int,
    config: GuidanceConfig,
    together: bool,
    *,
    class_labels: Tensor,
    **cond,
) -> Tensor:
    """v_g = ω (ε − x) + κ u(z, t, t | c) + (1 − ω − κ) u(z, t, t | ∅), Eq. (21), or Eq. (19) where κ = 0. (B, …).

    u is the network in evaluation mode. z, v (B, …): z_t and ε − x. t (B,) and dropped (B,) bool, best on the CPU:
    which rows need the network is then known without waiting for the device. class_labels (B,) int64 before any
    was dropped, null: the label that means none. Dropped samples and those outside the interval have v_g = v and
    cost no pass, nor does a term whose weight is zero. `together`: both passes as one, twice as wide.
    """
    weights = {"class": config.kappa, "null": 1 - config.omega - config.kappa}
    wanted = [name for name, weight in weights.items() if abs(weight) > 1e-12]
    rows = ((t >= config.t_start) & (t <= config.t_end) & ~dropped).nonzero()[:, 0]
    if not wanted or len(rows) == 0:
        return v
    rows = rows.to(z.device, non_blocking=True)
    z, t, own = z[rows], t.to(z, non_blocking=True)[rows], class_labels[rows]
    labels = {"class": own, "null": torch.full_like(own, null)}
    others = {key: y[rows] for key, y in cond.items()}
    parts = [wanted] if together else [[name] for name in wanted]
    guided = config.omega * v[rows]
    for part in parts:
        k = len(part)
        t_k, cond_k = t.repeat(k), {key: y.repeat(k, *[1] * (y.ndim - 1)) for key, y in others.items()}
        z_k = z.repeat(k, *[1] * (z.ndim - 1))
        out = u(z_k, t_k, t_k, class_labels=torch.cat([labels[name] for name in part]), **cond_k).to(v.dtype)
        for name, velocity in zip(part, out.chunk(k), strict=True):
            guided = guided + weights[name] * velocity
    return v.index_copy(0, rows, guided)
