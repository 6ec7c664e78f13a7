"""The distribution p(r, t) of training times (Section 4.3 "Sampling Time Steps", Tables 1a and 1d)."""

import functools
from dataclasses import dataclass, replace

import torch
from torch import Generator, Tensor

SAMPLERS = ("v0", "v1")
DISTRIBUTIONS = ("lognorm", "uniform")


@dataclass(frozen=True)
class Times:
    """How (r, t) are drawn, by default as in Table 1. Raises ValueError, naming the field, when one is out of range."""

    sampler: str = "v0"  # v0: the paper's; v1: the official PyTorch release's later one
    distribution: str = "lognorm"  # lognorm or uniform
    mu: float = -0.4  # lognorm: t = sigmoid(mu + sigma·N(0, 1))
    sigma: float = 1.0  # of the lognorm, as mu
    mu_r: float | None = None  # v1 only: r = sigmoid(mu_r + sigma_r·N(0, 1)), at most t
    sigma_r: float | None = None  # of that lognorm
    ratio: float = 0.25  # fraction of samples with r ≠ t, in [0, 1]; 0 is Flow Matching
    stratified: bool = True  # exactly this fraction of every batch; false: drawn for each sample

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio}")
        if self.sigma <= 0 or (self.sigma_r is not None and self.sigma_r <= 0):
            raise ValueError("sigma and sigma_r must be > 0")
        given = self.mu_r is not None and self.sigma_r is not None
        if self.sampler == "v1" and not (given and self.distribution == "lognorm"):
            raise ValueError("sampler v1 needs distribution lognorm and numbers for mu_r and sigma_r")
        if self.sampler == "v0" and (self.mu_r is not None or self.sigma_r is not None):
            raise ValueError("mu_r and sigma_r belong to sampler v1: set them to null for v0")

    @property
    def varying_rows(self) -> bool:
        """Whether the number of samples with r ≠ t differs from batch to batch."""
        return not self.stratified or self.sampler == "v1"

    def sample(self, n: int, generator: Generator | None = None) -> tuple[Tensor, Tensor]:
        """n pairs (r, t), each (n,) float32 on the CPU, 0 ≤ r ≤ t ≤ 1.

        Stratified, round(ratio·n) samples have r ≠ t, spread so evenly that any m consecutive samples, such as those of
        a process or micro-batch, have ratio·m of them to within one. v1 has fewer: of the samples that were to have
        r ≠ t it takes r = min(t, r), as the official release does.
        """
        a, b = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
        uniform = torch.rand(n, generator=generator)
        r_neq_t = spread(round(self.ratio * n), n) if self.stratified else uniform < self.ratio
        if self.sampler == "v1":
            t = torch.sigmoid(self.mu + self.sigma * a)
            r = torch.minimum(t, torch.sigmoid(self.mu_r + self.sigma_r * b))
        else:
            a, b = self._to_unit_interval(a), self._to_unit_interval(b)
            t, r = torch.maximum(a, b), torch.minimum(a, b)
        return torch.where(r_neq_t, r, t), t

    def _to_unit_interval(self, normal: Tensor) -> Tensor:
        if self.distribution == "uniform":
            return torch.special.ndtr(normal)
        return torch.sigmoid(self.mu + self.sigma * normal)


@dataclass(frozen=True)
class Time:
    """How one time is drawn by itself. Raises ValueError, naming the field, when one is out of range."""

    distribution: str = "lognorm"  # lognorm or uniform
    mu: float = -0.4  # lognorm: sigmoid(mu + sigma·N(0, 1))
    sigma: float = 1.0  # of the lognorm, as mu

    def __post_init__(self):
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}")
        if self.sigma <= 0:
            raise ValueError(f"sigma must be > 0, got {self.sigma}")

    def sample(self, n: int, generator: Generator | None = None) -> Tensor:
        """(n,) float32 in [0, 1] on the CPU."""
        if self.distribution == "uniform":
            return torch.rand(n, generator=generator)
        return torch.sigmoid(self.mu + self.sigma * torch.randn(n, generator=generator))


@functools.lru_cache
def mean_complement(times: Times) -> float:
    """E[1 − (t − r)] over the samples with r < t: from 2^18 seeded draws, so a fixed number (standard error < 0.001)
    that depends neither on the batch nor on how it is divided. 1 where there are no such samples."""
    if times.ratio == 0:
        return 1.0
    r, t = replace(times, ratio=1.0, stratified=True).sample(2**18, torch.Generator().manual_seed(0))
    interval = (t - r)[r < t]
    return float(1 - interval.double().mean()) if len(interval) else 1.0


def spread(count: int, n: int) -> Tensor:
    """`count` of n positions, evenly spaced: (n,) bool."""
    i = torch.arange(n)
    return (i + 1) * count // max(n, 1) > i * count // max(n, 1)
