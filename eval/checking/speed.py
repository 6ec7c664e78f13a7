"""Which settings train fastest here: one choice after the other, each with the best of those before it."""

import statistics
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace

import torch

from eval.benchmark.clock import matrix_work, seconds_of
from eval.benchmark.steps import Setting, Step
from eval.checking.report import NOT_RUN, OK, Finding, Report, failure
from meanflow.training.config import CHECKPOINTING, RunConfig, TrainConfig
from meanflow.training.costs import LiveBytes
from meanflow.training.metrics import peak_memory_mb

PRECISION, COMPILE, KEPT = "train.precision", "train.compile", "train.activation_checkpointing"
ROUNDS = 3
ENOUGH = 6.0  # seconds of timed steps after which a slow machine does no further rounds
MATRIX_ROUNDS = 5
SMALLEST_GAIN = 1.02  # a setting that is no faster than this over a simpler one is not recommended


@dataclass(frozen=True)
class Speed:
    """How fast a step is with some settings. memory_mb: peak on a GPU; on a CPU that of the step's tensors."""

    settings: dict[str, str]
    images_per_s: float
    memory_mb: float
    of_matrix_rate: float


def search(
    setting: Setting, choices: dict[str, tuple[str, ...]], device: torch.device, report: Report, found: list[Speed]
) -> Iterator[Finding]:
    """One finding for each step that is timed. `found` is filled: fastest settings last.

    choices: {dotted setting: values}, the simplest value first. Every value of a setting is tried with the best
    values of the settings before it; those after it have their first value.
    """
    rates: dict[str, float] = {}
    best = None
    chosen = {name: values[0] for name, values in choices.items()}
    for name, values in choices.items():
        for value in values:
            settings = chosen | {name: value}
            if name == COMPILE and value != "null":
                settings[KEPT] = "null"  # compiled code decides by itself what to compute again
            if best is not None and settings == best.settings:
                continue
            label = " ".join(f"{key.rpartition('.')[2]}={text}" for key, text in settings.items())
            if report.over:
                yield Finding(label, NOT_RUN, f"the {report.seconds:.0f} s for this check were over (--seconds)")
                continue
            try:
                speed = _measure(setting, settings, device, rates)
            except Exception as error:  # out of memory, a compiler's failure: the others may work
                yield failure(label, error)
                continue
            kind = "peak" if device.type == "cuda" else "of tensors"
            yield Finding(
                label,
                OK,
                f"{speed.images_per_s:.3g} images/s, {speed.memory_mb:,.0f} MB {kind}, "
                f"{speed.of_matrix_rate:.0%} of the matrix rate",
            )
            if best is None or speed.images_per_s > SMALLEST_GAIN * best.images_per_s:
                best, chosen = speed, settings
                found.append(speed)
    report.numbers["matrix_rates"] = rates


def choices(config: RunConfig, precisions: tuple[str, ...], modes: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """What is tried for a recipe, in the order of `search`."""
    found = {PRECISION: precisions, KEPT: ("null", *CHECKPOINTING)}
    if hasattr(config.model, "resampling"):
        found["model.resampling"] = ("conv", "matmul")
    return found | {COMPILE: ("null", *modes)}  # last, since it takes longest


def changed(setting: Setting, settings: dict[str, str]) -> Setting:
    """`setting` with dotted settings of a recipe, two of which have fields of their own."""
    others = tuple(f"{key}={value}" for key, value in settings.items() if key not in (PRECISION, COMPILE))
    mode = None if settings[COMPILE] == "null" else settings[COMPILE]
    return replace(setting, overrides=(*setting.overrides, *others), precision=settings[PRECISION], compile=mode)


def _measure(setting: Setting, settings: dict[str, str], device: torch.device, rates: dict[str, float]) -> Speed:
    setting, precision = changed(setting, settings), settings[PRECISION]
    if precision not in rates:
        rates[precision] = matrix_rate(setting.config().train, device)
    step = Step(setting, device)
    with LiveBytes() if device.type == "cpu" else nullcontext() as live:
        step()  # warms up; on CUDA its peak is that of cuDNN's search
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    rounds: list[float] = []
    while len(rounds) < ROUNDS and sum(rounds) < ENOUGH:
        rounds.append(seconds_of(step, device))
    seconds = statistics.median(rounds)
    memory = live.peak / 1e6 if device.type == "cpu" else peak_memory_mb(device)
    rate = step.flops() / seconds / rates[precision]
    torch.compiler.reset()  # which would keep the step's memory
    return Speed(settings, setting.batch / seconds, memory, rate)


def matrix_rate(train: TrainConfig, device: torch.device) -> float:
    """FLOP/s of the faster of a matrix product and a convolution."""
    best = 0.0
    for work, flops in matrix_work(train, device).values():
        work()
        best = max(best, flops / min(seconds_of(work, device) for _ in range(MATRIX_ROUNDS)))
    return best


def numbers(found: list[Speed]) -> list[dict]:
    return [asdict(speed) for speed in found]
