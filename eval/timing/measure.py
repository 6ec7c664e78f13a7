"""How long samples take: each way of computing them, number of evaluations and batch, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from eval.benchmark.clock import Spread, seconds_of, take_turns
from eval.exporting.check import inputs_of
from eval.exporting.files import open_program, write
from eval.exporting.graph import Velocity
from meanflow.logs import log
from meanflow.sampling import sample
from meanflow.training.model import Model

EAGER, COMPILED, ONNX = "eager", "compiled", "ONNX Runtime"
Network = Callable[..., Tensor]  # u(z, r, t, …)


@dataclass(frozen=True)
class Plan:
    """What is timed: `modes` of EAGER, COMPILED, ONNX; in `rounds` rounds, calls of at most `limit` seconds each."""

    modes: tuple[str, ...]
    steps: tuple[int, ...]
    batches: tuple[int, ...]
    rounds: int
    limit: float


@dataclass(frozen=True)
class Latency:
    """Seconds from noise on the device to images there, of a whole batch. None: left out, it would take too long."""

    mode: str
    steps: int  # network evaluations a sample
    batch: int
    seconds: Spread | None

    @property
    def images_per_s(self) -> float | None:
        return None if self.seconds is None else self.batch / self.seconds.median


def measure(model: Model, plan: Plan) -> list[Latency]:
    """Every combination in `plan`, all in turns, so that what else the machine does meets all alike."""
    work: dict[tuple[str, int, int], Callable[[], Tensor]] = {}
    keys = [(mode, steps, batch) for mode in plan.modes for batch in plan.batches for steps in plan.steps]
    with tempfile.TemporaryDirectory() as folder:
        for mode in plan.modes:
            draw, one = _sampler(_network(model, mode, Path(folder)), model), inputs_of(model, 1)
            draw(1, **one)  # to warm up
            quick = min(seconds_of(lambda draw=draw, one=one: draw(1, **one), model.device) for _ in range(3))
            for batch in plan.batches:
                inputs = inputs_of(model, batch)
                for steps in plan.steps:
                    if quick * steps * batch <= plan.limit:  # more than it takes: a batch gains something
                        work[mode, steps, batch] = partial(draw, steps, **inputs)
        log.info(f"{model.path}: {len(work)} of {len(keys)} combinations, {plan.rounds} rounds")
        seconds = take_turns(work, plan.rounds, model.device)
    return [Latency(*key, Spread.of(seconds[key]) if key in seconds else None) for key in keys]


def _sampler(u: Network, model: Model) -> Callable[..., Tensor]:
    """draw(steps, noise, class_labels): images, decoded where the network makes latents."""

    @torch.no_grad()
    def draw(steps: int, noise: Tensor, **cond: Tensor) -> Tensor:
        z = noise.contiguous(memory_format=torch.channels_last)
        z = sample(u, z, steps, sampler=model.config.objective.sampler, **cond)
        return z if model.codec is None else model.codec.decode(z)

    return draw


def _network(model: Model, mode: str, folder: Path) -> Network:
    u = Velocity(model.network, model.guided())
    if mode == EAGER:
        return u
    if mode == COMPILED:
        return torch.compile(u)
    return _onnx_network(u, model, folder)


def _onnx_network(u: Velocity, model: Model, folder: Path) -> Network:
    """u by ONNX Runtime: `sample` calls it as it would the network."""
    inputs = inputs_of(model, 3)
    z = inputs.pop("noise")
    zero, one = torch.zeros(3, device=z.device), torch.ones(3, device=z.device)
    write("onnx", u, {"z": z, "r": zero, "t": one, **inputs}, "u", folder / "u.onnx")
    program = open_program("onnx", folder / "u.onnx", model.device)
    return lambda z, r, t, **cond: program(z, r, t, *cond.values())
