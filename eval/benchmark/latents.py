"""Random latents of ImageNet's shape, and how fast prepared latents are read."""

import shutil
import time
from pathlib import Path

import torch

from meanflow.data.latents import Latents
from meanflow.data.prepare_latents import SHARD_IMAGES
from meanflow.data.shards import FORMAT, Plan, new_shard, write_manifest
from meanflow.errors import AssetError

SHAPE = (4, 32, 32)


def write_random_latents(
    folder: Path, count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE, classes: int = 1
) -> None:
    """A finished preparation of `count` random latents, of each class in turn.

    Raises AssetError if the disk has no room for it.
    """
    plan = Plan(
        format=FORMAT,
        source="folder",
        images=None,
        split="train",
        listing="random",
        files=count,
        classes=tuple(f"random{k:04d}" for k in range(classes)),
        image_size=256,
        shape=shape,
        dtype="float16",
        scale=1.0,
        codec={"name": "random", "sha256": None},
        shard_images=SHARD_IMAGES,
    )
    needed, free = count * plan.record_bytes, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise AssetError(f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: set a smaller --n")
    generator = torch.Generator().manual_seed(seed)
    for index in range(plan.shards):
        numbers = plan.numbers(index)
        with new_shard(folder, plan, index, rank=0) as shard:
            latents = torch.randn(len(numbers), 2, 2, *shape, generator=generator)
            shard.add(latents, [k % classes for k in numbers])
    write_manifest(folder, plan, rank=0)


def time_round(latents: Latents, batch: int, seed: int) -> float:
    """Seconds to read all latents once, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(latents), generator=generator)
    mirror = torch.rand(len(latents), generator=generator) < 0.5
    started = time.perf_counter()
    for rows, sides in zip(order.split(batch), mirror.split(batch), strict=True):
        latents.read(rows, sides)
    return time.perf_counter() - started
