"""The steps that are compared: ours in several settings, and the plain one that everything is measured against.

The plain step is Algorithm 1 written down: one full-batch `torch.func.jvp` over all samples, in the default memory
format (NCHW). Network, dropout, batch and optimiser are the same.
"""

import multiprocessing
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from meanflow.objectives.meanflow import TANGENTS, LossConfig, MeanFlowLoss, interval_first
from meanflow.jvp import Network
from meanflow.training.batches import MicroBatch
from meanflow.training.config import RunConfig, load_config
from meanflow.training.processes import GradientSum, DistributedContext
from meanflow.training.estimate import random_batch
from meanflow.training.metrics import StepSums, peak_memory_mb
from meanflow.training.state import TrainState, fresh_state
from meanflow.training.step import LossFunction, accumulate, configure_numerics, make_loss, update, velocity_of

FLOW_MATCHING, PLAIN, SEPARATE = "flow matching", "plain", "separate"
WAYS = (FLOW_MATCHING, "dual", "func", SEPARATE, PLAIN)


@dataclass(frozen=True)
class Setting:
    """What is measured: a recipe with overrides, a batch size, and one way of making its step.

    way: "flow matching" (no sample at r ≠ t), "dual" or "func" (`loss.jvp`), "separate" (u by a plain pass, du/dt
    by a `torch.func.jvp` without graph before it: the same as recomputing the forward pass) or "plain".
    """

    recipe: Path
    overrides: tuple[str, ...]
    batch: int
    way: str
    precision: str
    compile: str | None  # mode of torch.compile

    @property
    def name(self) -> str:
        return f"{self.way}, {self.precision}{f', compiled ({self.compile})' if self.compile else ''}"

    def config(self) -> RunConfig:
        """Without guidance, whose passes are no part of the derivative's cost. Raises ConfigError."""
        sets = [*self.overrides, f"train.batch={self.batch}", "train.microbatch=null"]
        sets += [f"train.precision={self.precision}", f"train.compile={self.compile or 'null'}"]
        if self.way == FLOW_MATCHING:
            sets += ["times.ratio=0"]
        if self.way in ("dual", "func"):
            sets += [f"loss.jvp={self.way}"]
        return replace(load_config(self.recipe, sets), guidance=None)


class Step:
    """One optimiser step on a fixed random batch, as the training loop makes it; call it to run it."""

    def __init__(self, setting: Setting, device: torch.device, state: TrainState | None = None):
        """`state` may be shared by all steps of one network but the plain one, which keeps its own in NCHW."""
        self.setting, self.config, self.device = setting, setting.config(), device
        self.batch = random_batch(self.config, setting.batch, device)
        self.state = state or fresh_state(self.config, device)
        self.state.network.train()
        if setting.way == PLAIN:
            self.state.network.to(memory_format=torch.contiguous_format)
            self.batch = in_default_format(self.batch)
        self.loss = self._loss(setting.compile)
        self.gradients = GradientSum(self.state.network, DistributedContext(0, 1, device))

    def _loss(self, compile: str | None) -> LossFunction:
        network, config, way = self.state.network, self.config, self.setting.way
        if way not in (PLAIN, SEPARATE):
            return make_loss(network, replace(config, train=replace(config.train, compile=compile)), self.device)
        tangent = plain_tangent if way == PLAIN else separate_tangent
        tangent = torch.compile(tangent, dynamic=False, mode=compile) if compile else tangent
        u = velocity_of(network, config.train)
        return lambda batch: plain_loss(tangent, u, batch, config.loss)

    def backward(self, loss: LossFunction | None = None) -> None:
        """Forward and backward pass alone."""
        torch.manual_seed(0)
        sums = StepSums(self.device, False)
        accumulate(loss or self.loss, [self.batch], 1, self.setting.batch, self.gradients, sums)

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


def plain_loss(tangent: Callable, u: Network, batch: MicroBatch, config: LossConfig) -> MeanFlowLoss:
    """Algorithm 1 with Eq. (22), without shortcuts; `tangent` gives (u, du/dt)."""
    x, eps, t, r = batch.x, batch.eps, batch.t.to(batch.x), batch.r.to(batch.x)
    column = (-1, *[1] * (x.ndim - 1))
    z = (1 - t.view(column)) * x + t.view(column) * eps
    v = eps - x
    dr, dt = TANGENTS[config.tangent]
    u_out, dudt = tangent(u, z, t, r, v, dt, dr, batch.cond)
    target = v - (t - r).view(column) * dudt
    squared_error = (u_out - target.detach()).square().flatten(1).sum(1)
    weight = (1 / (squared_error + config.c) ** config.p).detach()
    return MeanFlowLoss(weight * squared_error, squared_error.detach())


def plain_tangent(u, z, t, r, v, dt, dr, cond) -> tuple[Tensor, Tensor]:
    """One `torch.func.jvp` over the whole batch."""
    tangents = (v, torch.full_like(t, dt), torch.full_like(r, dr))
    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        return torch.func.jvp(lambda z, t, r: u(z, t, r, **cond), (z, t, r), tangents)


def separate_tangent(u, z, t, r, v, dt, dr, cond) -> tuple[Tensor, Tensor]:
    """du/dt of the rows with r ≠ t by a pass of its own that keeps no graph, then u."""
    rows = interval_first(t, r)[1]
    moving = {key: x[:rows] for key, x in cond.items()}
    dudt = torch.zeros_like(z)
    with torch.no_grad():
        dudt[:rows] = plain_tangent(u, z[:rows], t[:rows], r[:rows], v[:rows], dt, dr, moving)[1]
    return u(z, t, r, **cond), dudt


def peak_memory(setting: Setting, device: torch.device, steps: int = 2) -> float:
    """Peak memory in MB (10^6 bytes) of a process of its own that makes `steps` steps and nothing else.

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
