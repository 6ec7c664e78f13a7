"""train.microbatch=auto: as many images at once as fit in memory; and the line that says so when they did not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from meanflow.errors import ConfigError, IncompleteError
from meanflow.logs import log
from meanflow.training.batches import split_batch
from meanflow.training.config import AUTO, RunConfig
from meanflow.training.costs import step_memory
from meanflow.training.processes import DistributedContext, gather

USABLE = {"cuda": 0.9, "cpu": 0.8}  # of the memory: the rest is for fragmentation and other programs


def with_last_microbatch(config: RunConfig, last: RunConfig | None) -> RunConfig:
    """`config` with the number of the run's last start in place of train.microbatch=auto, if there was one."""
    if config.train.microbatch != AUTO or last is None:
        return config
    return replace(config, train=replace(config.train, microbatch=last.train.microbatch))


def with_microbatch(config: RunConfig, ctx: DistributedContext) -> RunConfig:
    """`config` with a number in place of train.microbatch=auto, the same on every process.

    The batch of a process is halved until it fits, as counted by `step_memory`. Raises ConfigError if not even one
    image does.
    """
    if config.train.microbatch != AUTO:
        return config
    local = split_batch(config, ctx.world)
    size = min(gather(ctx, _fitting(config, local, ctx)))
    if size < 1:
        raise ConfigError(
            f"the memory of this {ctx.device.type.upper()} is too little for a step on one image: set "
            "train.activation_checkpointing=blocks or ema.store=host, or take a smaller network (--dry-run shows sizes)"
        )
    if size < local:
        log.info(f"train.microbatch: {size} images at once of {local} a step, as many as fit in memory")
    return replace(config, train=replace(config.train, microbatch=size))


def _fitting(config: RunConfig, local: int, ctx: DistributedContext) -> int:
    """Images that fit on this process's device: `local`, half of it, …, 1, or 0."""
    usable = usable_memory(ctx.device)
    if usable is None:
        return local
    if ctx.device.type == "cpu":
        usable /= ctx.world  # that share it
    try:
        memory = step_memory(config)
    except (RuntimeError, NotImplementedError) as error:  # your own network may read numbers, which meta tensors lack
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        log.warning(f"train.microbatch=auto: memory cannot be counted ({reason}): all {local} images are taken at once")
        return local
    parts = 1
    while parts < local and memory.of(-(-local // parts)) > usable:
        parts *= 2
    size = -(-local // parts)
    return size if memory.of(size) <= usable else 0


def usable_memory(device: torch.device) -> float | None:
    """Bytes that training may use: most of what is free on a CUDA device, or of the computer's memory. (What is free
    there changes by the minute, and a run should not depend on it.) None where it is not known."""
    memory = free_memory(device) if device.type == "cuda" else _meminfo("MemTotal")
    return None if memory is None else USABLE[device.type] * memory


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device, or available in the computer's memory; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return _meminfo("MemAvailable")


def _meminfo(name: str) -> int | None:
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), None)


@contextmanager
def out_of_memory_explained(config: RunConfig) -> Iterator[None]:
    """Raises IncompleteError, naming the settings that help, where an allocation inside fails."""
    try:
        yield
    except RuntimeError as error:  # of which torch.OutOfMemoryError is one; a CPU's has no type of its own
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        now = config.train.microbatch
        smaller = f"train.microbatch={max(1, now // 2)}" if isinstance(now, int) else "train.microbatch to a number"
        raise IncompleteError(
            f"out of memory in a training step (train.microbatch is {now}): the same command continues with --set "
            f"{smaller}, or with train.activation_checkpointing=cheap or blocks"
        ) from error
