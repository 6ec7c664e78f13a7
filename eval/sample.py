"""`python -m eval.sample RUN`: images from a run folder or checkpoint, as a grid, a folder of PNGs, or an npz."""

import argparse
from pathlib import Path

import torch

from eval.sampling.grid import captions, class_labels, columns_of, write
from meanflow.errors import UserError, run_main
from meanflow.logs import progress_bar
from meanflow.training.model import Model, generate, load, to_uint8
from meanflow.training.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = load(args.what, args.ema, device)
    out = args.out or _default_out(args, model)
    columns = columns_of(args.n, args.columns)
    labels = class_labels(model, args.n, args.label, columns if out.suffix == ".png" else None)
    chunks = []
    for start in progress_bar(range(0, args.n, args.batch), unit="batch", disable=args.n <= args.batch):
        stop = min(start + args.batch, args.n)
        chosen = None if labels is None else labels[start:stop]
        chunks.append(to_uint8(generate(model, start, stop, args.steps, args.seed, chosen), args.quantise).cpu())
    write(torch.cat(chunks), out, columns, captions(model, labels, columns))
    print(f"{args.n} samples, NFE {args.steps}, EMA {model.ema}, step {model.meta['step']:,}, seed {args.seed} → {out}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.sample", description=__doc__)
    parser.add_argument("what", type=Path, help="run folder or checkpoint file")
    parser.add_argument("--n", type=int, default=64, help="how many samples (64)")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations a sample, NFE (1)")
    parser.add_argument("--seed", type=int, default=0, help="sample k depends on (seed, k) alone (0)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    parser.add_argument("--label", type=int, help="the class to ask for (each in turn; in a grid, one a row)")
    parser.add_argument("--batch", type=int, default=256, help="samples at once (256)")
    parser.add_argument("--columns", type=int, help="columns of the grid (about square)")
    parser.add_argument("--quantise", choices=("round", "floor"), default="round", help="how to make uint8 (round)")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    parser.add_argument("--out", type=Path, help="FILE.png (a grid), FILE.npz (arr_0, NHWC) or a new folder of PNGs")
    args = parser.parse_args(argv)
    for name in ("n", "steps", "batch", "columns"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be ≥ 1, got {value}")
    if args.out is not None:
        _check_out(args.out)
    return args


def _check_out(out: Path) -> None:
    """Before an hour of sampling rather than after."""
    if out.suffix not in (".png", ".npz", ""):
        raise UserError(f"--out {out}: give FILE.png, FILE.npz or a folder")
    if out.is_dir() and (out.suffix or any(out.iterdir())):
        raise UserError(f"--out {out}: is a folder with something in it; name a new one")


def _default_out(args: argparse.Namespace, model: Model) -> Path:
    folder = RunFolder(args.what).samples if args.what.is_dir() else args.what.parent
    label = "" if args.label is None else f"-label{args.label}"
    return folder / f"step{model.meta['step']:08d}-nfe{args.steps}-ema{model.ema}-seed{args.seed}{label}.png"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
