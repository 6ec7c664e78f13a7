"""The batches of a step, as a function of (seed, step) alone.

Everything random is drawn for the *global* batch and each process takes its rows, so image order, noise and (r, t)
of every sample are the same on any number of processes and in a resumed run. Only dropout masks depend on
(step, process, micro-batch).
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from meanflow.data import Dataset, Latents, augment, batch_indices
from meanflow.errors import ConfigError
from meanflow.guidance import drop_labels
from meanflow.jvp import rows_first
from meanflow.random import derive_seed, generator
from meanflow.training.config import RunConfig
from meanflow.training.processes import DistributedContext

LABELS = ("class_labels", "augment_labels")  # keywords of the network
AT_THE_END = 1 - 1e-6  # of training
Take = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # rows of the global batch → x (b, C, H, W), labels


@dataclass(frozen=True)
class MicroBatch:
    """b samples, those with r ≠ t first.

    x, eps (b, C, H, W) on the device, r, t (b,) on the CPU; cond: the network's label keywords (LABELS) and
    what the objective drew (`Objective.sample_cond`); unconditional (b,) bool on the CPU: which samples train without a
    class label, if the run has guidance; progress: the fraction of training that is done, in [0, 1).
    """

    x: Tensor
    eps: Tensor
    r: Tensor
    t: Tensor
    cond: dict[str, Tensor]
    unconditional: Tensor | None
    progress: float


class BatchStream:
    """Yields the micro-batches of any step for this process."""

    def __init__(self, dataset: Dataset | Latents, config: RunConfig, ctx: DistributedContext):
        """Raises ConfigError if the batch does not divide, or the data are not what the model takes."""
        self.config, self.ctx = config, ctx
        self.device = ctx.device
        self.local = split_batch(config, ctx.world)
        self.micro = config.train.images_at_once(self.local)
        self.feed = (LatentFeed if isinstance(dataset, Latents) else ImageFeed)(dataset, config, self.device)
        self.labels = None
        check_classes(config.model.classes, dataset.class_names)
        if config.model.classes:
            self.labels = dataset.labels.to(self.device)

    @property
    def micro_steps(self) -> int:
        return -(-self.local // self.micro)

    def micro_batches(self, step: int) -> Iterator[MicroBatch]:
        """This process's samples of step `step` (from 0), in `micro_steps` parts; seeds dropout before each."""
        seed, batch = self.config.seed, self.config.train.batch
        first = self.ctx.rank * self.local
        indices = batch_indices(len(self.feed), seed, step * batch, batch)
        take = self.feed.step(step, indices, slice(first, first + self.local))
        r, t = self.config.objective.sample_times(batch, generator(seed, "times", step))
        unconditional = None
        if self.config.guidance is not None:
            unconditional = drop_labels(r, t, self.config.guidance, generator(seed, "label drop", step))
        random = generator(seed, "noise", step, device=self.device)
        noise = torch.randn(batch, *self.config.z_shape, generator=random, device=self.device)
        classes = self.config.model.classes
        drawn = self.config.objective.sample_cond(r, t, classes, generator(seed, "conditioning", step))

        for micro, start in enumerate(range(first, first + self.local, self.micro)):
            rows = torch.arange(start, min(start + self.micro, first + self.local))
            order, _ = rows_first(r[rows] != t[rows])
            rows = rows if order is None else rows[order]
            x, cond = take(rows)
            if self.labels is not None:
                cond["class_labels"] = self.labels[indices[rows].to(self.device, non_blocking=True)]
            x, eps = (
                y.contiguous(memory_format=torch.channels_last)
                for y in (x, noise[rows.to(self.device, non_blocking=True)])
            )
            torch.manual_seed(derive_seed(seed, "dropout", step, self.ctx.rank, micro))
            mask = None if unconditional is None else unconditional[rows]
            cond |= {key: y[rows].to(self.device, non_blocking=True) for key, y in drawn.items()}
            yield MicroBatch(x, eps, r[rows], t[rows], cond, mask, step / self.config.train.steps)


def split_batch(config: RunConfig, world: int) -> int:
    """Samples of each process. Raises ConfigError if the global batch does not divide evenly."""
    if config.train.batch % world:
        raise ConfigError(
            f"train.batch {config.train.batch} does not divide by {world} processes: "
            f"use a multiple, such as --set train.batch={-(-config.train.batch // world) * world}"
        )
    return config.train.batch // world


def check_classes(classes: int, found: Sequence[str]) -> None:
    """Raises ConfigError if the model has `classes` of them and the data others."""
    if classes and not found:
        raise ConfigError(f"model.classes is {classes}, but the images have no class folders: set model.classes=0")
    if classes and len(found) != classes:
        raise ConfigError(
            f"model.classes is {classes}, but the data have {len(found)} classes: set model.classes={len(found)}"
        )


class ImageFeed:
    """Images as uint8 on the device, augmented there."""

    def __init__(self, dataset: Dataset, config: RunConfig, device: torch.device):
        self.config, self.device = config, device
        self.images = dataset.images.to(device)

    def __len__(self) -> int:
        return len(self.images)

    def step(self, step: int, indices: Tensor, mine: slice) -> Take:
        """x of step `step`, whose global batch are the images `indices` (B,); this process needs the rows `mine`."""
        data, seed, batch = self.config.data, self.config.seed, len(indices)
        draw = augment.draw(batch, data.augment_p, data.flip, data.anisotropy, generator(seed, "augment", step))
        mirror = torch.rand(batch, generator=generator(seed, "flip", step)) < 0.5

        def take(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            x = self.images[indices[rows].to(self.device, non_blocking=True)].float().div_(127.5).sub_(1)  # [−1, 1]
            if data.flip_unlabelled:
                x = torch.where(mirror[rows].to(self.device, non_blocking=True)[:, None, None, None], x.flip(-1), x)
            if not self.config.augment_labels:
                return x, {}
            x, labels = augment.apply(x, draw.select(rows))
            return x, {"augment_labels": labels}

        return take


class LatentFeed:
    """x = scale · (mean + std · noise) of the autoencoder's posterior, of the image or its mirror.

    A thread reads the next step's latents while this step computes.
    """

    def __init__(self, latents: Latents, config: RunConfig, device: torch.device):
        self.latents, self.config, self.device = latents, config, device
        self.reader, self.ahead = ThreadPoolExecutor(1), (-1, None)

    def __len__(self) -> int:
        return len(self.latents)

    def step(self, step: int, indices: Tensor, mine: slice) -> Take:
        """As `ImageFeed.step`."""
        ready, future = self.ahead
        future = future if ready == step else self._read(step, mine)
        self.ahead = (step + 1, self._read(step + 1, mine))
        mean, std = (moment.to(self.device, non_blocking=True) for moment in future.result())
        shape = (len(indices), *self.latents.shape)
        random = generator(self.config.seed, "posterior", step, device=self.device)
        noise = torch.randn(shape, generator=random, device=self.device)

        def take(rows: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            local = (rows - mine.start).to(self.device, non_blocking=True)
            rows = rows.to(self.device, non_blocking=True)
            return (mean[local] + std[local] * noise[rows]) * self.latents.scale, {}

        return take

    def _read(self, step: int, mine: slice) -> Future:
        return self.reader.submit(self._moments, step, mine)

    def _moments(self, step: int, mine: slice) -> tuple[Tensor, Tensor]:
        batch, seed = self.config.train.batch, self.config.seed
        indices = batch_indices(len(self.latents), seed, step * batch, batch)
        mirror = torch.zeros(batch, dtype=torch.bool)
        if self.config.data.flip:
            mirror = torch.rand(batch, generator=generator(seed, "mirror", step)) < 0.5
        mean, std = self.latents.read(indices[mine], mirror[mine])
        return (mean.pin_memory(), std.pin_memory()) if self.device.type == "cuda" else (mean, std)


def random_batch(config: RunConfig, size: int, device: torch.device) -> MicroBatch:
    """A micro-batch of noise images in the recipe's shapes, with its times and label inputs, at the end of training,
    where an objective with a schedule makes the passes that cost most."""
    random, shape = generator(config.seed, "probe"), (size, *config.z_shape)
    x, eps = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    x, eps = (y.contiguous(memory_format=torch.channels_last) for y in (x, eps))
    r, t = config.objective.sample_times(size, random)
    order, _ = rows_first(r != t)
    order = torch.arange(size) if order is None else order
    cond = {}
    if config.augment_labels:
        data = config.data
        draw = augment.draw(size, data.augment_p, data.flip, data.anisotropy, random)
        cond["augment_labels"] = draw.labels.to(device)
    if classes := config.model.classes:
        cond["class_labels"] = torch.randint(classes, (size,), generator=random).to(device)
    r, t, unconditional = r[order], t[order], None
    if config.guidance is not None:
        unconditional = drop_labels(r, t, config.guidance, random)
    drawn = config.objective.sample_cond(r, t, config.model.classes, random)
    cond |= {key: y.to(device) for key, y in drawn.items()}
    return MicroBatch(x, eps, r, t, cond, unconditional, AT_THE_END)
