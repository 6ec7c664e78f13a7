"""What a step trains on, as a function of (seed, step) alone.

Everything random is drawn for the *global* batch and each process takes its rows, so image order, noise and (t, r)
of every sample are the same on any number of processes and in a resumed run. Only dropout masks belong to
(step, process, micro-batch).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meanflow.data import Dataset, Latents, batch_indices
from meanflow.errors import ConfigError
from meanflow.guidance import drop_labels
from meanflow.objective import interval_first
from meanflow.random import derive_seed, generator
from meanflow.times import sample_times
from meanflow.training.config import RunConfig
from meanflow.training.distributed import Processes
from meanflow.training.feeds import ImageFeed, LatentFeed


@dataclass(frozen=True)
class MicroBatch:
    """b samples, those with r ≠ t first.

    x, eps (b, C, H, W) on the device, t, r (b,) on the CPU; cond: the network's label keywords; dropped (b,) bool on
    the CPU: who trains without a class label, where guidance asks for it.
    """

    x: Tensor
    eps: Tensor
    t: Tensor
    r: Tensor
    cond: dict[str, Tensor]
    dropped: Tensor | None


class BatchStream:
    """Yields the micro-batches of any step for this process."""

    def __init__(self, dataset: Dataset | Latents, config: RunConfig, processes: Processes):
        """Raises ConfigError if the batch does not divide, or the data are not what the model takes."""
        self.config, self.processes = config, processes
        self.device = processes.device
        self.local = split_batch(config, processes.world)
        self.micro = min(config.train.microbatch or self.local, self.local)
        self.feed = (LatentFeed if isinstance(dataset, Latents) else ImageFeed)(dataset, config, self.device)
        self.labels = None
        if config.model.classes:
            self.labels = _checked_labels(dataset, config.model.classes).to(self.device)

    @property
    def micro_steps(self) -> int:
        return -(-self.local // self.micro)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's share of step `step` (from 0), in `micro_steps` parts; reseeds dropout before each."""
        seed, batch, model = self.config.seed, self.config.train.batch, self.config.model
        first = self.processes.rank * self.local
        indices = batch_indices(len(self.feed), seed, step * batch, batch)
        take = self.feed.step(step, indices, slice(first, first + self.local))
        t, r = sample_times(batch, self.config.times, generator(seed, "times", step))
        dropped = None
        if self.config.guidance is not None:
            dropped = drop_labels(t, r, self.config.guidance, generator(seed, "label drop", step))
        shape = (batch, model.channels, model.image_size, model.image_size)
        noise = torch.randn(shape, generator=generator(seed, "noise", step, device=self.device), device=self.device)

        for micro, start in enumerate(range(first, first + self.local, self.micro)):
            rows = torch.arange(start, min(start + self.micro, first + self.local))
            rows = rows[interval_first(t[rows], r[rows])[0]]
            x, cond = take(rows)
            if self.labels is not None:
                cond["class_labels"] = self.labels[indices[rows].to(self.device, non_blocking=True)]
            x, eps = (
                y.contiguous(memory_format=torch.channels_last)
                for y in (x, noise[rows.to(self.device, non_blocking=True)])
            )
            torch.manual_seed(derive_seed(seed, "dropout", step, self.processes.rank, micro))
            yield MicroBatch(x, eps, t[rows], r[rows], cond, None if dropped is None else dropped[rows])


def split_batch(config: RunConfig, world: int) -> int:
    """Samples of each process. Raises ConfigError if the global batch does not divide evenly."""
    if config.train.batch % world:
        raise ConfigError(
            f"train.batch {config.train.batch} does not divide by {world} processes: "
            f"use a multiple, such as --set train.batch={-(-config.train.batch // world) * world}"
        )
    return config.train.batch // world


def _checked_labels(dataset: Dataset | Latents, classes: int) -> Tensor:
    if dataset.labels is None:
        raise ConfigError(f"model.classes is {classes}, but the images have no class folders; set it to 0")
    found = len(dataset.class_names)
    if found != classes:
        raise ConfigError(f"model.classes is {classes}, but the data has {found} classes; set model.classes={found}")
    return dataset.labels
