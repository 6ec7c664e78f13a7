"""`bash run.sh latents_throughput [FOLDER]`: latents per second of random access, from the page cache.

Without FOLDER a temporary set of random latents of ImageNet's shape is made and removed again. Everything is read
once before the clock starts, so the disk does not count; each round visits the whole set in batches, in a random order,
with a mirror image drawn for each latent.
"""

import statistics
import tempfile
from pathlib import Path

from eval.scoring.options import Parser, count, path
from meanflow.errors import run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("latents_throughput", __doc__.partition(": ")[2])
    parser.add_argument("folder", nargs="?", type=path, help="prepared latents (default: random ones, temporary)")
    parser.add_argument("--n", type=count, default=20_000, help="how many random latents, 33 KB each (20000)")
    parser.add_argument("--batch", type=count, default=256, help="latents read at once (256)")
    parser.add_argument("--rounds", type=count, default=7, help="rounds, of which the median counts (7)")
    args = parser.parse_args(argv)

    from eval.benchmark.latents import time_round, write_random_latents
    from meanflow.data.latents import verify
    from meanflow.training.run_folder import environment

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
