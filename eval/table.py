"""A table of the paper: its finished rows scored and set beside the paper's. `bash run.sh table1a` trains them first.

Rows are run one after the other; what is done is skipped and what was stopped continues, and a row that several
tables share is one run.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from eval.tables import overhead
from eval.tables.config import SCALES, RowConfig, Run, Table, load_table
from eval.tables.plan import TFLOPS, plan
from eval.tables.results import Line, Result, measure
from eval.tables.write import write_table
from meanflow.errors import EXIT_NUMERICS, NumericsError, UserError, run_main
from meanflow.logs import log
from meanflow.training.batches import split_batch
from meanflow.training.checkpoint import checkpoint_path
from meanflow.training.config import RunConfig, load_config
from meanflow.training.processes import (
    DistributedContext,
    leaving_distributed,
    lost_ranks_explained,
    run_on_rank0,
    start_distributed,
)
from meanflow.training.run_folder import RunFolder, find_checkpoint
from meanflow.training.signals import warned_by_usr1

Job = Callable[[RunConfig, Path, DistributedContext], int]
FILES = {"table": "table.md", "numbers": "table.csv", "figure": "figure.png", "samples": "samples.png"}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.table", description=__doc__)
    parser.add_argument("tables", type=Path, nargs="+", help="YAMLs of recipes/tables/")
    parser.add_argument(
        "--scale", choices=SCALES, help="full: the paper's; gpu: one card; cpu: two cores, digits (full)"
    )
    parser.add_argument("--rows", help="only these, by number or folder (1,3 or r0,default); the table has no others")
    parser.add_argument("--seeds", help="instead of the scale's own: 0,1,2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override in every row")
    parser.add_argument("--out", type=Path, help="folder for run folders and tables (runs/tables-SCALE)")
    parser.add_argument("--dry-run", action="store_true", help="print each run's changes, size and cost, and stop")
    parser.add_argument("--tflops", type=float, help=f"of a GPU, for --dry-run ({TFLOPS:g})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    args = parser.parse_args(argv)
    if args.tflops is not None and not (args.dry_run and 0 < args.tflops < float("inf")):
        raise UserError(f"--tflops {args.tflops} must be > 0 and belongs to --dry-run")
    if args.rows and len(args.tables) > 1:
        raise UserError("--rows belongs to one table")
    return args


def main(argv: list[str] | None = None, job: Job | None = None) -> int:
    """job(recipe, run folder, context) trains one row; `run.py` passes it, which is the only one to train."""
    args = parse(argv)
    tables = load(args)
    if args.dry_run:
        if os.environ.get("RANK", "0") == "0":
            print(plan(tables, args.tflops or TFLOPS))
        return 0
    for table in tables:
        for run in table.runs if isinstance(table, Table) else ():
            split_batch(run.recipe, int(os.environ.get("WORLD_SIZE", 1)))
    codes = [0]
    with leaving_distributed():
        ctx = start_distributed(args.device)
        with warned_by_usr1(), lost_ranks_explained(ctx):
            for table in tables:
                out = args.out or Path("runs") / f"tables-{table.scale}"
                codes.append(run_table(table, out, ctx, job))
                if codes[-1] not in (0, EXIT_NUMERICS):
                    return codes[-1]
    return max(codes)


def load(args: argparse.Namespace) -> list[Table | overhead.Overhead]:
    """Raises ConfigError or UserError before anything runs."""
    tables = []
    for path in args.tables:
        if not overhead.is_one(path):
            tables.append(load_table(path, args.scale, args.rows, args.seeds, args.set))
        elif len(args.tables) == 1 and (args.rows or args.seeds):
            raise UserError(f"{path.stem} is a benchmark: it has no rows or seeds to choose")
        else:
            tables.append(overhead.load(path, args.scale, args.set))
    return tables


def run_table(table: Table | overhead.Overhead, out: Path, ctx: DistributedContext, job: Job | None) -> int:
    """Run what is missing and write the table; the exit code, not 0 where a signal stopped it or a row diverged."""
    if isinstance(table, overhead.Overhead):
        if ctx.is_main:
            log.info(overhead.run(table, out / table.name, ctx.device))
            log.info(f"\ntable     {out / table.name / 'table.md'}")
        ctx.barrier()
        return 0
    results: dict[RowConfig, list[Result]] = {}
    diverged: list[Run] = []
    for number, run in enumerate(table.runs, 1):
        log.info(f"\n{table.name}: {run.row.name}, seed {run.seed} ({number} of {len(table.runs)})")
        folder = RunFolder(out / run.folder)
        try:
            if run_on_rank0(ctx, lambda run=run, folder=folder: is_done(run, folder)):
                log.info(f"done: {folder.path}")
            elif job is None:
                raise UserError(f"{folder.path}: is not trained to its end; bash run.sh {table.name} does that")
            elif code := job(run.recipe, folder.path, ctx):
                return code
            results.setdefault(run.row, []).append(measure(table, run, folder, ctx))
        except NumericsError as error:  # a bad setting may be the very point of a row
            log.info(f"no figures of {folder.path}: {error}")
            diverged.append(run)
    if ctx.is_main and results:
        lines = [Line(row, tuple(found)) for row, found in results.items()]
        where = out / table.name
        log.info(f"\n{write_table(table, lines, diverged, where, ctx.device.type == 'cuda')}")
        log.info("\n" + "\n".join(f"{name:8}  {where / file}" for name, file in FILES.items()))
    return EXIT_NUMERICS if diverged else 0


def is_done(run: Run, folder: RunFolder) -> bool:
    """Whether this very run has come to its end: its last checkpoint is whole, and its pictures are younger."""
    last = checkpoint_path(folder.checkpoints, run.recipe.train.steps)
    pictures = (folder.path / "samples.png", folder.curves)
    if not all(file.exists() for file in (folder.config_file, last, *pictures)):
        return False
    if any(picture.stat().st_mtime < last.stat().st_mtime for picture in pictures):
        return False
    return load_config(folder.config_file) == run.recipe and find_checkpoint(folder.path)[0] == last


if __name__ == "__main__":
    raise SystemExit(run_main(main))
