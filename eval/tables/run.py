"""Runs the rows of tables, one after the other, then writes the tables."""

import os
from collections.abc import Callable
from pathlib import Path

from eval.tables import overhead
from eval.tables.config import RowConfig, Run, Table, load_table
from eval.tables.results import Line, Result, measure
from eval.tables.write import write_table
from meanflow.errors import EXIT_NUMERICS, NumericsError, UserError
from meanflow.logs import log
from meanflow.training.batches import split_batch
from meanflow.training.checkpoint import checkpoint_path
from meanflow.training.config import RunConfig
from meanflow.training.microbatch import with_last_microbatch
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


def load(
    files: list[Path], scale: str | None, rows: str | None, seeds: str | None, changes: list[str]
) -> list[Table | overhead.Overhead]:
    """Raises ConfigError or UserError before anything runs."""
    tables = []
    for file in files:
        if not overhead.is_one(file):
            tables.append(load_table(file, scale, rows, seeds, changes))
        elif len(files) == 1 and (rows or seeds):
            raise UserError(f"{file.stem} is a benchmark: it has no rows or seeds to choose")
        else:
            tables.append(overhead.load(file, scale, changes))
    return tables


def run_tables(
    tables: list[Table | overhead.Overhead], out: Path | None, device: str | None, job: Job | None = None
) -> int:
    """Run what is missing of all tables; the exit code. job: None where runs may be scored, but not trained."""
    for table in tables:
        for run in table.runs if isinstance(table, Table) else ():
            split_batch(run.recipe, int(os.environ.get("WORLD_SIZE", 1)))
    codes = [0]
    with leaving_distributed():
        ctx = start_distributed(device)
        with warned_by_usr1(), lost_ranks_explained(ctx):
            for table in tables:
                codes.append(run_table(table, out or Path("runs") / f"tables-{table.scale}", ctx, job))
                if codes[-1] not in (0, EXIT_NUMERICS):
                    return codes[-1]
    return max(codes)


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
        except NumericsError as error:  # a row may be about a bad setting
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
    before = folder.config()
    return before == with_last_microbatch(run.recipe, before) and find_checkpoint(folder.path)[0] == last
