"""Detects numbers that are not finite and processes whose weights differ, and records the step that failed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from meanflow.data import batch_indices
from meanflow.errors import NumericsError
from meanflow.random import derive_seed
from meanflow.training.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder

SETTLE = 100  # norms in the running mean of the spike guard, which skips nothing before it has so many
ADVICE = (
    "Compute the step again with: bash run.sh replay {file}. Continue with a lower rate or clipping: "
    "bash run.sh resume {run} --set optim.lr={lr:g} optim.clip=1.0; or start another run with a longer "
    "optim.warmup_steps or train.precision=fp32"
)


class Guard:
    """Decides on the device which updates are skipped, so that no step waits for the host.

    From the first gradient that is not finite on, all are: when the log reads that step, up to logging.flush_every
    steps later, the weights are still those before it. With `factor`, an update whose gradient norm is above
    `factor` times the running mean is skipped too, and counted; such a norm enters the mean as that limit, so that
    the guard follows norms that have risen for good.
    """

    def __init__(self, factor: float | None, device: torch.device):
        self.factor = factor
        self.broken = torch.zeros((), device=device)
        self.mean, self.seen, self._skipped = torch.zeros(3, device=device)

    @property
    def skipped(self) -> Tensor | None:
        """Updates skipped as spikes so far, a device scalar; None without a spike guard."""
        return None if self.factor is None else self._skipped

    def judge(self, norm: Tensor) -> Tensor:
        """For the fused optimiser's `found_inf`: 1 if the update of a gradient of this norm is skipped, else 0."""
        self.broken = torch.maximum(self.broken, (~torch.isfinite(norm)).float())
        if self.factor is None:
            return self.broken
        limit, settled = self.factor * self.mean, self.seen >= SETTLE
        spike = (settled & (norm > limit)).float()
        held = torch.where(settled, torch.minimum(norm, limit), norm)
        self.mean = self.mean + (held - self.mean) / (self.seen + 1).clamp(max=SETTLE)
        self.seen, self._skipped = self.seen + 1, self._skipped + spike
        return torch.maximum(self.broken, spike)

    def numbers(self) -> list[float] | None:
        """For a checkpoint: what `restore` continues from."""
        return None if self.factor is None else torch.stack([self.mean, self.seen, self._skipped]).tolist()

    def restore(self, numbers: list[float]) -> None:
        self.mean, self.seen, self._skipped = torch.tensor(numbers, device=self.broken.device)


class NotFinite(NumericsError):
    """Step `step` (from 1) has numbers that are not finite; `what` says which."""

    def __init__(self, step: int, what: str):
        super().__init__(f"step {step}: {what}")
        self.step, self.what = step, what


@torch.no_grad()
def check(tensors: dict[str, dict[str, Tensor]], step: int, ctx: DistributedContext) -> None:
    """Check that these groups of float32 tensors are finite, and the same to the bit on every process.

    Every process must call it at the same point, with `step` steps done. Waits for the device once. Raises, on all
    of them, NotFinite for the step that would come next, or NumericsError naming the process that differs.
    """
    here, groups = ctx.device, tensors.values()  # averages may live on the host
    finite = [total(group).isfinite().long().to(here) for group in groups]
    sums = [checksum(group).to(here) if ctx.world > 1 else finite[0].new_zeros(()) for group in groups]
    mine = torch.stack([finite[0].new_tensor(step), *finite, *sums])
    table = mine.new_zeros(ctx.world, len(mine))
    table[ctx.rank] = mine
    (steps, *columns) = ctx.all_reduce(table).T.cpu().tolist()
    _same("is at another step", steps, step, ctx.world)
    for group, flags, found in zip(tensors, columns[: len(tensors)], columns[len(tensors) :], strict=True):
        if not all(flags):
            names = [name for name, x in tensors[group].items() if not x.isfinite().all()]
            such = f" (such as {names[0]}; {len(names)} of {len(tensors[group])} tensors)" if names else ""
            raise NotFinite(step + 1, f"{group} not finite{such}")
        _same(f"holds other {group}", found, step, ctx.world)


def total(group: dict[str, Tensor]) -> Tensor:
    """The sum of all numbers, finite if and only if all of them are: float64 holds any sum of float32.

    A scalar on the tensors' device. On a CPU far cheaper than `isfinite` of each number, or than their maximum.
    """
    return torch.stack([x.sum(dtype=torch.float64) for x in group.values()]).sum()


def checksum(group: dict[str, Tensor]) -> Tensor:
    """The sum of the tensors' bits as integers: exact in any order, and changed by any one bit."""
    return torch.stack([x.view(torch.int32).sum() for x in group.values()]).sum()


def _same(complaint: str, values: list[int], step: int, world: int) -> None:
    """Raises NumericsError naming the processes whose value is not the most frequent (of two, not process 0's)."""
    usual = max(values, key=lambda value: (values.count(value), value == values[0]))
    odd = [str(rank) for rank, value in enumerate(values) if value != usual]
    if odd:
        raise NumericsError(
            f"step {step}: of {world} processes, process {', '.join(odd)} {complaint}: gradients were not "
            "synchronised, its device or memory is at fault, or the run folder is not the same on all nodes"
        )


@contextmanager
def failures_explained(
    run: RunFolder, config: RunConfig, ctx: DistributedContext, snapshot: Callable[[], Checkpoint]
) -> Iterator[None]:
    """Adds to a NumericsError raised inside which checkpoint is left and what to do.

    For a step that is not finite (NotFinite) it also writes what a replay needs, from the `snapshot` of the state.
    Every process must be inside.
    """
    try:
        yield
    except NumericsError as error:
        good = list_checkpoints(run.checkpoints)
        kept = f"the last good checkpoint is {good[-1]}" if good else "there is no checkpoint yet"
        advice = ""
        if isinstance(error, NotFinite):
            file = run.failures / f"{error.step:08d}.json"
            if ctx.is_main:
                record_failure(run, config, snapshot(), error, ctx.world)
            ctx.barrier()  # a process that fails ends the others: not before the file is written
            advice = f". {ADVICE.format(file=file, run=run.path, lr=config.optim.lr / 2)}"
        raise NumericsError(f"{error}. Stopped; {kept}{advice}") from error


def record_failure(run: RunFolder, config: RunConfig, before: Checkpoint, failed: NotFinite, world: int) -> Path:
    """Write what `eval.replay` needs of the step that failed; the JSON's path.

    `before`: the weights before that step (see Guard). Raises AssetError if the disk refuses.
    """
    done = failed.step - 1
    seed, batch = config.seed, config.train.batch
    purposes = ["times", "noise", *(("posterior", "mirror") if config.data.kind == "latents" else ("augment", "flip"))]
    if config.guidance is not None:
        purposes.append("label drop")
    if config.objective.sample_cond(torch.zeros(1), torch.ones(1), config.model.classes, torch.Generator()):
        purposes.append("conditioning")
    failure = {
        "step": failed.step,
        "what": failed.what,
        "processes": world,
        "seeds": {purpose: derive_seed(seed, purpose, done) for purpose in purposes},
        "images": batch_indices(before.meta["data"]["images"], seed, done * batch, batch).tolist(),
    }
    teacher = repr(config.objective.teacher_decay)
    ema = {decay: average for decay, average in before.ema.items() if decay == teacher}
    weights = replace(before, ema=ema, optimizer={}, meta={**before.meta, "step": done, "failure": failure})
    return save_checkpoint(run.failures, failed.step, weights).with_suffix(".json")
