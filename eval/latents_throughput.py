"""`python -m eval.latents_throughput [FOLDER]`: latents per second of random access, in batches, from the page cache.

Without FOLDER a temporary set of random latents of ImageNet's shape is made and removed again. Everything is read
once before the clock starts, so the disk does not count; each round visits the whole set in a random order, with a
mirror image drawn for each, as training does.
"""

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import torch

from meanflow.data.latents import Latents, verify
from meanflow.data.prepare_latents import SHARD_IMAGES
from meanflow.data.shards import FORMAT, Plan, new_shard, write_manifest
from meanflow.errors import AssetError, run_main
from meanflow.training.run_folder import environment

SHAPE = (4, 32, 32)


def write_random_latents(folder: Path, count: int, seed: int = 0, shape: tuple[int, int, int] = SHAPE) -> None:
    """A finished preparation of `count` random latents. Raises AssetError if the disk has no room for it."""
    plan = Plan(
        format=FORMAT,
        source="folder",
        images=None,
        split="train",
        listing="random",
        files=count,
        classes=("random",),
        image_size=256,
        shape=shape,
        dtype="float16",
        scale=1.0,
        codec={"name": "random", "sha256": None},
        shard_images=SHARD_IMAGES,
    )
    needed, free = count * plan.record_bytes, shutil.disk_usage(folder).free
    if needed > 0.9 * free:
        raise AssetError(
            f"{folder}: {needed / 1e9:.1f} GB are needed, {free / 1e9:.1f} GB are free: give a smaller --n"
        )
    generator = torch.Generator().manual_seed(seed)
    for index in range(plan.shards):
        n = len(plan.numbers(index))
        with new_shard(folder, plan, index, rank=0) as shard:
            shard.add(torch.randn(n, 2, 2, *shape, generator=generator), [0] * n)
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


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.latents_throughput", description=__doc__)
    parser.add_argument("folder", nargs="?", type=Path, help="prepared latents (default: random ones, temporary)")
    parser.add_argument("--n", type=int, default=20_000, help="how many random latents, 33 KB each (20000)")
    parser.add_argument("--batch", type=int, default=256, help="latents read at once (256)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which the median counts (7)")
    args = parser.parse_args(argv)
    if min(args.n, args.batch, args.rounds) < 1:
        parser.error("--n, --batch and --rounds must be at least 1")
    with tempfile.TemporaryDirectory(prefix="latents-") as scratch:
        folder = args.folder or Path(scratch)
        if args.folder is None:
            write_random_latents(folder, args.n)
        latents = verify(folder)  # which brings all of it into the page cache
        speeds = sorted(len(latents) / time_round(latents, args.batch, seed) for seed in range(args.rounds))
    print(f"{len(latents):,} latents of {'x'.join(map(str, latents.shape))}, batch {args.batch}: {environment()}")
    print(
        f"random access from the page cache: {statistics.median(speeds):,.0f} latents/s, "
        f"median of {args.rounds} rounds ({speeds[0]:,.0f} … {speeds[-1]:,.0f})"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
