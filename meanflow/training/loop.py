"""The training loop, top to bottom."""

from collections.abc import Callable

from meanflow.logs import log, progress_bar
from meanflow.training.checkpoint import prune_checkpoints, save_checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.divergence import check, failures_explained
from meanflow.training.metrics import StepSums
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from meanflow.training.setup import Training
from meanflow.training.signals import EXIT_TERMINATED, StopRequest
from meanflow.training.state import TrainState, learning_rate
from meanflow.training.step import accumulate, update

Evaluate = Callable[[RunFolder, RunConfig, TrainState, DistributedContext], None]


def train(training: Training, evaluate: Evaluate | None = None) -> int:
    """Train until `config.train.steps`, saving on the way, and at Ctrl-C, SIGTERM and SIGUSR1.

    `evaluate` is called every `config.eval.every` steps, on every process. Returns 0, or the exit code of the signal
    that stopped it. Raises UserError for what the user can fix.
    """
    t, config, state, metrics, ctx = training, training.config, training.state, training.metrics, training.ctx
    total, every = config.train.steps, config.eval.every if evaluate else None
    state.network.train()
    with failures_explained(t.run, config, ctx, t.snapshot):
        check(state.tensors(), state.step, ctx)
    if every and state.step and state.step % every == 0:  # stopped before this step's evaluation: it is made now
        evaluate_now(training, evaluate)

    with (
        StopRequest() as stop,
        progress_bar(total=total, initial=state.step, unit="step", disable=not ctx.is_main) as bar,
    ):
        stopping = False
        while state.step < total and not stopping:
            sums = StepSums()
            accumulate(
                t.loss, t.stream.micro_batches(state.step), t.stream.micro_steps, config.train.batch, t.gradients, sums
            )
            norm = update(state.optimizer, t.gradients.parameters, config.optim, state.step, state.guard)
            lr = learning_rate(config.optim, state.step)
            state.step += 1
            state.ema.update(state.step)
            metrics.record(state.step, config.train.batch, lr, sums, norm, state.guard.skipped, stop.requested)
            bar.update()

            saving = state.step == total or state.step % config.checkpoint.every == 0
            evaluating = bool(every) and state.step % every == 0
            checking = state.step % config.train.check_every == 0
            asked = stop.requested and ctx.world == 1  # several must agree, as they do when the log is read
            if metrics.due or saving or evaluating or checking or asked:
                with failures_explained(t.run, config, ctx, t.snapshot):
                    stopping = metrics.flush() or asked
                    if saving or evaluating or checking or stopping:
                        check(state.tensors(), state.step, ctx)
                bar.set_postfix(metrics.summary(), refresh=False)
            if saving or evaluating or stopping:
                save(training)
            if evaluating and not stopping:
                evaluate_now(training, evaluate)
            if saving or evaluating:
                metrics.pause()
    metrics.close()
    if ctx.any(stopping or stop.requested):
        log.info(f"stopped and saved at step {state.step:,} of {total:,}; the same command continues")
        return stop.exit_code or EXIT_TERMINATED
    return 0


def save(training: Training) -> None:
    """Checkpoint on rank 0; the metrics it vouches for reach the disk first."""
    run, state, keeping = training.run, training.state, training.config.checkpoint
    state.seconds = training.metrics.seconds
    if training.ctx.is_main:
        training.metrics.sync()
        save_checkpoint(run.checkpoints, state.step, training.snapshot())
        prune_checkpoints(run.checkpoints, state.step, keeping.keep, keeping.milestone_every)
    training.ctx.barrier()


def evaluate_now(training: Training, evaluate: Evaluate) -> None:
    evaluate(training.run, training.config, training.state, training.ctx)
    training.state.network.train()
    training.metrics.pause()
