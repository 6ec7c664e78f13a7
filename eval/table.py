"""`bash run.sh table FILE …`: a table of the paper, its rows trained, scored and set beside the paper's.

Rows are run one after the other; finished ones are skipped, interrupted ones continue, and a row that several tables
share is one run. `bash run.sh table1a` is `bash run.sh table recipes/tables/table1a.yaml`.
"""

import argparse
import os
from collections.abc import Callable

from eval.scoring.options import Parser, add_device, add_set, path
from eval.tables import SCALES
from meanflow.errors import UserError, run_main


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("table", __doc__.partition(": ")[2])
    parser.add_argument("tables", type=path, nargs="+", metavar="FILE", help="YAMLs of recipes/tables/")
    parser.add_argument(
        "--scale", choices=SCALES, help="full: the paper's; gpu: one card; cpu: two cores, digits (the first it has)"
    )
    parser.add_argument("--rows", help="only these, by number or folder (1,3 or r0,default); the table has no others")
    parser.add_argument("--seeds", help="instead of the scale's own: 0,1,2")
    add_set(parser, "override in every row")
    parser.add_argument("--out", type=path, help="folder for run folders and tables (runs/tables-SCALE)")
    parser.add_argument("--dry-run", action="store_true", help="print each run's changes, size and cost, and stop")
    parser.add_argument("--tflops", type=float, help="of a GPU, for --dry-run (97)")
    add_device(parser)
    args = parser.parse_args(argv)
    if args.tflops is not None and not (args.dry_run and 0 < args.tflops < float("inf")):
        raise UserError(f"--tflops {args.tflops} must be > 0 and belongs to --dry-run")
    if args.rows and len(args.tables) > 1:
        raise UserError("--rows belongs to one table")
    for file in args.tables:
        if not file.is_file():
            raise UserError(f"{file}: no such file; bash run.sh lists the tables")
    return args


def main(argv: list[str] | None = None, job: Callable | None = None) -> int:
    """job(recipe, run folder, context) trains one row; `run.py` passes it, which is the only one to train."""
    args = parse(argv)
    from eval.tables.plan import plan  # here: PyTorch takes seconds to import
    from eval.tables.run import load, run_tables

    tables = load(args.tables, args.scale, args.rows, args.seeds, args.set)
    if not args.dry_run:
        return run_tables(tables, args.out, args.device, job)
    if os.environ.get("RANK", "0") == "0":
        print(plan(tables, args.tflops))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
