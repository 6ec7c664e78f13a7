"""Closed forms for Gaussian data, the oracle of many tests.

Data x ~ N(m, diag(s²)), noise ε ~ N(0, I), z_t = (1 − t)x + tε. Then z_t ~ N((1 − t)m, σ_t²), σ_t² = (1 − t)²s² + t²,
the probability flow maps z_t ↦ z_r = μ_r + (σ_r/σ_t)(z_t − μ_t), and so v and u are linear in z.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussian:
    mean: Tensor  # (d,)
    std: Tensor  # (d,)

    def moments(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of z_t, each (B, d), for t (B,)."""
        t = t[:, None]
        return (1 - t) * self.mean, torch.sqrt(((1 - t) * self.std) ** 2 + t**2)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v(z, t) = E[ε − x | z_t = z], by regression of ε − x on z_t."""
        mean, std = self.moments(t)
        covariance = t[:, None] - (1 - t[:, None]) * self.std**2  # Cov(ε − x, z_t)
        return -self.mean + covariance / std**2 * (z - mean)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z_r on the trajectory through z at t."""
        (mean_t, std_t), (mean_r, std_r) = self.moments(t), self.moments(r)
        return mean_r + std_r / std_t * (z - mean_t)

    def average_velocity(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u(z, r, t) of Eq. (3), with its limit v where r = t."""
        interval = (t - r)[:, None]
        safe = torch.where(interval == 0, 1, interval)
        return torch.where(interval == 0, self.velocity(z, t), (z - self.flow(z, t, r)) / safe)


def example(dtype=torch.float64) -> Gaussian:
    return Gaussian(torch.tensor([0.7, -0.3, 0.1], dtype=dtype), torch.tensor([0.5, 1.4, 0.05], dtype=dtype))
