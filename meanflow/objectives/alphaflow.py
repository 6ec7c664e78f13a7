"""α-Flow (Zhang et al. 2025, arXiv 2510.20771): from trajectory Flow Matching, discretely, to MeanFlow.

For r < t, with Δ = t − r and δ = α Δ, the network is regressed on

    u_tgt = sg(α v + (1 − α) u(z_t − δ v, r, t − δ)),

weighted by α / (e + c), where e is the mean squared error. α = 1 is Flow Matching with every r; as α → 0 the target
becomes MeanFlow's, and the gradients too, which α in the weight makes comparable. α falls from 1 to 0 by a sigmoid of
the training step k,

    α(k) = 1 − sigmoid(25 (k − (k_s + k_e)/2) / (k_e − k_s)), 1 above 0.995 and 0 below 0.005.

Once α = 0 the loss is that of `MeanFlow`, with its Jacobian-vector product. Written from the paper's formulas alone:
its repository is non-commercial and was not opened.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor

from meanflow.jvp import value_and_jvp
from meanflow.objectives.base import (
    Loss,
    Objective,
    adaptive_weight,
    by_jvp,
    by_rows,
    interpolate,
    on_rows,
    per_row,
    squared_norm,
    weighted,
)
from meanflow.objectives.meanflow import MeanFlow
from meanflow.times import Times

STEEPNESS = 25.0  # of the sigmoid
SNAP = 0.005  # α is 0 below this, and 1 above 1 minus this


@dataclass(frozen=True)
class AlphaFlow(Objective):
    """The loss above. Raises ValueError, naming the field, for impossible settings."""

    kind: Literal["alphaflow"] = "alphaflow"
    times: Times = field(default_factory=lambda: Times(ratio=0.5))  # how (r, t) are drawn
    c: float = 1e-3  # constant of the weight, > 0, beside the mean squared error
    alpha_start: float = 0.5  # k_s/K, the fraction of training where α begins to fall (XL/2: 600 k of 1.2 M steps)
    alpha_end: float = 0.833  # k_e/K, where it has fallen (XL/2: 1 M)
    clamp: float | None = 4.0  # largest |u_tgt| in guided runs while 0 < α < 1; null: any
    needs_jvp = True
    titles = Objective.titles | {
        "loss": "training loss (weighted: flat by design)",
        "alpha": "α: 1 is Flow Matching, 0 is MeanFlow",
    }

    def alpha(self, progress: float) -> float:
        """α after this fraction of training."""
        middle, length = (self.alpha_start + self.alpha_end) / 2, self.alpha_end - self.alpha_start
        alpha = (1 - math.tanh(STEEPNESS * (progress - middle) / length / 2)) / 2  # 1 − sigmoid, without overflow
        return 0.0 if alpha < SNAP else 1.0 if alpha > 1 - SNAP else alpha

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self.times.sample(n, generator)

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond) -> Loss:
        alpha, c = self.alpha(progress), self.c * x[0].numel()  # beside a sum: e/(e + c) is one for means and sums
        if alpha == 0:
            out = MeanFlow(times=self.times, p=1.0, c=c).loss(u, x, eps, r, t, v=v, jvp=jvp, **cond)
            return Loss(out.per_sample, {**out.logged, "alpha": torch.zeros_like(out.per_sample.detach())})
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        target = v_given = eps - x if v is None else v
        u = by_jvp(u, jvp)
        u_out = u(z, r, t, **cond)  # (B, …)
        if alpha < 1:
            step = alpha * (t - r)  # δ, (B,)
            ahead = on_rows(u, r != t, z - per_row(step, x) * v_given, r, t - step, **cond)
            u_tgt = alpha * v_given + (1 - alpha) * ahead
            if v is not None and self.clamp is not None:
                u_tgt = u_tgt.clamp(-self.clamp, self.clamp)
            target = torch.where(per_row(r != t, x).bool(), u_tgt, v_given)
        error = squared_norm(u_out - target)  # (B,)
        loss = weighted(adaptive_weight(error, 1.0, c) * error, r != t, alpha)
        return Loss(loss, {**by_rows(error, r, t), "alpha": torch.full_like(error.detach(), alpha)})

    @property
    def varying_rows(self) -> bool:
        return self.times.varying_rows

    def __post_init__(self):
        if self.c <= 0:
            raise ValueError(f"c must be > 0, got {self.c}")
        if not 0 <= self.alpha_start < self.alpha_end <= 1:
            raise ValueError(f"alpha_start < alpha_end must lie in [0, 1], got {self.alpha_start} and {self.alpha_end}")
        if self.clamp is not None and self.clamp <= 0:
            raise ValueError(f"clamp must be > 0 or null, got {self.clamp}")
