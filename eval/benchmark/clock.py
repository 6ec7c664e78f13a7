"""Timing on machines that are not quiet: contenders take turns, and figures are medians over the rounds."""

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from meanflow.training.config import TrainConfig
from meanflow.training.step import configure_numerics

BF16_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}  # as /proc/cpuinfo names them: x86 twice, ARM


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Spread":
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(statistics.median(values), low, high)


def take_turns(
    contenders: dict[Hashable, Callable[[], object]], rounds: int, device: torch.device
) -> dict[Hashable, list[float]]:
    """Seconds of each contender in each of `rounds` rounds, after one call each to warm up.

    Every other round goes through them backwards, so that what drifts (clock speed, a neighbour's load) meets all
    alike and ratios can be taken round by round.
    """
    for work in contenders.values():
        work()
    seconds: dict[Hashable, list[float]] = {name: [] for name in contenders}
    for k in range(rounds):
        for name in list(contenders)[:: 1 if k % 2 == 0 else -1]:
            seconds[name].append(seconds_of(contenders[name], device))
    return seconds


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call, the device's work included."""
    wait_for(device)
    started = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - started


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ratio(a: list[float], b: list[float]) -> Spread:
    """a/b, taken within each round."""
    return Spread.of([x / y for x, y in zip(a, b, strict=True)])


def matrix_work(train: TrainConfig, device: torch.device) -> dict[str, tuple[Callable[[], object], int]]:
    """A square product and a convolution in this precision, each with its floating-point operations.

    The faster of them is the most that the device multiplies: on CPUs they come from different libraries, and either
    may be the faster one.
    """
    cuda = device.type == "cuda"
    kind = torch.bfloat16 if train.precision == "bf16" else torch.float32
    n, images, channels = (8192, 128, 256) if cuda else (1536, 4, 256)
    if kind == torch.bfloat16 and not cuda and not cpu_has_bf16():
        n, images, channels = 192, 1, 48  # emulated, a hundred times slower
    a, b = (torch.randn(n, n, device=device, dtype=kind) for _ in range(2))
    x, w = torch.randn(images, channels, 32, 32, device=device), torch.randn(channels, channels, 3, 3, device=device)
    x, w = (y.to(dtype=kind, memory_format=torch.channels_last) for y in (x, w))

    def product() -> Tensor:
        configure_numerics(train)
        return a @ b

    def convolution() -> Tensor:
        configure_numerics(train)
        return F.conv2d(x, w, padding=1)

    return {"product": (product, 2 * n**3), "convolution": (convolution, 2 * images * 32 * 32 * channels**2 * 9)}


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bfloat16 in hardware; without, autocast converts back and forth."""
    info = Path("/proc/cpuinfo")  # PyTorch 2.8 does not say it
    return info.exists() and not BF16_FLAGS.isdisjoint(info.read_text(errors="replace").split())
