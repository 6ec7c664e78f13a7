"""Several gloo processes on this machine, against one."""

import os
import socket
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from running import context, redirect, tiny_config, write_images

from meanflow.data import load_dataset
from meanflow.errors import NumericsError
from meanflow.training import loop
from meanflow.training.batches import BatchStream
from meanflow.training.loop import train
from meanflow.training.metrics import StepSums
from meanflow.training.processes import DistributedContext, GradientSum, start_distributed, stop_distributed
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import fresh_state
from meanflow.training.step import accumulate, make_loss
from stress.compare import assert_equal_runs, curve_difference, largest_difference, newest

LABELLED = {
    "model__channels": 3,
    "model__classes": 2,
    "model__augment_labels": 6,
    "model__multipliers": [1, 2],
    "model__attention": [4],
    "data__augment_p": 0.5,
    "data__anisotropy": "official",
    "data__flip": True,
    "data__flip_unlabelled": True,
    "optim__clip": 0.5,
    "train__batch": 16,
    "train__microbatch": 4,
    "checkpoint__every": 5,
}
# Adam divides by the gradient's size, so that rounding in a gradient near zero would become a whole step.
SMOOTH = {"optim__eps": 1.0, "optim__lr": 0.1}
Member = Callable[[DistributedContext, Path], Any]


def together(world: int, member: Member, folder: Path, seconds: float = 300) -> list[Any]:
    """What `member(processes, folder)` returns in each of `world` processes, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    players = [context.Process(target=_play, args=(rank, world, port, member, folder)) for rank in range(world)]
    for player in players:
        player.start()
    for player in players:
        player.join(seconds)
    codes = [player.exitcode for player in players]
    for player in players:
        player.kill()
    assert codes == [0] * world, f"exit codes {codes}: {(folder / 'log').read_text()[-2000:]}"
    return [torch.load(folder / f"{world}-{rank}.result", weights_only=False) for rank in range(world)]


def _play(rank: int, world: int, port: int, member: Member, folder: Path) -> None:
    torch.set_num_threads(1)
    redirect((folder / "log", folder / "log"))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    ctx = start_distributed("cpu")
    result = member(ctx, folder)
    torch.save(result, folder / f"{world}-{rank}.result")
    stop_distributed()


def trained(name: str, settings: dict, ctx: DistributedContext, folder: Path) -> None:
    run, config = RunFolder(folder / name), tiny_config(**settings)
    if ctx.is_main:
        run.open_for(config)
    assert train(config, run, ctx, lambda line: None) == 0


def gradients(settings: dict, ctx: DistributedContext, folder: Path) -> dict[str, torch.Tensor]:
    config = tiny_config(**settings)
    state = fresh_state(config, ctx.device)
    total, loss = GradientSum(state.network, ctx), make_loss(state.network, config, ctx.device)
    stream = BatchStream(load_dataset(config.data, 8, config.model.channels), config, ctx)
    sums = StepSums(ctx.device, False)
    accumulate(loss, stream.micro_batches(1), stream.micro_steps, config.train.batch, total, sums)
    return {name: p.grad.clone() for name, p in state.network.named_parameters()}


def truth(folder: Path, worlds: tuple[int, ...], steps: int) -> str:
    """Gradients, weights, EMAs and metrics of one global batch, on each number of processes."""
    images = str(write_images(folder / "images"))
    settings = {**LABELLED, **SMOOTH, "data__path": images, "train__steps": steps}
    found = {}
    for world in worlds:
        found[world] = together(world, partial(gradients, settings), folder)
        together(world, partial(trained, f"on {world}", settings), folder)
    first, *others = worlds
    errors = dict.fromkeys(("gradients", "weights", "EMAs", "loss", "gradient norm"), 0.0)
    for world in others:
        a, b = (folder / f"on {w}" for w in (first, world))
        gradient = max(largest_difference(found[first][0], other) for other in found[world])
        ema = largest_difference(newest(a).ema["0.9"], newest(b).ema["0.9"])
        weights = largest_difference(newest(a).model, newest(b).model)
        curves = curve_difference(a, b), curve_difference(a, b, "grad_norm")
        errors = dict(zip(errors, map(max, errors.values(), (gradient, weights, ema, *curves)), strict=True))
    assert max(errors["gradients"], errors["weights"], errors["EMAs"]) < 2e-6, errors
    assert max(errors["loss"], errors["gradient norm"]) < 1e-5, errors
    listed = ", ".join(f"{name} {value:.0e}" for name, value in errors.items())
    return f"{' and '.join(map(str, worlds))} processes, largest relative differences: {listed}"


def elastic(folder: Path, worlds: tuple[int, ...], steps: int) -> str:
    """One run, stopped and continued on other numbers of processes, against one that stayed on the first."""
    images = str(write_images(folder / "images"))
    settings = {**LABELLED, "data__path": images}
    end = steps * len(worlds)
    together(worlds[0], partial(trained, "steady", {**settings, "train__steps": end}), folder)
    for k, world in enumerate(worlds, 1):
        together(world, partial(trained, "moved", {**settings, "train__steps": k * steps}), folder)
    difference = curve_difference(folder / "steady", folder / "moved")
    assert difference < 1e-5, difference
    return f"{' → '.join(map(str, worlds))} processes, {end} steps: losses within {difference:.0e}"


class Forgetful(GradientSum):
    """A sum whose result one process loses: it keeps its own gradient, as without synchronisation."""

    def finish(self) -> None:
        super().finish()
        if torch.distributed.get_rank() == self.loser:
            torch._foreach_mul_(self.buckets, 0.5)


def drifting(settings: dict, loser: int | None, ctx: DistributedContext, folder: Path) -> str:
    """The error of a run whose process `loser` is not synchronised; None: none of them is."""
    if loser is None:
        loop.GradientSum = lambda network, *_: GradientSum(network, DistributedContext(0, 1, ctx.device))
    else:
        loop.GradientSum, Forgetful.loser = Forgetful, loser
    try:
        trained(f"without {loser}", settings, ctx, folder)
    except NumericsError as error:
        return str(error)
    return "nothing was noticed"


def drift(folder: Path, world: int, every: int = 5) -> str:
    """One process loses the summed gradient; then no gradient is summed at all."""
    settings = {"train__steps": 100, "train__check_every": every, "checkpoint__every": 50}
    errors = together(world, partial(drifting, settings, world - 1), folder)
    expected = f"step {every}: of {world} processes, process {world - 1} holds other weights"
    assert all(error.startswith(expected) for error in errors), errors
    errors = together(world, partial(drifting, settings, None), folder)
    others = ", ".join(map(str, range(1, world)))
    expected = f"step {every}: of {world} processes, process {others} holds other weights"
    assert all(error.startswith(expected) for error in errors), errors
    return f"{world} processes, checked every {every} steps: stopped at step {every}, the process named"


def repeat(folder: Path, steps: int) -> str:
    """Two processes of their own, one recipe with train.deterministic."""
    images = str(write_images(folder / "images"))
    changes = {**LABELLED, "model__dropout": 0.2, "data__path": images, "train__deterministic": True}
    for name in ("one", "two"):
        together(1, partial(trained, name, {**changes, "train__steps": steps}), folder)
    assert_equal_runs(folder / "one", folder / "two")
    return f"2 runs of {steps} steps, on a CPU"
