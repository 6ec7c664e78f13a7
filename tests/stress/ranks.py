"""Several gloo processes on this machine, against one."""

from functools import partial
from pathlib import Path

import torch
from running import (
    assert_equal_runs,
    gradients_of_step,
    in_processes,
    newest,
    tiny_config,
    train_run,
    write_images,
)

from meanflow.errors import NumericsError
from meanflow.training import setup
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.run_folder import RunFolder
from stress.compare import curve_difference, largest_difference

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


def trained(name: str, changes: dict, ctx: DistributedContext, folder: Path) -> None:
    assert train_run(tiny_config(**changes), RunFolder(folder / name), ctx) == 0


def gradients(changes: dict, ctx: DistributedContext, folder: Path) -> dict[str, torch.Tensor]:
    return gradients_of_step(tiny_config(**changes), ctx, 1)


def truth(folder: Path, worlds: tuple[int, ...], steps: int) -> str:
    """Gradients, weights, EMAs and metrics of one global batch, on each number of processes."""
    images = str(write_images(folder / "images"))
    changes = {**LABELLED, **SMOOTH, "data__path": images, "train__steps": steps}
    found = {}
    for world in worlds:
        found[world] = in_processes(world, partial(gradients, changes), folder)
        in_processes(world, partial(trained, f"on {world}", changes), folder)
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
    changes = {**LABELLED, "data__path": images}
    end = steps * len(worlds)
    in_processes(worlds[0], partial(trained, "steady", {**changes, "train__steps": end}), folder)
    for k, world in enumerate(worlds, 1):
        in_processes(world, partial(trained, "moved", {**changes, "train__steps": k * steps}), folder)
    difference = curve_difference(folder / "steady", folder / "moved")
    assert difference < 1e-5, difference
    return f"{' → '.join(map(str, worlds))} processes, {end} steps: losses within {difference:.0e}"


class Forgetful(GradientSum):
    """A sum whose result one process gets wrong, as if it had not been synchronised."""

    def finish(self) -> None:
        super().finish()
        if torch.distributed.get_rank() == self.loser:
            torch._foreach_mul_(self.buckets, 0.5)


def drifting(changes: dict, loser: int | None, ctx: DistributedContext, folder: Path) -> str:
    """The error of a run in which process `loser` is not synchronised, or none of them is (None)."""
    if loser is None:
        setup.GradientSum = lambda network, *_: GradientSum(network, DistributedContext(0, 1, ctx.device))
    else:
        setup.GradientSum, Forgetful.loser = Forgetful, loser
    try:
        trained(f"without {loser}", changes, ctx, folder)
    except NumericsError as error:
        return str(error)
    return "nothing was noticed"


def drift(folder: Path, world: int, every: int = 5) -> str:
    """One process loses the summed gradient; then no gradient is summed at all."""
    changes = {"train__steps": 100, "train__check_every": every, "checkpoint__every": 50}
    errors = in_processes(world, partial(drifting, changes, world - 1), folder)
    expected = f"step {every}: of {world} processes, process {world - 1} holds other weights"
    assert all(error.startswith(expected) for error in errors), errors
    errors = in_processes(world, partial(drifting, changes, None), folder)
    others = ", ".join(map(str, range(1, world)))
    expected = f"step {every}: of {world} processes, process {others} holds other weights"
    assert all(error.startswith(expected) for error in errors), errors
    return f"{world} processes, checked every {every} steps: stopped at step {every}, the process named"


def repeat(folder: Path, steps: int) -> str:
    """One recipe with train.deterministic, in two separate processes."""
    images = str(write_images(folder / "images"))
    changes = {**LABELLED, "model__dropout": 0.2, "data__path": images, "train__deterministic": True}
    for name in ("one", "two"):
        in_processes(1, partial(trained, name, {**changes, "train__steps": steps}), folder)
    assert_equal_runs(folder / "one", folder / "two")
    return f"2 runs of {steps} steps, on a CPU"
