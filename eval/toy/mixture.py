"""A mixture of Gaussians in the plane, where the marginal velocity is a formula and the average velocity an ODE away.

Data x is drawn from component k with weight π_k = 1/K as N(m_k, s_k² I), noise is ε ~ N(0, I), z_t = (1 − t) x + t ε
(Section 3). Given k, z_t and ε − x are jointly Gaussian, with

    z_t | k ~ N((1 − t) m_k, σ_k² I),   σ_k² = (1 − t)² s_k² + t²,   Cov(ε − x, z_t | k) = (t − (1 − t) s_k²) I,

so regression gives E[ε − x | z_t = z, k], and averaging over the posterior of k the marginal velocity of Eq. (2):

    v(z, t) = Σ_k γ_k(z, t) [ −m_k + (t − (1 − t) s_k²) / σ_k² · (z − (1 − t) m_k) ],
    γ_k(z, t) ∝ π_k N(z; (1 − t) m_k, σ_k² I).

The average velocity of Eq. (3) has no such formula: it is the displacement along the probability flow dz/dτ = v(z, τ)
divided by its duration, u(z, r, t) = (z_t − z_r) / (t − r), and the flow is integrated numerically.
"""

import numpy as np
import torch
from scipy.integrate import solve_ivp
from torch import Generator, Tensor

from meanflow.jvp import Network

TOLERANCE = 1e-9  # of the ODE solver, absolute and relative: far below any error that training leaves


class Mixture:
    """Components of equal weight, (mean x, mean y, standard deviation) each. All tensors are float64."""

    def __init__(self, components: tuple[tuple[float, float, float], ...]):
        table = torch.tensor(components, dtype=torch.float64)  # (K, 3)
        self.means, self.stds = table[:, :2], table[:, 2]

    def sample(self, n: int, generator: Generator) -> Tensor:
        """n points x, (n, 2)."""
        k = torch.randint(len(self.stds), (n,), generator=generator)
        noise = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        return self.means[k] + self.stds[k, None] * noise

    def log_density(self, z: Tensor, t: Tensor) -> Tensor:
        """log p_t(z): z (B, 2), t (B,) → (B,)."""
        return self._log_joint(*self._moments(z, t)).logsumexp(1)

    def velocity(self, z: Tensor, t: Tensor) -> Tensor:
        """v(z, t): z (B, 2), t (B,) in [0, 1] → (B, 2). Differentiable."""
        offset, variance = self._moments(z, t)
        posterior = self._log_joint(offset, variance).softmax(1)  # γ_k
        t = t[:, None]
        slope = (t - (1 - t) * self.stds**2) / variance
        given_k = slope[..., None] * offset - self.means  # (B, K, 2)
        return (posterior[..., None] * given_k).sum(1)

    def flow(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z_r on the trajectory through z at t: z (B, 2), t and r (B,) → (B, 2).

        All rows are one system of ODEs, each with its interval scaled to τ = t + s (r − t), s in [0, 1].
        """
        speed = (r - t)[:, None]

        def slope(s: float, flat: np.ndarray) -> np.ndarray:
            v = self.velocity(torch.from_numpy(flat).view(-1, 2), t + s * (r - t))
            return (speed * v).flatten().numpy()

        start = z.flatten().numpy()
        found = solve_ivp(slope, (0, 1), start, method="DOP853", t_eval=(1,), rtol=TOLERANCE, atol=TOLERANCE)
        if not found.success:
            raise ArithmeticError(f"the probability flow could not be integrated: {found.message}")
        return torch.from_numpy(found.y[:, -1]).view(-1, 2)

    def average_velocity(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        """u(z, r, t) of Eq. (3), with its limit v where r = t."""
        interval = (t - r)[:, None]
        displacement = z - self.flow(z, t, r)
        return torch.where(interval == 0, self.velocity(z, t), displacement / torch.where(interval == 0, 1, interval))

    def _moments(self, z: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """z − (1 − t) m_k (B, K, 2) and σ_k² (B, K)."""
        t = t[:, None]
        return z[:, None] - (1 - t)[..., None] * self.means, ((1 - t) * self.stds) ** 2 + t**2

    def _log_joint(self, offset: Tensor, variance: Tensor) -> Tensor:
        """log π_k N(z; (1 − t) m_k, σ_k² I), (B, K)."""
        return -offset.square().sum(2) / (2 * variance) - torch.log(2 * torch.pi * variance * len(self.stds))


def instantaneous(mixture: Mixture) -> Network:
    """v in the place of u: what ordinary Flow Matching samples with."""
    return lambda z, r, t: mixture.velocity(z, t)
