"""How long samples take: each way of computing them, number of evaluations and batch, in turns."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.benchmark.clock import Spread, seconds_of, take_turns
from eval.exporting.check import inputs_of
from eval.exporting.files import open_program, write
from eval.exporting.graph import Velocity
from meanflow.data.codec import Codec
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
    """Every combination in `plan`, medians over its rounds."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for mode in plan.modes:
            draw = _sampler(_network(model, mode, Path(folder)), model.codec)
            found += _measure_mode(mode, draw, model, plan)
    return found


def _measure_mode(mode: str, draw: Callable, model: Model, plan: Plan) -> list[Latency]:
    work, kept = {}, []
    one = inputs_of(model, 1)
    draw(1, **one)  # to warm up
    quick = seconds_of(lambda: draw(1, **one), model.device)
    for batch in plan.batches:
        inputs = inputs_of(model, batch)
        for steps in plan.steps:
            kept.append((steps, batch))
            if quick * steps * batch <= plan.limit:
                work[steps, batch] = lambda steps=steps, inputs=inputs: draw(steps, **inputs)
    log.info(f"{model.path}: {mode}, {len(work)} of {len(kept)} combinations")
    seconds = take_turns(work, plan.rounds, model.device) if work else {}
    return [Latency(mode, *key, Spread.of(seconds[key]) if key in seconds else None) for key in kept]


def _sampler(network: Network, codec: Codec | None) -> Callable[..., Tensor]:
    """draw(steps, noise, class_labels): images, decoded where the network makes latents."""

    @torch.no_grad()
    def draw(steps: int, noise: Tensor, **cond: Tensor) -> Tensor:
        z = noise.contiguous(memory_format=torch.channels_last)
        z = sample(network, z, steps, **cond)
        return z if codec is None else codec.decode(z)

    return draw


def _network(model: Model, mode: str, folder: Path) -> Network:
    if mode == EAGER:
        return model.network
    if mode == COMPILED:
        return torch.compile(model.network)
    return _onnx_network(model, folder)


def _onnx_network(model: Model, folder: Path) -> Network:
    """u by ONNX Runtime: `sample` calls it as it would the network."""
    inputs = inputs_of(model, 3)
    z = inputs.pop("noise")
    zero, one = torch.zeros(3, device=z.device), torch.ones(3, device=z.device)
    write("onnx", Velocity(model.network), {"z": z, "r": zero, "t": one, **inputs}, "u", folder / "u.onnx")
    program = open_program("onnx", folder / "u.onnx", model.device)
    return lambda z, r, t, **cond: program(z, r, t, *cond.values())
