"""Sampling by the average velocity (Eq. 12, Algorithm 2): z_r = z_t − (t − r)·u(z_t, r, t)."""

from itertools import pairwise

import torch
from torch import Tensor

from meanflow.tangent import Network


def time_grid(steps: int) -> tuple[float, ...]:
    """1 = t_0 > t_1 > … > t_steps = 0, evenly spaced. Raises ValueError if steps < 1."""
    if steps < 1:
        raise ValueError(f"steps must be ≥ 1, got {steps}")
    return tuple(1 - i / steps for i in range(steps + 1))


@torch.no_grad()
def sample(u: Network, z: Tensor, grid: tuple[float, ...], **cond) -> Tensor:
    """From noise z (B, …) to data (B, …), one network evaluation (NFE) for each interval of `grid`.

    `grid` descends from 1 to 0: (1, 0) is one-step sampling, z_0 = z_1 − u(z_1, 0, 1). Raises ValueError if not.
    """
    if len(grid) < 2 or grid[0] != 1 or grid[-1] != 0 or any(t <= r for t, r in pairwise(grid)):
        raise ValueError(f"a time grid descends from 1 to 0, got {grid}")
    for t, r in pairwise(grid):
        z = z - (t - r) * u(z, z.new_full(z.shape[:1], t), z.new_full(z.shape[:1], r), **cond)
    return z
