"""`bash run.sh latents_throughput [FOLDER]`: latents per second of random access, from the page cache.

Without FOLDER a temporary set of random latents of ImageNet's shape is made and removed again. Everything is read
once before the clock starts, so the disk does not count; each round visits the whole set in batches, in a random order,
with a mirror image drawn for each latent.
"""

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from meanflow.errors import run_main


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from eval.benchmark.latents import time_round, write_random_latents
    from meanflow.data.latents import verify
    from meanflow.training.run_folder import environment

    with tempfile.TemporaryDirectory(prefix="latents-") as scratch:
        folder = Path(os.path.expanduser(args.folder or scratch))
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


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bash run.sh latents_throughput", description=__doc__)
    parser.add_argument("folder", nargs="?", help="prepared latents (default: random ones, temporary)")
    parser.add_argument("--n", type=int, default=20_000, help="how many random latents, 33 KB each (20000)")
    parser.add_argument("--batch", type=int, default=256, help="latents read at once (256)")
    parser.add_argument("--rounds", type=int, default=7, help="rounds, of which the median counts (7)")
    args = parser.parse_args(argv)
    if min(args.n, args.batch, args.rounds) < 1:
        parser.error("--n, --batch and --rounds must be at least 1")
    return args


if __name__ == "__main__":
    raise SystemExit(run_main(main))
