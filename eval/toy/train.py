"""The settings of `eval.toy2d`, its network u(z, r, t) on the plane, and its training by the kit's own objective."""

import math
import time
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from eval.toy.mixture import Mixture
from meanflow.errors import NumericsError
from meanflow.logs import progress_bar
from meanflow.objectives import Objective
from meanflow.objectives.base import interpolate
from meanflow.random import derive_seed, generator
from meanflow.training.config import EmaConfig
from meanflow.training.state import Ema

VELOCITIES = ("marginal", "conditional")
CHECK_EVERY = 100  # steps between looks at whether the loss is finite
TIMED_STEPS = 20


@dataclass(frozen=True)
class PlaneNetworkConfig:
    """A multilayer perceptron. Raises ValueError, naming the field, when one is out of range."""

    width: int
    depth: int  # hidden layers
    octaves: int  # of the time embedding

    def __post_init__(self):
        if min(self.width, self.depth, self.octaves) < 1:
            raise ValueError(f"width, depth and octaves must be ≥ 1, got {self.width}, {self.depth}, {self.octaves}")


@dataclass(frozen=True)
class PlaneTrainConfig:
    """Adam with a linear warm-up and then half a cosine to 0; one average of the weights, which is what counts."""

    steps: int
    batch: int
    lr: float
    betas: tuple[float, float]
    warmup_steps: int
    ema: float  # decay per step

    def __post_init__(self):
        if min(self.steps, self.batch) < 1 or self.warmup_steps < 0:
            raise ValueError(f"steps and batch must be ≥ 1 and warmup_steps ≥ 0, got {self.steps}, {self.batch}")
        if self.lr <= 0:
            raise ValueError(f"lr must be > 0, got {self.lr}")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.ema)):
            raise ValueError(f"betas and ema must be in [0, 1), got {self.betas} and {self.ema}")

    def rate(self, step: int) -> float:
        """Of step `step`, from 0."""
        warm = min(1.0, (step + 1) / max(self.warmup_steps, 1))
        return self.lr * warm * (1 + math.cos(math.pi * step / self.steps)) / 2


@dataclass(frozen=True)
class MeasureConfig:
    points: int  # (z, r, t) of each error
    samples: int  # of each distance
    steps: tuple[int, ...]  # NFE, rising

    def __post_init__(self):
        if self.points < 1 or self.samples < 2:
            raise ValueError(f"points must be ≥ 1 and samples ≥ 2, got {self.points} and {self.samples}")
        if len(self.steps) < 2 or self.steps[0] < 1 or list(self.steps) != sorted(set(self.steps)):
            raise ValueError(f"steps must be two or more rising numbers ≥ 1, got {list(self.steps)}")


@dataclass(frozen=True)
class DrawConfig:
    times: tuple[float, float, float]  # t of the fields
    arrows: int  # a side of each field
    samples: int
    half_width: float  # of the plane that is shown

    def __post_init__(self):
        if not all(0 < t <= 1 for t in self.times):
            raise ValueError(f"times must be in (0, 1], got {list(self.times)}")
        if min(self.arrows, self.samples) < 1 or self.half_width <= 0:
            raise ValueError("arrows and samples must be ≥ 1 and half_width > 0")


@dataclass(frozen=True)
class Toy2dConfig:
    """Everything of recipes/figures/toy2d.yaml."""

    description: str
    seed: int
    mixture: tuple[tuple[float, float, float], ...]
    network: PlaneNetworkConfig
    velocity: str  # of target and tangent: marginal, the closed form, or conditional, ε − x
    objective: Objective
    train: PlaneTrainConfig
    measure: MeasureConfig
    draw: DrawConfig

    def __post_init__(self):
        if not self.mixture or any(std <= 0 for _, _, std in self.mixture):
            raise ValueError("mixture must be one or more [mean x, mean y, standard deviation > 0]")
        if self.velocity not in VELOCITIES:
            raise ValueError(f"velocity must be one of {', '.join(VELOCITIES)}, got {self.velocity!r}")
        if self.objective.teacher_decay is not None:
            raise ValueError(f"objective.kind={self.objective.kind} learns from an averaged network: not in the plane")


class PlaneNetwork(nn.Module):
    """u(z, r, t): z (B, 2), r and t (B,) → (B, 2). Times enter as t and t − r, the paper's choice (Table 1c)."""

    def __init__(self, config: PlaneNetworkConfig):
        super().__init__()
        self.register_buffer("frequencies", math.pi * 2.0 ** torch.arange(-1, config.octaves - 1))
        sizes = [2 + 4 * config.octaves, *[config.width] * config.depth]
        self.hidden = nn.ModuleList(nn.Linear(*pair) for pair in pairwise(sizes))
        self.out = nn.Linear(config.width, 2)

    def forward(self, z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        times = torch.cat([t.unsqueeze(1), (t - r).unsqueeze(1)], 1)  # (B, 2)
        angles = (times.unsqueeze(2) * self.frequencies).flatten(1)  # (B, 2·octaves)
        h = torch.cat([z, torch.sin(angles), torch.cos(angles)], 1)
        for layer in self.hidden:
            h = F.silu(layer(h))
        return self.out(h)


class Training:
    """Algorithm 1 on the mixture, a step at a time, by the kit's own objective."""

    def __init__(self, config: Toy2dConfig, mixture: Mixture):
        self.config, self.mixture = config, mixture
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(config.seed, "init"))
            self.network = PlaneNetwork(config.network)
        decay = config.train.ema
        self.ema = Ema(self.network, EmaConfig(decays=(decay,), every=1, eval=decay, store="device"))
        self.optimizer = torch.optim.Adam(
            self.network.parameters(), lr=config.train.lr, betas=config.train.betas, fused=True
        )
        self.generator: Generator = generator(config.seed, "training")

    def step(self, step: int) -> Tensor:
        """One update; the mean loss before it, detached. `step` counts from 0."""
        config = self.config
        x = self.mixture.sample(config.train.batch, self.generator)
        eps = torch.randn(x.shape, generator=self.generator, dtype=x.dtype)
        r, t = config.objective.sample_times(len(x), self.generator)
        how = {"progress": step / config.train.steps, **config.objective.sample_cond(r, t, 0, self.generator)}
        v = eps - x if config.velocity == "conditional" else self.mixture.velocity(interpolate(x, eps, t), t)
        loss = config.objective.loss(self.network, x.float(), eps.float(), r, t, v=v.float(), **how).mean
        for group in self.optimizer.param_groups:
            group["lr"] = config.train.rate(step)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.ema.update(step + 1)
        return loss.detach()

    def run(self) -> PlaneNetwork:
        """All steps; the network with its averaged weights. Raises NumericsError if the loss is not finite."""
        for step in progress_bar(range(self.config.train.steps), desc="training", unit="step"):
            loss = self.step(step)
            last = step == self.config.train.steps - 1
            if (last or step % CHECK_EVERY == 0) and not torch.isfinite(loss):
                raise NumericsError(f"the loss is not finite at step {step + 1}: a smaller train.lr may help")
        self.network.load_state_dict(self.ema.averages[self.config.train.ema], strict=False)  # buffers have none
        return self.network

    def seconds_a_step(self) -> float:
        """Measured on a few steps, after as many to warm up."""
        for number in range(2 * TIMED_STEPS):
            if number == TIMED_STEPS:
                start = time.perf_counter()
            self.step(number)
        return (time.perf_counter() - start) / TIMED_STEPS
