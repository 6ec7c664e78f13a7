"""`bash run.sh plot RUN [RUN …]`: curves of all that a run logged, and its scores; several runs are overlaid."""

import argparse
from pathlib import Path

from eval.scoring.options import Parser, add_out, check_out, path
from meanflow.errors import UserError, run_main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("plot", __doc__.partition(": ")[2])
    parser.add_argument("runs", type=path, nargs="+", metavar="RUN", help="run folders")
    parser.add_argument("--x", choices=("step", "images", "seconds"), default="step", help="horizontal axis (step)")
    parser.add_argument("--smooth", type=float, default=0.02, help="width of the running mean, of the run's (0.02)")
    add_out(parser, "the PNG or PDF to write (RUN/curves.png; of several RUN/curves-A-B.png, in the first)")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth must be in [0, 1), got {args.smooth}")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from eval.reports.curves import plot  # here: NumPy and matplotlib take a second to import
    from eval.reports.read import run_names
    from meanflow.training.run_folder import RunFolder

    runs = [RunFolder(folder) for folder in args.runs]
    if args.out:
        check_out(args.out, args.overwrite)
    out = args.out or default_out(runs[0].curves, list(run_names(runs).values()))
    plot(runs, out, args.x, args.smooth)
    print(f"curves of {', '.join(map(str, args.runs))} → {out}")
    return 0


def default_out(curves: Path, names: list[str]) -> Path:
    """curves.png of a single run; another name beside it for a comparison."""
    if len(names) == 1:
        return curves
    joined = "-".join(name.replace("/", "-") for name in names)
    return curves.with_name(f"{curves.stem}-{joined[:100]}{curves.suffix}")


if __name__ == "__main__":
    raise SystemExit(run_main(main))
