"""The training loop, top to bottom."""

import hashlib
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from meanflow.data import Dataset, Latents, LatentsConfig, load_dataset, open_latents
from meanflow.data.prepare_latents import prepare
from meanflow.errors import ConfigError
from meanflow.progress import progress_bar
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import load_newest, prune_checkpoints, save_checkpoint
from meanflow.training.config import RunConfig, config_from_tree, refuse_changed_run
from meanflow.training.distributed import GradientSum, Processes
from meanflow.training.failure import failures_explained
from meanflow.training.guard import check
from meanflow.training.init import initialise
from meanflow.training.metrics import MetricsLog, StepSums, rewind_metrics
from meanflow.training.run_folder import RunFolder
from meanflow.training.signals import EXIT_TERMINATED, StopRequest
from meanflow.training.state import TrainState, fresh_state, learning_rate, restore, to_checkpoint
from meanflow.training.step import accumulate, configure_numerics, make_loss, update

Say = Callable[[str], None]
AfterCheckpoint = Callable[[RunFolder, RunConfig, TrainState, Processes], None]


def train(
    config: RunConfig, run: RunFolder, processes: Processes, say: Say = print, evaluate: AfterCheckpoint | None = None
) -> int:
    """Train until `config.train.steps`, from the newest intact checkpoint if there is one.

    Saves on Ctrl-C, SIGTERM and SIGUSR1. `evaluate` is called every `config.eval.every` steps, on every process.
    Returns 0, or the exit code of the signal that stopped it. Raises UserError for what the user can mend.
    """
    say = say if processes.is_main else lambda line: None
    configure_numerics(config.train)
    dataset = open_data(config, processes, say)
    data = describe(dataset)
    state = fresh_state(config, processes.device)
    if not resume(state, config, run, data, say) and config.init.from_ is not None:
        taken = initialise(state, config.init)
        say(taken.summary())
        if processes.is_main:
            taken.write(run.path / "init.json")
    stream = BatchStream(dataset, config, processes)
    loss = make_loss(state.network, config, processes.device)
    kept = config.train.compile is not None and stream.micro_steps > 1
    gradients = GradientSum(state.network, processes, kept)
    if processes.is_main:
        rewind_metrics(run.metrics_file, state.step)
    wanted = config.logging.tensorboard and processes.is_main
    writer = tensorboard_writer(run.path, state.step) if wanted else None
    log = MetricsLog(run.metrics_file, processes, config.logging.flush_every, state.seconds, writer)
    state.network.train()
    total, quiet = config.train.steps, not processes.is_main
    bar = progress_bar(total=total, initial=state.step, unit="step", disable=quiet)

    def evaluation_due() -> bool:
        return bool(evaluate and config.eval.every and state.step and state.step % config.eval.every == 0)

    with failures_explained(run, state, config, data, processes):
        check(state.tensors(), state.step, processes)
    if evaluation_due():  # a run that was stopped before this step's evaluation makes it now
        evaluate(run, config, state, processes)
        state.network.train()
        log.pause()
    with StopRequest() as stop, bar:
        stopping = False
        while state.step < total and not stopping:
            sums = StepSums(processes.device, stop.requested)
            batches = stream.micro_batches(state.step)
            accumulate(loss, batches, stream.micro_steps, config.train.batch, gradients, sums)
            norm = update(state.optimizer, gradients.parameters, config.optim, state.step, state.guard)
            lr = learning_rate(config.optim, state.step)
            state.step += 1
            state.ema.update(state.step)
            images = state.step * config.train.batch
            log.record(state.step, images, config.train.batch, lr, sums, norm, state.guard.skipped)
            bar.update()

            last = state.step == total
            saving = last or state.step % config.checkpoint.every == 0
            evaluating = evaluation_due()
            asked = stop.requested and processes.world == 1  # several must agree, as they do when the log is read
            checking = state.step % config.train.check_every == 0
            if log.due or saving or evaluating or checking or asked:
                with failures_explained(run, state, config, data, processes):
                    stopping = log.flush() or asked
                    if saving or evaluating or checking or stopping:
                        check(state.tensors(), state.step, processes)
                numbers = {key: f"{log.last[key]:.4g}" for key in ("error", "images_per_s")}
                bar.set_postfix(numbers, refresh=False)
            if saving or evaluating or stopping:
                state.seconds = log.seconds
                save(run, state, config, data, log, processes)
            if evaluating and not stopping:
                evaluate(run, config, state, processes)
                state.network.train()
            if saving or evaluating:
                log.pause()
    if writer:
        writer.close()
    if processes.any(stopping or stop.requested):
        say(f"stopped and saved at step {state.step:,} of {total:,}; the same command continues")
        return stop.exit_code or EXIT_TERMINATED
    return 0


def open_data(config: RunConfig, processes: Processes, say: Say) -> Dataset | Latents:
    """The main process downloads what is missing before the others look; latents are prepared by all of them."""
    if isinstance(config.data, LatentsConfig):
        shape = (config.model.channels, config.model.image_size, config.model.image_size)
        mine = (processes.rank, processes.world, processes.device)
        prepare(config.data, *mine, say=say, shape=shape, classes=config.model.classes)
        processes.barrier()
        return open_latents(Path(config.data.latents), config.data, shape)
    if not processes.is_main:
        processes.barrier()
    dataset = load_dataset(config.data, config.model.image_size, config.model.channels, progress=processes.is_main)
    if processes.is_main:
        processes.barrier()
    return dataset


def describe(dataset: Dataset | Latents) -> dict[str, Any]:
    """What the images are, to recognise them again: their number and the SHA-256 of their pixels or latents."""
    if isinstance(dataset, Latents):
        digest = dataset.sha256
    else:
        digest = hashlib.sha256(dataset.images.contiguous().numpy()).hexdigest()
    return {"images": len(dataset), "classes": list(dataset.class_names), "sha256": digest}


def resume(state: TrainState, config: RunConfig, run: RunFolder, data: dict[str, Any], say: Say) -> bool:
    """Continue from the newest intact checkpoint; False if there is none.

    Raises ConfigError if its run or its images were others.
    """
    newest = load_newest(run.checkpoints)
    if newest is None:
        return False
    path, checkpoint, complaints = newest
    for complaint in complaints:
        say(f"warning: {complaint}; using the one before")
    refuse_changed_run(config_from_tree(checkpoint.meta["config"], str(path)), config, str(run.path))
    if checkpoint.meta["data"]["sha256"] != data["sha256"]:
        raise ConfigError(
            f"{run.path}: was trained on other images ({checkpoint.meta['data']['images']:,}, now {data['images']:,}); "
            "give the same data.path again, or another --out"
        )
    restore(state, checkpoint, str(path))
    say(f"continuing from step {state.step:,} ({path})")
    return True


def save(
    run: RunFolder, state: TrainState, config: RunConfig, data: dict[str, Any], log: MetricsLog, processes: Processes
) -> None:
    """Checkpoint on the main process; the metrics it vouches for reach the disk first."""
    if processes.is_main:
        log.sync()
        save_checkpoint(run.checkpoints, state.step, to_checkpoint(state, config, data))
        prune_checkpoints(run.checkpoints, state.step, config.checkpoint.keep, config.checkpoint.milestone_every)
    processes.barrier()


def tensorboard_writer(folder: Path, step: int) -> Any:
    """Events that go on after `step`. Raises ConfigError if the optional package is not installed."""
    if importlib.util.find_spec("tensorboard") is None:
        raise ConfigError("logging.tensorboard is true, but the package is missing: pip install tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
