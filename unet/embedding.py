"""Embedding of the times (MeanFlow, Section 4.3 "Conditioning on (r, t)" and Table 1c)."""

import math

import torch
from torch import Tensor, nn

CONDITIONINGS = ("t,t-r", "t,r", "t,r,t-r", "t-r")  # the four rows of Table 1c


def time_variables(r: Tensor, t: Tensor, conditioning: str) -> list[Tensor]:
    """The variables that are embedded, each (B,), in the order of `conditioning` (one of `CONDITIONINGS`)."""
    named = {"t": t, "r": r, "t-r": t - r}
    return [named[name] for name in conditioning.split(",")]


class SinusoidalEmbedding(nn.Module):
    """(B,) → (B, dim): sines, then cosines, at frequencies 10000^(−i/(dim/2 − 1)), i = 0 … dim/2 − 1.

    Time stays in [0, 1]: it is not multiplied by 1000 as diffusion models do, because ∂u/∂t would grow with it.
    """

    def __init__(self, dim: int):
        super().__init__()
        half = dim // 2
        exponents = torch.arange(half, dtype=torch.float64) / max(half - 1, 1)
        frequencies = torch.exp(-math.log(10000.0) * exponents)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, time: Tensor) -> Tensor:
        angles = time[:, None] * self.frequencies  # (B, dim/2)
        return torch.cat([torch.sin(angles), torch.cos(angles)], dim=1)  # (B, dim)
