"""Shortcut models (Frans et al. 2024, arXiv 2410.12557): a step of d is the mean of two steps of d/2.

d is one of 1, 1/2, …, 1/64, t a multiple of d, and r = t − d. A fraction of the batch, 1/8, learns from the averaged
network u⁻ (EMA 0.999), its target clamped to ±4:

    u_1 = u⁻(z_t, t − d/2, t),   u_2 = u⁻(z_t − d/2 · u_1, t − d, t − d/2),   u(z_t, t − d, t) → (u_1 + u_2)/2.

The rest is Flow Matching on the grid of the finest step, d = 1/128: t = 1/128, …, 1. The network is asked for that step
as r = t (the paper: as d = 0), both by Flow Matching and by the half steps of d = 1/64. So u(z, t, t) is the velocity,
as in the other objectives, and Euler steps of 1/128 with it are what all longer ones are built from.
Written from the paper's formulas and a description of its code (MIT).
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

from meanflow.jvp import value_and_jvp
from meanflow.objectives.base import Loss, Objective, by_rows, interpolate, on_rows, per_row, squared_norm
from meanflow.times import spread


@dataclass(frozen=True)
class Shortcut(Objective):
    """The loss above, a mean square. Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["shortcut"] = "shortcut"
    ratio: float = 0.125  # fraction of samples with r < t, which learn from the averaged network
    finest: int = 128  # steps of Flow Matching's grid, a power of two
    teacher_ema: float = 0.999  # of the average that is the teacher, one of ema.decays
    clamp: float | None = 4.0  # largest |target| of the samples with r < t; null: any
    titles = Objective.titles | {"loss": "training loss (mean square)", "d": "step d, at r < t"}

    @property
    def teacher_decay(self) -> float:
        return self.teacher_ema

    @property
    def passes(self) -> int:
        return 2

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        rows = spread(round(self.ratio * n), n)
        halvings = torch.randint(self.finest.bit_length() - 1, (n,), generator=generator)  # 0 … 6
        count = torch.where(rows, 2**halvings, self.finest)  # steps of 1/count, on whose grid t lies
        t = (1 + (torch.rand(n, generator=generator) * count).long().clamp(max=count - 1)) / count
        return torch.where(rows, t - 1 / count, t), t  # exact: dyadic numbers

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        if teacher is None:
            raise ValueError("shortcut learns from an averaged network: give `teacher`")
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        rows, d = r != t, t - r
        middle = t - d / 2
        smallest = d < 1.5 / (self.finest / 2)  # d = 1/64: its half steps are Flow Matching's, asked for as r = t
        start, end = torch.where(smallest, t, middle), torch.where(smallest, middle, r)
        first = on_rows(teacher, rows, z, start, t, **cond)  # (B, …)
        second = on_rows(teacher, rows, z - per_row(d / 2, x) * first, end, middle, **cond)
        mean = (first + second) / 2
        if self.clamp is not None:
            mean = mean.clamp(-self.clamp, self.clamp)
        target = torch.where(per_row(rows, x).bool(), mean, v)
        out = u(z, r.to(z, non_blocking=True), t.to(z, non_blocking=True), **cond)
        error = squared_norm(out - target)  # (B,)
        return Loss(error / x[0].numel(), {**by_rows(error, r, t), "d": (d.to(error), rows)})

    def __post_init__(self):
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio}")
        if self.finest < 2 or self.finest & (self.finest - 1):
            raise ValueError(f"finest must be a power of two, 2 at least, got {self.finest}")
        if not 0 < self.teacher_ema < 1:
            raise ValueError(f"teacher_ema must be in (0, 1), got {self.teacher_ema}")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp must be > 0 or null, got {self.clamp}")
