"""The distribution p(t, r) of training times (Section 4.3 "Sampling Time Steps", Tables 1a and 1d)."""

from dataclasses import dataclass

import torch
from torch import Generator, Tensor

SAMPLERS = ("v0", "v1")
DISTRIBUTIONS = ("lognorm", "uniform")
SHARES = ("exact", "per_sample")


@dataclass(frozen=True)
class TimesConfig:
    """How (t, r) are drawn. Raises ValueError, naming the field, when one is out of range."""

    sampler: str  # v0: the paper's; v1: the official PyTorch release's later one
    distribution: str  # lognorm or uniform
    mu: float  # lognorm: t = sigmoid(mu + sigma·N(0, 1))
    sigma: float
    mu_r: float | None  # v1 only: r has a lognorm of its own
    sigma_r: float | None
    ratio: float  # share of samples with r ≠ t, in [0, 1]; 0 is Flow Matching
    share: str  # exact: every batch has this share; per_sample: each sample is drawn

    def __post_init__(self):
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {SAMPLERS}, got {self.sampler!r}")
        if self.distribution not in DISTRIBUTIONS:
            raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {self.distribution!r}")
        if not 0 <= self.ratio <= 1:
            raise ValueError(f"ratio must be in [0, 1], got {self.ratio}")
        if self.share not in SHARES:
            raise ValueError(f"share must be one of {SHARES}, got {self.share!r}")
        if self.sigma <= 0 or (self.sigma_r is not None and self.sigma_r <= 0):
            raise ValueError("sigma and sigma_r must be > 0")
        own_r = self.mu_r is not None and self.sigma_r is not None
        if self.sampler == "v1" and not (own_r and self.distribution == "lognorm"):
            raise ValueError("sampler v1 needs distribution lognorm and numbers for mu_r and sigma_r")
        if self.sampler == "v0" and (self.mu_r is not None or self.sigma_r is not None):
            raise ValueError("mu_r and sigma_r belong to sampler v1: set them to null for v0")

    @property
    def varies(self) -> bool:
        """Whether the number of samples with r ≠ t differs from batch to batch."""
        return self.share == "per_sample" or self.sampler == "v1"


def sample_times(n: int, config: TimesConfig, generator: Generator) -> tuple[Tensor, Tensor]:
    """n pairs (t, r), each (n,) float32 on the CPU, 0 ≤ r ≤ t ≤ 1.

    With share "exact", round(ratio·n) samples have r ≠ t, spread so evenly that any run of consecutive samples,
    and so every process and micro-batch, has its share to within one. Under v1 fewer do: there r := t is set first
    and r = min(t, r) is taken after, as the official release does.
    """
    a, b = torch.randn(n, generator=generator), torch.randn(n, generator=generator)
    coin = torch.rand(n, generator=generator)
    moving = spread(round(config.ratio * n), n) if config.share == "exact" else coin < config.ratio
    if config.sampler == "v1":
        t = torch.sigmoid(config.mu + config.sigma * a)
        r = torch.minimum(t, torch.sigmoid(config.mu_r + config.sigma_r * b))
    else:
        a, b = _to_unit_interval(a, config), _to_unit_interval(b, config)
        t, r = torch.maximum(a, b), torch.minimum(a, b)
    return t, torch.where(moving, r, t)


def spread(count: int, n: int) -> Tensor:
    """`count` of n positions, as evenly as can be: (n,) bool."""
    i = torch.arange(n)
    return (i + 1) * count // max(n, 1) > i * count // max(n, 1)


def _to_unit_interval(normal: Tensor, config: TimesConfig) -> Tensor:
    if config.distribution == "uniform":
        return torch.special.ndtr(normal)
    return torch.sigmoid(config.mu + config.sigma * normal)
