"""The training loop."""

from collections.abc import Callable
from functools import partial

from meanflow.errors import EXIT_TERMINATED
from meanflow.logs import log, progress_bar
from meanflow.training.checkpoint import prune_checkpoints, save_checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.divergence import check, failures_explained
from meanflow.training.metrics import StepSums
from meanflow.training.microbatch import out_of_memory_explained
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from meanflow.training.setup import Training
from meanflow.training.signals import StopRequest
from meanflow.training.state import TrainState, learning_rate
from meanflow.training.step import accumulate, update
from meanflow.training.trackers import Evaluation

# What it returns on rank 0 is shown where `logging` says.
Evaluate = Callable[[RunFolder, RunConfig, TrainState, DistributedContext], Evaluation | None]


def train(training: Training, evaluate: Evaluate | None = None) -> int:
    """Train until `config.train.steps`, saving on the way, and at Ctrl-C, SIGTERM and SIGUSR1.

    `evaluate` is called every `config.eval.every` steps, on every process. Returns 0, or the exit code of the signal
    that stopped it. Raises UserError for what the user can fix.
    """
    config, state, ctx = training.config, training.state, training.ctx
    metrics, gradients = training.metrics, training.gradients
    batch, total = config.train.batch, config.train.steps
    evaluations = config.eval.every if evaluate else None
    explained = partial(failures_explained, training.run, config, ctx, training.snapshot)

    state.network.train()
    with explained():
        check(state.tensors(), state.step, ctx)
    if due(evaluations, state.step):  # the run was stopped after this step, before its evaluation
        evaluate_now(training, evaluate)

    stopping = False
    with (
        StopRequest() as stop,
        progress_bar(total=total, initial=state.step, unit="step", disable=not ctx.is_main) as bar,
    ):
        while state.step < total and not stopping:
            sums, micro_batches = StepSums(), training.stream.micro_batches(state.step)
            with out_of_memory_explained(config):
                accumulate(training.loss, micro_batches, training.stream.micro_steps, batch, gradients, sums)
                state.ema.before_weights_change()
                norm = update(state.optimizer, gradients.parameters, config.optim, state.step, state.guard)
            lr = learning_rate(config.optim, state.step)
            state.step += 1
            state.ema.update(state.step)
            metrics.record(state.step, batch, lr, sums, norm, state.guard.skipped, stop.requested)
            bar.update()

            evaluating = due(evaluations, state.step)
            saving = evaluating or state.step == total or due(config.checkpoint.every, state.step)
            checking = saving or due(config.train.check_every, state.step)
            if checking or metrics.due:
                with explained():
                    stopping = metrics.flush()
                    if checking or stopping:
                        check(state.tensors(), state.step, ctx)
                bar.set_postfix(metrics.summary(), refresh=False)
            if saving or stopping:
                save(training)
            if evaluating and not stopping:
                evaluate_now(training, evaluate)
    if ctx.any(stopping or stop.requested):
        log.info(f"stopped and saved at step {state.step:,} of {total:,}; the same command continues")
        return stop.exit_code or EXIT_TERMINATED
    return 0


def due(every: int | None, step: int) -> bool:
    """Whether something to do every `every` steps (None: never) is due after `step` steps."""
    return every is not None and step > 0 and step % every == 0


def save(training: Training) -> None:
    """Write a checkpoint on rank 0; the metrics up to it reach the disk first."""
    run, state, keeping = training.run, training.state, training.config.checkpoint
    state.seconds = training.metrics.seconds
    if training.ctx.is_main:
        training.metrics.sync()
        save_checkpoint(run.checkpoints, state.step, training.snapshot())
        prune_checkpoints(run.checkpoints, state.step, keeping.keep, keeping.milestone_every)
    training.ctx.barrier()
    training.metrics.pause()


def evaluate_now(training: Training, evaluate: Evaluate) -> None:
    found = evaluate(training.run, training.config, training.state, training.ctx)
    if found is not None:
        training.metrics.show(training.state.step, found)
    training.state.network.train()
    training.metrics.pause()
