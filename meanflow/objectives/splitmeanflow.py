"""SplitMeanFlow (Guo et al. 2025, arXiv 2507.16884): an interval is the sum of its two parts.

The average velocity satisfies (t − r) u(z_t, r, t) = (s − r) u(z_s, r, s) + (t − s) u(z_t, s, t) for every s between r
and t, without a derivative. With s = (1 − λ) t + λ r, λ ~ U(0, 1), for r < t:

    u_2 = u(z_t, s, t),   z_s = z_t − (t − s) u_2,   u_1 = u(z_s, r, s),   u_tgt = sg((1 − λ) u_1 + λ u_2).

Where r = t the target is v. u ≡ 0 solves the first equation too: what is learnt comes from the samples with r = t
alone, which must be at least half. Written from the paper's formula.
"""

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from meanflow.jvp import value_and_jvp
from meanflow.objectives.base import (
    Loss,
    Objective,
    adaptive_weight,
    by_rows,
    check_weight,
    interpolate,
    on_rows,
    per_row,
    squared_norm,
)
from meanflow.times import Times


@dataclass(frozen=True)
class SplitMeanFlow(Objective):
    """The loss above. Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["splitmeanflow"] = "splitmeanflow"
    times: Times = field(default_factory=lambda: Times(ratio=0.5))  # how (r, t) are drawn; ratio: 0.5 at most
    p: float = 0.0  # power of the adaptive weight, Eq. (22) of MeanFlow; 0 is the paper's squared error
    c: float = 1e-3  # its constant, > 0
    titles = Objective.titles | {"loss": "training loss"}

    @property
    def passes(self) -> int:
        return 2

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self.times.sample(n, generator)

    def sample_cond(self, r: Tensor, t: Tensor, classes: int, generator: Generator | None) -> dict[str, Tensor]:
        """λ of each sample, (n,) in [0, 1)."""
        return {"split": torch.rand(len(t), generator=generator)}

    def loss(
        self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, split: Tensor, **cond
    ) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        rows, split = r != t, split.to(z, non_blocking=True)  # λ, (B,)
        start, end = r.to(z, non_blocking=True), t.to(z, non_blocking=True)
        s = torch.lerp(end, start, split)
        second = on_rows(u, rows, z, s, end, **cond)  # u(z_t, s, t), (B, …)
        first = on_rows(u, rows, z - per_row(end - s, x) * second, start, s, **cond)  # u(z_s, r, s)
        share = per_row(split, x)
        target = torch.where(per_row(rows, x).bool(), (1 - share) * first + share * second, v)
        error = squared_norm(u(z, start, end, **cond) - target)  # (B,)
        return Loss(adaptive_weight(error, self.p, self.c) * error, by_rows(error, r, t))

    @property
    def varying_rows(self) -> bool:
        return self.times.varying_rows

    def __post_init__(self):
        check_weight(self.p, self.c)
        if self.times.ratio > 0.5:
            raise ValueError(f"times.ratio must be 0.5 at most (only r = t learns from data), got {self.times.ratio}")
