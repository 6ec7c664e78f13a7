"""`bash run.sh sample RUN`: images from a run, checkpoint or shared model, as a grid, a folder of PNGs, or an npz."""

import argparse
import sys
from pathlib import Path

from eval.scoring.options import RUN, Parser, add_device, add_guidance, count, grid, guidance_name, path, steps_name
from meanflow.errors import UserError, run_main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("sample", __doc__)
    parser.add_argument("what", type=path, metavar="RUN", help=RUN)
    parser.add_argument("--n", type=count, default=64, help="how many samples (64)")
    times = parser.add_mutually_exclusive_group()
    times.add_argument("--steps", type=count, default=1, help="network evaluations a sample, NFE (1)")
    times.add_argument("--grid", type=grid, help="times from 1 to 0 in their place, such as 1,0.6,0")
    parser.add_argument("--seed", type=int, default=0, help="sample k depends on (seed, k) alone (0)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    parser.add_argument("--label", type=int, help="the class to ask for (each in turn; in a grid, one a row)")
    parser.add_argument("--batch", type=count, default=256, help="samples at once (256)")
    parser.add_argument("--columns", type=count, help="columns of the grid (about square)")
    parser.add_argument("--quantise", choices=("round", "floor"), help="how to make uint8 (the recipe's sample.uint8)")
    add_guidance(parser)
    add_device(parser)
    names = "FILE.png (a grid), FILE.npz (arr_0, NHWC, and labels) or a new folder of PNGs"
    parser.add_argument("--out", type=path, help=f"{names} (RUN/samples/)")
    args = parser.parse_args(argv)
    out = args.out
    if out is not None and out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: give FILE.png, FILE.npz or a folder")
    if out is not None and out.is_dir() and (out.suffix or any(out.iterdir())):
        raise UserError(f"--out {out}: is a folder with something in it; name a new one")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    import torch

    from eval.sampling.grid import captions, class_labels, columns_of, write
    from meanflow.files import make_folder
    from meanflow.logs import progress_bar
    from meanflow.training.model import generate, load, to_uint8

    model = load(args.what, args.ema, args.device)
    guidance = model.guided(args.guidance, args.interval)
    times = steps_name(args.steps, args.grid)
    out = args.out or _default_out(args, model, times, guidance)
    make_folder(out if not out.suffix else out.parent)  # better known before an hour of sampling than after
    columns = columns_of(args.n, args.columns)
    labels = class_labels(model, args.n, args.label, columns if out.suffix == ".png" else None)
    rule, chunks = args.quantise or model.config.sample.uint8, []
    for start in progress_bar(range(0, args.n, args.batch), unit="batch", disable=args.n <= args.batch):
        stop = min(start + args.batch, args.n)
        chosen = None if labels is None else labels[start:stop]
        images = generate(model, start, stop, args.steps, args.seed, chosen, args.grid, guidance)
        chunks.append(to_uint8(images, rule).cpu())
    write(torch.cat(chunks), out, columns, captions(model, labels, columns), labels)
    guided = "" if guidance is None else f"guidance {guidance}, "
    nfe, step = times.removeprefix("nfe"), model.meta["step"]
    print(f"{args.n} samples, NFE {nfe}, {guided}EMA {model.ema}, step {step:,}, seed {args.seed} → {out}")
    return 0


def _default_out(args: argparse.Namespace, model, times: str, guidance) -> Path:
    folder = args.what / "samples" if args.what.is_dir() else args.what.parent
    if not args.what.exists():  # a name on the hub: owner/ is no folder here
        folder = Path(args.what.name)
    label = "" if args.label is None else f"-label{args.label}"
    label += "" if guidance is None else guidance_name(guidance.omega, guidance.interval)
    return folder / f"step{model.meta['step']:08d}-{times}-ema{model.ema}-seed{args.seed}{label}.png"


if __name__ == "__main__":
    sys.exit(run_main(main))
