"""Sampling by the average velocity (Eq. 12, Algorithm 2): z_r = z_t − (t − r)·u(z_t, r, t)."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from meanflow.jvp import Network

# How a trained network goes from t to r < t. flow_map: z − (t − r) u(z, r, t), Eq. (12). euler: the same with the
# velocity u(z, t, t), for networks that know no other. renoise: to x = z − t u(z, 0, t), and back to (1 − r) x + r ε
# with fresh noise ε, for those that know r = 0 alone (consistency models).
SAMPLERS = ("flow_map", "euler", "renoise")


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
def sample(
    u: Network,
    z: Tensor,
    steps: int = 1,
    grid: Sequence[float] | None = None,
    *,
    sampler: str = "flow_map",
    noise: Callable[[int], Tensor] | None = None,
    **cond: Tensor | None,
) -> Tensor:
    """From noise z (B, …) to data (B, …), one network evaluation (NFE) for each of `steps` intervals.

    One step is z_0 = z_1 − u(z_1, 0, 1). `grid`: the times themselves, descending from 1 to 0, in place of `steps`
    even intervals. sampler: one of SAMPLERS, the objective's. noise(k): ε (B, …) after the kth step, k ≥ 1, by default
    from PyTorch's generator. cond: what else u takes, (B, …). Raises ValueError for steps < 1, another grid or sampler.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}")
    for k, (t, r) in enumerate(pairwise(time_grid(steps) if grid is None else check_grid(grid)), 1):
        end = {"flow_map": r, "euler": t, "renoise": 0.0}[sampler]
        velocity = u(z, z.new_full(z.shape[:1], end), z.new_full(z.shape[:1], t), **cond)
        z = z - (t if sampler == "renoise" else t - r) * velocity
        if sampler == "renoise" and r > 0:
            z = (1 - r) * z + r * (torch.randn_like(z) if noise is None else noise(k).to(z))
    return z
