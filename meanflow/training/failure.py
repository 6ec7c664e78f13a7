"""What a run that stops for its numbers leaves behind: its last good checkpoint, and the step for a replay."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from meanflow.data import batch_indices
from meanflow.errors import NumericsError
from meanflow.random import derive_seed
from meanflow.training.checkpoint import list_checkpoints, save_checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.distributed import Processes
from meanflow.training.guard import NotFinite
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState, to_checkpoint

ADVICE = (
    "Try a smaller optim.lr, a longer optim.warmup_steps, optim.clip=1.0, or train.precision=fp32 in a new run; "
    "python -m meanflow.training.replay {file} makes the step again"
)


@contextmanager
def failures_explained(
    run: RunFolder, state: TrainState, config: RunConfig, data: dict[str, Any], processes: Processes
) -> Iterator[None]:
    """Around what may find numbers that cannot be used: adds to the error what is left and what to do.

    Writes the step for a replay where it has one (NotFinite). Every process must be inside.
    """
    try:
        yield
    except NumericsError as error:
        good = list_checkpoints(run.checkpoints)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        advice = ""
        if isinstance(error, NotFinite):
            file = run.failures / f"{error.step:08d}.json"
            if processes.is_main:
                record_failure(run, state, config, data, error, processes.world)
            processes.barrier()  # a process that fails ends the others, and the file is not written yet
            advice = f". {ADVICE.format(file=file)}"
        raise NumericsError(f"{error}. Stopped; {kept}{advice}") from error


def record_failure(
    run: RunFolder, state: TrainState, config: RunConfig, data: dict[str, Any], failed: NotFinite, world: int
) -> Path:
    """Write what `python -m meanflow.training.replay` needs of the step that failed; the JSON's path.

    The weights are those before the step (see Guard). Raises AssetError if the disk refuses.
    """
    done = failed.step - 1
    seed, batch = config.seed, config.train.batch
    purposes = ["times", "noise", *(("posterior", "mirror") if config.data.kind == "latents" else ("augment", "flip"))]
    if config.guidance is not None:
        purposes.append("label drop")
    failure = {
        "step": failed.step,
        "what": failed.what,
        "processes": world,
        "seeds": {purpose: derive_seed(seed, purpose, done) for purpose in purposes},
        "images": batch_indices(data["images"], seed, done * batch, batch).tolist(),
    }
    whole = to_checkpoint(state, config, data)
    weights = replace(whole, ema={}, optimizer={}, meta={**whole.meta, "step": done, "failure": failure})
    return save_checkpoint(run.failures, failed.step, weights).with_suffix(".json")
