"""What the loop is handed: opened data, a new or resumed state, the loss, the log."""

import hashlib
import importlib.util
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
from meanflow.training.config import RunConfig, config_from_tree, refuse_changed_run
from meanflow.training.metrics import MetricsLog, rewind_metrics
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState, fresh_state, initialise, restore, to_checkpoint
from meanflow.training.step import LossFunction, configure_numerics, make_loss


@dataclass
class Training:
    """All that `meanflow.training.loop.train` works on."""

    config: RunConfig
    run: RunFolder
    ctx: DistributedContext
    state: TrainState
    stream: BatchStream
    loss: LossFunction
    gradients: GradientSum
    metrics: MetricsLog
    data: dict[str, Any]  # what the images are; see `describe`

    def snapshot(self) -> Checkpoint:
        return to_checkpoint(self.state, self.config, self.data)


def set_up(config: RunConfig, run: RunFolder, ctx: DistributedContext, requested: Collection[str] = ()) -> Training:
    """Open the data and continue from the newest intact checkpoint, or begin anew. Writes no file of the run but
    the metrics beyond that checkpoint, which it cuts off.

    requested: keys given by --set. Raises UserError where the data are not to be had or belong to another run.
    """
    configure_numerics(config.train)
    dataset = open_data(config, ctx)
    data = describe(dataset)
    state = fresh_state(config, ctx.device)
    if not resume(state, config, run, data, requested) and config.init.from_ is not None:
        initialised = initialise(state, config.init)
        log.info(initialised.summary())
        if ctx.is_main:
            initialised.write(run.path / "init.json")
    stream = BatchStream(dataset, config, ctx)
    loss = make_loss(state.network, config, ctx.device, state.ema)
    kept = config.train.compile is not None and stream.micro_steps > 1
    gradients = GradientSum(state.network, ctx, kept)
    writer = None
    if ctx.is_main:
        writer = tensorboard_writer(run.path, state.step) if config.logging.tensorboard else None
        rewind_metrics(run.metrics_file, state.step)
    metrics = MetricsLog(run.metrics_file, ctx, config.logging.flush_every, state.seconds, writer)
    return Training(config, run, ctx, state, stream, loss, gradients, metrics, data)


def open_data(config: RunConfig, ctx: DistributedContext) -> Dataset | Latents:
    """Rank 0 downloads what is missing before the others look; latents are prepared by all of them."""
    if isinstance(config.data, LatentsConfig):
        shape = (config.model.channels, config.model.image_size, config.model.image_size)
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
    """What the images are, to recognise them again: their number and the SHA-256 of their pixels or latents."""
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
    refuse_changed_run(config_from_tree(checkpoint.meta["config"], str(path)), config, str(run.path), requested)
    if checkpoint.meta["data"]["sha256"] != data["sha256"]:
        raise ConfigError(
            f"{run.path}: was trained on other images ({checkpoint.meta['data']['images']:,}, now {data['images']:,}); "
            "give the same data.path again, or another --out"
        )
    restore(state, checkpoint, str(path))
    log.info(f"continuing from step {state.step:,} ({path})")
    if state.step > config.train.steps:
        log.warning(f"train.steps is {config.train.steps:,} and {state.step:,} are done: nothing is left to train")
    return True


def tensorboard_writer(folder: Path, step: int) -> Any:
    """Events that go on after `step`. Raises ConfigError if the optional package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard is true, but the package is missing: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
