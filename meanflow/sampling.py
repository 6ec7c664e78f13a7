"""Sampling by the average velocity (Eq. 12, Algorithm 2): z_r = z_t − (t − r)·u(z_t, r, t)."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from meanflow.jvp import Network


def time_grid(steps: int) -> tuple[float, ...]:
    """1 = t_0 > t_1 > … > t_steps = 0, evenly spaced. Raises ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be ≥ 1, got {steps}")
    return tuple(1 - i / steps for i in range(steps + 1))


def check_grid(grid: Sequence[float]) -> tuple[float, ...]:
    """Raises ValueError unless `grid` descends from 1 to 0."""
    grid = tuple(float(t) for t in grid)
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or any(t <= r for t, r in pairwise(grid)):
        raise ValueError(f"a time grid descends from 1 to 0, got {', '.join(f'{t:g}' for t in grid)}")
    return grid


@torch.no_grad()
def sample(u: Network, z: Tensor, steps: int = 1, grid: Sequence[float] | None = None, **cond: Tensor | None) -> Tensor:
    """From noise z (B, …) to data (B, …), one network evaluation (NFE) for each of `steps` intervals.

    One step is z_0 = z_1 − u(z_1, 0, 1). `grid`: the times themselves, descending from 1 to 0, in place of `steps`
    even intervals. cond: what else u takes, (B, …). Raises ValueError for steps < 1 or another grid.
    """
    for t, r in pairwise(time_grid(steps) if grid is None else check_grid(grid)):
        z = z - (t - r) * u(z, z.new_full(z.shape[:1], r), z.new_full(z.shape[:1], t), **cond)
    return z
