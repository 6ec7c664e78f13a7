"""Prepares training: opens the data, makes or resumes the state, the loss and the metrics log."""

import hashlib
import importlib.util
import shlex
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meanflow.data import Dataset, Latents, LatentsConfig, load_dataset, open_latents
from meanflow.data.prepare_latents import prepare
from meanflow.errors import ConfigError
from meanflow.logs import log
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import Checkpoint, load_newest
from meanflow.training.compiling import loss_of_run
from meanflow.training.config import RunConfig, config_from_tree, refuse_changed_run
from meanflow.training.metrics import MetricsLog, rewind_metrics
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.run_folder import RunFolder, starts
from meanflow.training.state import TrainState, fresh_state, initialise, refuse_missing_source, restore, to_checkpoint
from meanflow.training.step import LossFunction, configure_numerics


@dataclass
class Training:
    """Everything that `meanflow.training.loop.train` needs."""

    config: RunConfig
    run: RunFolder
    ctx: DistributedContext
    state: TrainState
    stream: BatchStream
    loss: LossFunction
    gradients: GradientSum
    metrics: MetricsLog
    data: dict[str, Any]  # see `describe`

    def snapshot(self) -> Checkpoint:
        return to_checkpoint(self.state, self.config, self.data)


def set_up(config: RunConfig, run: RunFolder, ctx: DistributedContext, requested: Collection[str] = ()) -> Training:
    """Open the data and continue from the newest intact checkpoint, or begin anew.

    requested: keys given by --set. Raises UserError where the data cannot be read or belong to another run. Files of
    the run are changed only once all of this is known to work: metrics after the checkpoint are cut off.
    """
    configure_numerics(config.train)
    if not any(run.checkpoints.glob("*.pt")):
        refuse_missing_source(config.init)
    dataset = open_data(config, ctx)
    data = describe(dataset)
    stream = BatchStream(dataset, config, ctx)
    state = fresh_state(config, ctx.device)
    resumed = resume(state, config, run, data, requested)
    initialised = None if resumed or config.init.from_ is None else initialise(state, config.init)
    loss, compiled = loss_of_run(config, state, ctx, stream.micro)
    kept = compiled and stream.micro_steps > 1
    gradients = GradientSum(state.network, ctx, kept)
    writer = tensorboard_writer(run.path, state.step) if ctx.is_main and config.logging.tensorboard else None
    if initialised is not None:
        log.info(initialised.summary())
        if ctx.is_main:
            initialised.write(run.path / "init.json")
    if ctx.is_main:
        rewind_metrics(run.metrics_file, state.step)
    metrics = MetricsLog(run.metrics_file, ctx, config.logging.flush_every, state.seconds, writer)
    return Training(config, run, ctx, state, stream, loss, gradients, metrics, data)


def open_data(config: RunConfig, ctx: DistributedContext) -> Dataset | Latents:
    """Rank 0 downloads missing data before the others open them; latents are prepared by all ranks.

    Raises UserError where the data cannot be read or do not fit the model.
    """
    if isinstance(config.data, LatentsConfig):
        shape = config.z_shape
        prepare(config.data, ctx.rank, ctx.world, ctx.device, shape=shape, classes=config.model.classes)
        ctx.barrier()
        return open_latents(Path(config.data.latents), config.data, shape)
    if not ctx.is_main:
        ctx.barrier()
    dataset = load_dataset(config.data, config.model.image_size, config.model.channels, progress=ctx.is_main)
    if ctx.is_main:
        ctx.barrier()
    return dataset


def describe(dataset: Dataset | Latents) -> dict[str, Any]:
    """Number, classes and SHA-256 (of the pixels or latents) of the images, to recognise them again."""
    if isinstance(dataset, Latents):
        digest = dataset.sha256
    else:
        digest = hashlib.sha256(dataset.images.contiguous().numpy()).hexdigest()
    return {"images": len(dataset), "classes": list(dataset.class_names), "sha256": digest}


def resume(
    state: TrainState, config: RunConfig, run: RunFolder, data: dict[str, Any], requested: Collection[str] = ()
) -> bool:
    """Continue from the newest intact checkpoint; False if there is none.

    Raises ConfigError if its run or its images were others.
    """
    newest = load_newest(run.checkpoints)
    if newest is None:
        return False
    path, checkpoint, complaints = newest
    for complaint in complaints:
        log.warning(f"{complaint}; using the one before")
    # Settings changed by an earlier start that saved no checkpoint since count as requested too.
    noted = {key for start in starts(run) for key in start.get("changed", {})}
    old = config_from_tree(checkpoint.meta["config"], str(path))
    refuse_changed_run(old, config, str(run.path), noted.union(requested))
    if checkpoint.meta["data"]["sha256"] != data["sha256"]:
        raise ConfigError(
            f"{run.path}: was trained on other images ({checkpoint.meta['data']['images']:,}, now {data['images']:,}): "
            "give the same data.path again, or another --out; --set init.from="
            f"{shlex.quote(str(run.path))} starts a new run there from these weights"
        )
    restore(state, checkpoint, str(path))
    log.info(f"continuing from step {state.step:,} ({path})")
    if state.step > config.train.steps:
        log.warning(
            f"train.steps is {config.train.steps:,}, fewer than the {state.step:,} that are done: nothing is left to "
            f"train; it is evaluated as it is (bash run.sh fid {run.path}/checkpoints/… scores an earlier checkpoint)"
        )
    return True


def tensorboard_writer(folder: Path, step: int) -> Any:
    """TensorBoard events, continued after `step`. Raises ConfigError if the optional package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard is true, but the package is missing: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
