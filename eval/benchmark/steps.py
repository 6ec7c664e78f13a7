"""The steps that are compared: ours in several settings, and the plain one that everything is measured against.

The plain step is the objective's specification (`Objective.plain`), such as one `torch.func.jvp` of the whole batch, in
the default memory format (NCHW). Network, dropout, batch and optimiser are the same.
"""

import functools
import multiprocessing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from eval.benchmark import FLOW_MATCHING, PLAIN, SEPARATE
from meanflow.jvp import func_jvp, value_and_jvp
from meanflow.objectives import Loss
from meanflow.training.batches import MicroBatch, random_batch
from meanflow.training.config import RunConfig, load_config
from meanflow.training.metrics import StepSums, peak_memory_mb
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.state import TrainState, fresh_state
from meanflow.training.step import (
    LossFunction,
    accumulate,
    configure_numerics,
    in_training_precision,
    make_loss,
    update,
)

WAYS = (FLOW_MATCHING, "dual", "func", SEPARATE, PLAIN)


@dataclass(frozen=True)
class Setting:
    """What is measured: a recipe with overrides, a batch size, and one way of making its step.

    way: "flow matching" (r := t in every sample), "dual" or "func" (`train.jvp`), "separate" (u by a plain pass, du/dt
    by a `torch.func.jvp` without graph before it) or "plain".
    """

    recipe: Path
    overrides: tuple[str, ...]
    batch: int
    way: str
    precision: str
    compile: str | None  # mode of torch.compile
    label: str = ""  # tells it from the steps of another recipe

    @property
    def name(self) -> str:
        return f"{self.label}{self.way}, {self.precision}{f', compiled ({self.compile})' if self.compile else ''}"

    def config(self) -> RunConfig:
        """Without guidance, whose passes are no part of the derivative's cost. Raises ConfigError."""
        sets = [*self.overrides, f"train.batch={self.batch}", "train.microbatch=null"]
        sets += [f"train.precision={self.precision}", f"train.compile={self.compile or 'null'}"]
        if self.way in ("dual", "func"):
            sets += [f"train.jvp={self.way}"]
        return replace(load_config(self.recipe, sets), guidance=None)


class Step:
    """One optimiser step on a fixed random batch, as the training loop makes it; call it to run it."""

    def __init__(
        self,
        setting: Setting,
        device: torch.device,
        state: TrainState | None = None,
        ctx: DistributedContext | None = None,
    ):
        """`state` may be shared by all steps of one network but the plain one, which needs another in NCHW.

        ctx: the processes that make the step together, each with a batch of its own; by default this one alone.
        """
        self.setting, self.config, self.device = setting, setting.config(), device
        self.batch = random_batch(self.config, setting.batch, device)
        if setting.way == FLOW_MATCHING:
            self.batch = replace(self.batch, r=self.batch.t)
        self.state = state or fresh_state(self.config, device)
        self.state.network.train()
        if setting.way == PLAIN:
            self.state.network.to(memory_format=torch.contiguous_format)
            self.batch = in_default_format(self.batch)
        self.loss = self._loss(setting.compile)
        self.gradients = GradientSum(self.state.network, ctx or DistributedContext(0, 1, device))

    def _loss(self, compile: str | None) -> LossFunction:
        network, config, way = self.state.network, self.config, self.setting.way
        if way not in (PLAIN, SEPARATE):
            config = replace(config, train=replace(config.train, compile=compile))
            return make_loss(network, config, self.device, self.state.ema)
        u, objective = in_training_precision(network, config.train), config.objective
        if way == SEPARATE:
            take = torch.compile(separate_jvp, dynamic=False, mode=compile) if compile else separate_jvp
            jvp = functools.partial(value_and_jvp, take=take)
            return lambda b: objective.loss(u, b.x, b.eps, b.r, b.t, jvp=jvp, **b.cond)
        plain = torch.compile(objective.plain, dynamic=False, mode=compile) if compile else objective.plain
        return lambda b: Loss(plain(u, b.x, b.eps, b.r, b.t, **b.cond))

    def backward(self, loss: LossFunction | None = None) -> None:
        """Forward and backward pass alone."""
        torch.manual_seed(0)
        accumulate(loss or self.loss, [self.batch], 1, self.setting.batch, self.gradients, StepSums())

    def __call__(self) -> Tensor:
        configure_numerics(self.config.train)
        self.backward()
        return update(self.state.optimizer, self.gradients.parameters, self.config.optim, 0, self.state.guard)

    def flops(self) -> int:
        """Multiplications and additions of matrix products and convolutions, forward and backward (run eagerly)."""
        with FlopCounterMode(display=False) as counter:
            self.backward(self._loss(compile=None))
        return counter.get_total_flops()


def in_default_format(batch: MicroBatch) -> MicroBatch:
    return replace(batch, x=batch.x.contiguous(), eps=batch.eps.contiguous())


def separate_jvp(u, z, r, t, tangents, cond) -> tuple[Tensor, Tensor]:
    """du/dt of the first rows by a separate pass that keeps no graph, then u."""
    n = len(tangents[0])
    with torch.no_grad():
        first = {key: y[:n] if isinstance(y, Tensor) else y for key, y in cond.items()}
        tangent = func_jvp(u, z[:n], r[:n], t[:n], tangents, first)[1]
    return u(z, r, t, **cond), tangent


def peak_memory(setting: Setting, device: torch.device, steps: int = 2) -> float:
    """Peak memory in MB (10^6 bytes) of a separate process that makes `steps` steps and nothing else.

    Allocated on the device on CUDA; resident on a CPU, the interpreter and PyTorch included.
    """
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak_memory_here, (setting, str(device), steps, torch.get_num_threads()))


def _peak_memory_here(setting: Setting, device: str, steps: int, threads: int) -> float:
    torch.set_num_threads(threads)
    step = Step(setting, torch.device(device))
    for k in range(steps):
        if k == 1 and step.device.type == "cuda":  # the first step's peak is that of cuDNN's search
            torch.cuda.reset_peak_memory_stats(step.device)
        step()
    return peak_memory_mb(torch.device(device))
