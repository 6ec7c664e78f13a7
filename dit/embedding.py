"""Embedding of the times and of the patches' positions."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FREQUENCIES = 256  # of each time embedder: half cosines, half sines
MAX_PERIOD = 10_000


class TimeEmbedder(nn.Module):
    """(B,) → (B, width): cosines and sines at frequencies 10000^(−i/128), then linear → SiLU → linear.

    Time stays in [0, 1]: it is not multiplied by 1000 as diffusion models do, because ∂u/∂t would grow with it.
    """

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies(), persistent=False)
        self.fc1, self.fc2 = nn.Linear(FREQUENCIES, width), nn.Linear(width, width)

    def forward(self, time: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(waves(time, self.frequencies))))  # (B, width)


def frequencies() -> Tensor:
    """(128,): 10000^(−i/128)."""
    half = FREQUENCIES // 2
    exponents = torch.arange(half, dtype=torch.float64) / half
    return torch.exp(-math.log(MAX_PERIOD) * exponents).float()


def waves(scalar: Tensor, frequencies: Tensor) -> Tensor:
    """(B,) → (B, 256): cosines, then sines."""
    angles = scalar[:, None] * frequencies  # (B, 128)
    return torch.cat([torch.cos(angles), torch.sin(angles)], dim=1)


def sincos_positions(side: int, width: int) -> Tensor:
    """Fixed 2-D positions (1, side², width), row by row: a quarter each of sin x, cos x, sin y, cos y."""
    omega = MAX_PERIOD ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angles = torch.arange(side, dtype=torch.float64)[:, None] * omega  # (side, width/4)
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # (side, width/2)
    x, y = axis[None].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)
    return torch.cat([x, y], dim=2).reshape(1, side * side, width).float()
