"""What a network and a step cost, counted on the meta device: nothing is computed, and no memory is taken."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from meanflow.training.batches import random_batch
from meanflow.training.config import RunConfig
from meanflow.training.state import Ema, build_network, count_parameters
from meanflow.training.step import make_loss

META = torch.device("meta")
FLOAT32_BYTES = 4
SAMPLES = 256  # memory is counted with so many images and twice as many: activations are more than gradients then
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "lift_fresh"}


@lru_cache
def forward_multiply_adds(config: RunConfig) -> int:
    """Of the network on one sample."""
    network = build_network(config, META)
    z, time = torch.zeros(1, *config.z_shape, device=META), torch.zeros(1, device=META)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(z, time, time)
    return counter.get_total_flops() // 2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of the tensors that operations inside make: `now`, those alive, and `peak`, the most so far.

    Each storage counts once. Tensors from before do not count, nor what a kernel needs for itself.
    """

    def __init__(self):
        super().__init__()
        self.storages: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = self.bound = 0  # bound: at least what is alive

    @property
    def now(self) -> int:
        self.storages = {key: pair for key, pair in self.storages.items() if not pair[0].expired()}
        self.bound = sum(size for _, size in self.storages.values())
        return self.bound

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(out):
            if isinstance(x, Tensor) and (storage := x.untyped_storage())._cdata not in given:
                self.storages[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                self.bound += storage.nbytes()
        if self.bound > self.peak:
            self.peak = max(self.peak, self.now)
        return out


class Launches(TorchDispatchMode):
    """Counts the operations inside that start a kernel: all but views and allocations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += not function.is_view and function.overloadpacket.__name__ not in ALLOCATIONS
        return function(*args, **(kwargs or {}))


@dataclass(frozen=True)
class StepMemory:
    """Bytes of an eager step. fixed: weights, gradients, Adam's moments, averages. peak: of one image's activations."""

    fixed: int
    peak: float

    def of(self, images: int) -> float:
        return self.fixed + self.peak * images


@lru_cache
def step_memory(config: RunConfig) -> StepMemory:
    """bf16 counts as float32, since meta tensors know no autocast; a compiled step needs no more than an eager one."""
    step = _step(config)

    def peak(images: int) -> int:
        with LiveBytes() as live:
            step(images)
        return live.peak

    each = (peak(2 * SAMPLES) - peak(SAMPLES)) / SAMPLES
    on_device = len(config.ema.decays) if config.ema.store == "device" else 0
    parameters = count_parameters(build_network(config, META))
    return StepMemory(parameters * FLOAT32_BYTES * (1 + 1 + 2 + on_device), each)


def step_launches(config: RunConfig, images: int) -> int:
    """Kernels that an eager forward and backward pass start."""
    step = _step(config)
    with Launches() as launches:
        step(images)
    return launches.count


def _step(config: RunConfig) -> Callable[[int], None]:
    """Forward and backward pass of a number of images."""
    config = replace(config, train=replace(config.train, precision="fp32", compile=None))
    network = build_network(config, META).train()
    ema = None if config.objective.teacher_decay is None else Ema(network, config.ema)
    loss = make_loss(network, config, META, ema)

    def step(images: int) -> None:
        network.zero_grad()
        loss(random_batch(config, images, META)).mean.backward()

    return step
