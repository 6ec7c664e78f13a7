"""Classifier-free guidance inside the target (Section 4.2 and appendix B.1; Eqs. 19–21): sampling stays one pass.

SoFlow's guided velocity m (v + d(t) (w − 1) (v − v_∅)) + (1 − m) v̂ is Eq. (21) too, with κ = 1 − m and a scale
ω′(t) = 1 + d(t) (w − 1) that falls towards 1 near t = 1: `fade_from`.

The scale is fixed in training (`GuidanceConfig`), or an input of the network that sampling chooses (`GuidanceInput`).
"""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from meanflow.jvp import Network
from meanflow.times import spread

UNCONDITIONAL_ROWS = ("r_eq_t_first", "any")
FADE_RATE = 0.025


@dataclass(frozen=True)
class GuidanceConfig:
    """Settings of guided training. Raises ValueError, naming the field, when one is out of range."""

    omega_prime: float = 1.0  # ω′, the guidance scale that results, ω / (1 − κ); 1 is none
    kappa: float = 0.0  # κ in [0, 1), the weight of the network's own class-conditional velocity (Eq. 20)
    t_start: float = 0.0  # guided while t_start ≤ t ≤ t_end, outside trained without
    t_end: float = 1.0  # see t_start
    fade_from: float = 1.0  # above this t ω′ falls smoothly to 1, which it is at t = 1 (SoFlow: 0.8); 1: nowhere
    label_drop: float = 0.1  # probability that a sample is trained without its label, in [0, 1)
    unconditional_rows: str = "r_eq_t_first"  # which samples: r_eq_t_first (official release) or any

    def __post_init__(self):
        if not 0 <= self.kappa < 1:
            raise ValueError(f"kappa must be in [0, 1), got {self.kappa}")
        if self.omega_prime <= 0:
            raise ValueError(f"omega_prime must be > 0, got {self.omega_prime}")
        if not 0 <= self.t_start <= self.t_end <= 1:
            raise ValueError(f"t_start ≤ t_end must lie in [0, 1], got {self.t_start} and {self.t_end}")
        if not 0 <= self.fade_from <= 1:
            raise ValueError(f"fade_from must be in [0, 1], got {self.fade_from}")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
        if self.unconditional_rows not in UNCONDITIONAL_ROWS:
            known = ", ".join(UNCONDITIONAL_ROWS)
            raise ValueError(f"unconditional_rows must be one of {known}, got {self.unconditional_rows!r}")

    @property
    def omega(self) -> float:
        """ω = (1 − κ) ω′, the weight of the conditional velocity ε − x (Eq. 21)."""
        return (1 - self.kappa) * self.omega_prime

    def omega_at(self, t: Tensor) -> float | Tensor:
        """ω for t (B,): one number, or (B,) where it depends on t."""
        if self.fade_from == 1:
            return self.omega
        return (1 - self.kappa) * (1 + fade(t, self.fade_from) * (self.omega_prime - 1))

    @property
    def terms(self) -> tuple[str, ...]:
        """The evaluations of the network that have a weight: with the class, with the null class, or none."""
        weights = {"class": self.kappa, "null": 1 - self.omega - self.kappa}
        return tuple(name for name, weight in weights.items() if abs(weight) > 1e-12)


def fade(t: Tensor, start: float) -> Tensor:
    """SoFlow's d(t), (B,): 1 up to `start`, above it 1 − exp(−0.025 τ/(1 − τ)) with τ = (1 − t)/(1 − start)."""
    tau = ((1 - t) / (1 - start)).clamp(max=1)
    return -torch.expm1(-FADE_RATE * tau / (1 - tau))  # exp(−∞) = 0 where τ = 1


@dataclass(frozen=True)
class GuidanceInput:
    """What a network that takes guidance as an input is given: the scale ω where t_min ≤ t ≤ t_max, 1 (none) elsewhere.

    Raises ValueError, naming the field, for a scale below 1, which no such network is trained with: 1 − 1/ω, which it
    sees, would leave [0, 1). And for an interval that is none.
    """

    omega: float = 1.0
    interval: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self):
        if not 1 <= self.omega < math.inf:
            raise ValueError(f"guidance must be a number ≥ 1 (1 is none), got {self.omega:g}")
        low, high = self.interval
        if not 0 <= low <= high <= 1:
            raise ValueError(f"interval must be two times t_min ≤ t_max in [0, 1], got {low:g}, {high:g}")

    def __str__(self) -> str:
        low, high = self.interval
        return f"ω {self.omega:g}" + ("" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]")

    def inputs(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """The network's keywords for n samples, each (n,)."""
        values = {"omega": self.omega, "t_min": self.interval[0], "t_max": self.interval[1]}
        return {name: torch.full((n,), float(value), device=device) for name, value in values.items()}


def drop_labels(r: Tensor, t: Tensor, config: GuidanceConfig, generator: Generator) -> Tensor:
    """The unconditional mask of a batch: (B,) bool, true where a sample is trained without its label.

    r, t (B,) on the CPU. The number of such samples is binomial. "r_eq_t_first" takes them from the samples with r = t,
    evenly spaced, and from others only when there are too few; so the null class is hardly trained at r ≠ t. "any"
    draws for each sample.
    """
    drawn = torch.rand(len(t), generator=generator) < config.label_drop
    if config.unconditional_rows == "any":
        return drawn
    number, r_eq_t = int(drawn.sum()), r == t
    first = min(number, int(r_eq_t.sum()))
    mask = torch.zeros_like(drawn)
    mask[r_eq_t] = spread(first, int(r_eq_t.sum()))
    mask[~r_eq_t] = spread(number - first, int((~r_eq_t).sum()))
    return mask


@torch.no_grad()
def guided_velocity(
    u: Network,
    z: Tensor,
    t: Tensor,
    v: Tensor,
    unconditional: Tensor,
    null_class: int,
    config: GuidanceConfig,
    batched: bool,
    *,
    class_labels: Tensor,
    **cond,
) -> Tensor:
    """v_g = ω (ε − x) + κ u(z, t, t | c) + (1 − ω − κ) u(z, t, t | ∅), Eq. (21), or Eq. (19) where κ = 0. (B, …).

    u is the network in evaluation mode. z, v (B, …): z_t and ε − x. t (B,) and the mask `unconditional` (B,), best on
    the CPU: which rows need the network is then known without waiting for the device. class_labels (B,) int64, not
    masked. Unconditional samples and those outside the interval have v_g = v and are not evaluated, nor is a term
    whose weight is zero. `batched`: both evaluations in one pass of twice the batch.
    """
    rows = ((t >= config.t_start) & (t <= config.t_end) & ~unconditional).nonzero()[:, 0]
    if not config.terms or len(rows) == 0:
        return v
    omega = config.omega_at(t[rows])
    if isinstance(omega, Tensor):
        omega = omega.to(z, non_blocking=True).view(-1, *[1] * (z.ndim - 1))
    weights = {"class": config.kappa, "null": 1 - omega - config.kappa}
    rows = rows.to(z.device, non_blocking=True)
    z, t, labels = z[rows], t.to(z, non_blocking=True)[rows], class_labels[rows]
    cond = {key: y[rows] for key, y in cond.items()}
    labels = {"class": labels, "null": torch.full_like(labels, null_class)}
    guided = omega * v[rows]
    for names in [list(config.terms)] if batched else [[name] for name in config.terms]:
        z_k, t_k, *cond_k = (y.repeat(len(names), *[1] * (y.ndim - 1)) for y in (z, t, *cond.values()))
        labels_k = torch.cat([labels[name] for name in names])
        out = u(z_k, t_k, t_k, class_labels=labels_k, **dict(zip(cond, cond_k, strict=True))).to(v.dtype)
        for name, velocity in zip(names, out.chunk(len(names)), strict=True):
            guided = guided + weights[name] * velocity
    return v.index_copy(0, rows, guided)
