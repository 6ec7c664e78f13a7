"""`bash run.sh report FOLDER [FOLDER …]`: one HTML page, complete in itself, by which to judge or compare runs.

A folder is a run's, or a table's (runs/tables-SCALE/NAME). Several runs are compared.
"""

import argparse
import shlex

from eval.scoring.options import Parser, add_device, add_out, check_out, count, counts, path
from meanflow.errors import run_main
from meanflow.files import write_text

STEPS, COUNT = (1, 2, 8), 36


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("report", __doc__.partition(": ")[2])
    parser.add_argument("folders", type=path, nargs="+", metavar="FOLDER", help="a run's or a table's")
    add_out(parser, "the HTML to write (report.html in the first folder)")
    parser.add_argument("--steps", type=counts, default=STEPS, help="NFEs of the sample grids (1,2,8)")
    parser.add_argument("--samples", type=count, default=COUNT, help=f"samples of each grid ({COUNT})")
    parser.add_argument("--no-samples", action="store_true", help="make no grids: quick, and needs no checkpoint")
    add_device(parser, "sample")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from eval.reports.page import Sampling, report  # here: NumPy and matplotlib take a second to import

    if args.out:
        check_out(args.out, args.overwrite)
    sampling = None if args.no_samples else Sampling(args.steps, args.samples, args.device)
    out = args.out or args.folders[0] / "report.html"
    write_text(out, report(args.folders, sampling, _command(args)))
    print(f"report of {', '.join(map(str, args.folders))} → {out}")
    return 0


def _command(args: argparse.Namespace) -> str:
    """What makes this page again."""
    words = [*map(str, args.folders), *(["--out", str(args.out), "--overwrite"] if args.out else [])]
    if args.no_samples:
        words.append("--no-samples")
    else:
        words += ["--steps", ",".join(map(str, args.steps)), "--samples", str(args.samples)]
    return shlex.join(["bash", "run.sh", "report", *words])


if __name__ == "__main__":
    raise SystemExit(run_main(main))
