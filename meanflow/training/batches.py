"""What a step trains on, as a function of (seed, step) alone.

Everything random is drawn for the *global* batch and each process takes its rows, so image order, noise and (t, r)
of every sample are the same on any number of processes and in a resumed run. Only dropout masks belong to
(step, process, micro-batch).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from meanflow.data import Dataset, augment, batch_indices
from meanflow.errors import ConfigError
from meanflow.objective import interval_first
from meanflow.random import derive_seed, generator
from meanflow.times import sample_times
from meanflow.training.config import RunConfig
from meanflow.training.distributed import Processes


@dataclass(frozen=True)
class MicroBatch:
    """b samples, those with r ≠ t first.

    x, eps (b, C, H, W) on the device, t, r (b,) on the CPU; cond: the network's label keywords.
    """

    x: Tensor
    eps: Tensor
    t: Tensor
    r: Tensor
    cond: dict[str, Tensor]


class BatchStream:
    """Yields the micro-batches of any step for this process. The images live on the device as uint8."""

    def __init__(self, dataset: Dataset, config: RunConfig, processes: Processes):
        """Raises ConfigError if the batch does not divide, or labels are asked for that the data lacks."""
        self.config, self.processes = config, processes
        self.device = processes.device
        self.local = split_batch(config, processes.world)
        self.micro = min(config.train.microbatch or self.local, self.local)
        self.images = dataset.images.to(self.device)
        self.labels = None
        if config.model.classes:
            self.labels = _checked_labels(dataset, config.model.classes).to(self.device)

    @property
    def micro_steps(self) -> int:
        return -(-self.local // self.micro)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's share of step `step` (from 0), in `micro_steps` parts; reseeds dropout before each."""
        seed, batch = self.config.seed, self.config.train.batch
        indices = batch_indices(len(self.images), seed, step * batch, batch)
        t, r = sample_times(batch, self.config.times, generator(seed, "times", step))
        data = self.config.data
        draw = augment.draw(batch, data.augment_p, data.flip, generator(seed, "augment", step))
        shape = (batch, *self.images.shape[1:])
        noise = torch.randn(shape, generator=generator(seed, "noise", step, device=self.device), device=self.device)

        first = self.processes.rank * self.local
        for micro, start in enumerate(range(first, first + self.local, self.micro)):
            rows = torch.arange(start, min(start + self.micro, first + self.local))
            rows = rows[interval_first(t[rows], r[rows])[0]]
            x, cond = self._images(indices[rows], draw.select(rows))
            eps = noise[rows.to(self.device, non_blocking=True)].contiguous(memory_format=torch.channels_last)
            torch.manual_seed(derive_seed(seed, "dropout", step, self.processes.rank, micro))
            yield MicroBatch(x, eps, t[rows], r[rows], cond)

    def _images(self, indices: Tensor, draw: augment.AugmentDraw) -> tuple[Tensor, dict[str, Tensor]]:
        indices = indices.to(self.device, non_blocking=True)
        x = self.images[indices].float().div_(127.5).sub_(1)  # [−1, 1]
        cond = {}
        if self.config.model.augment_labels:
            x, cond["augment_labels"] = augment.apply(x, draw)
        if self.labels is not None:
            cond["class_labels"] = self.labels[indices]
        return x.contiguous(memory_format=torch.channels_last), cond


def split_batch(config: RunConfig, world: int) -> int:
    """Samples of each process. Raises ConfigError if the global batch does not divide evenly."""
    if config.train.batch % world:
        raise ConfigError(
            f"train.batch {config.train.batch} does not divide by {world} processes: "
            f"use a multiple, such as --set train.batch={-(-config.train.batch // world) * world}"
        )
    return config.train.batch // world


def _checked_labels(dataset: Dataset, classes: int) -> Tensor:
    if dataset.labels is None:
        raise ConfigError(f"model.classes is {classes}, but the images have no class folders; set it to 0")
    found = len(dataset.class_names)
    if found != classes:
        raise ConfigError(f"model.classes is {classes}, but the data has {found} classes; set model.classes={found}")
    return dataset.labels
