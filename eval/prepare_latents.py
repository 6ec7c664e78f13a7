"""`bash run.sh prepare_latents --images DIR --out DIR`: images → latents on disk, for the latent recipes.

Interrupted, the same command continues. All GPUs of the node take part; `torchrun … run.py prepare_latents` also
divides the work over nodes. `--verify DIR` compares the checksums of finished latents instead.
"""

import argparse
import os

from eval.scoring.options import Parser, add_device, count, path
from meanflow.errors import UserError, run_main


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch

    from meanflow.data.latents import LatentsConfig, verify
    from meanflow.data.prepare_latents import prepare
    from meanflow.logs import log
    from meanflow.training.model import device_of

    rank, local = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))  # set by torchrun
    world = int(os.environ.get("WORLD_SIZE", 1))
    if args.verify:
        if rank == 0:
            log.info(f"{args.verify}: {len(verify(args.verify)):,} latents, intact")
        return 0
    config = LatentsConfig(
        kind="latents", latents=args.out, vae=args.vae, image_size=args.size, images=args.images, split=args.split
    )
    device = device_of(args.device)
    device = torch.device("cuda", local) if device.type == "cuda" else device
    sizes = {"batch": args.batch, "shard_images": args.shard}
    given = {name: value for name, value in sizes.items() if value is not None}
    if not prepare(config, rank, world, device, args.skip_broken, **given):
        log.info(f"{args.out}: all latents are there already; --verify compares their checksums")
    return 0


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("prepare_latents", __doc__.partition(": ")[2])
    parser.add_argument("--images", help="folder, zip or tar of class folders of images")
    parser.add_argument("--out", help="folder for the latents")
    parser.add_argument("--vae", default="stabilityai/sd-vae-ft-mse", help="hub name or folder (sd-vae-ft-mse)")
    parser.add_argument("--size", type=count, default=256, help="pixels a side after ADM's centre crop (256)")
    parser.add_argument("--split", choices=("train", "test"), default="train", help="where it has both (train)")
    parser.add_argument("--batch", type=count, help="images encoded at once; fewer take less memory")
    parser.add_argument("--shard", type=count, help="images a shard, in a new folder")
    parser.add_argument("--skip-broken", action="store_true", help="leave out unreadable images and list them")
    add_device(parser, "encode")
    parser.add_argument("--verify", type=path, metavar="DIR", help="compare the checksums of finished latents and stop")
    args = parser.parse_args(argv)
    if not args.verify and not (args.images and args.out and args.vae):
        raise UserError("--images, --out and --vae are needed, or --verify alone")
    return args


if __name__ == "__main__":
    raise SystemExit(run_main(main))
