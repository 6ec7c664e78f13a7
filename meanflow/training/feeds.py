"""What a batch's x is made of: images that live on the device, or latents read from disk a step ahead."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from meanflow.data import Dataset, Latents, augment, batch_indices
from meanflow.random import generator
from meanflow.training.config import RunConfig

Take = Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]  # rows of the global batch → x (b, C, H, W), labels


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
        random = generator(seed, "augment", step)
        draw = augment.draw(batch, data.augment_p, data.flip, data.anisotropy, random)
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
            here, own = rows.to(self.device, non_blocking=True), (rows - mine.start).to(self.device, non_blocking=True)
            return (mean[own] + std[own] * noise[here]) * self.latents.scale, {}

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
