"""`python -m eval.table recipes/tables/NAME.yaml`: several runs of one recipe that differ in a few settings, compared.

Rows are run one after the other; what is done is skipped and what was stopped continues. `run.sh NAME` calls it.
"""

import argparse
import csv
import io
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from PIL import Image

from eval.agreement import Agreement, agreement, agreement_file
from eval.files import read_json, write_json
from eval.generate import load_model
from eval.processes import on_main
from eval.run import job
from eval.score import score_run
from meanflow.errors import ConfigError, UserError, run_main, write_errors_named
from meanflow.training import settings
from meanflow.training.batches import split_batch
from meanflow.training.config import RunConfig, load_config
from meanflow.training.distributed import Processes, start_processes, stop_processes
from meanflow.training.estimate import estimate
from meanflow.training.run_folder import RunFolder

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
AGREEMENT_STEPS = 1
Row = tuple["RowConfig", RunConfig]


@dataclass(frozen=True)
class RowConfig:
    """One row: its name in the table, its run folder's name, and `key.path=value` changes to the base recipe."""

    name: str
    folder: str
    set: tuple[str, ...]

    def __post_init__(self):
        if not self.folder or Path(self.folder).name != self.folder:
            raise ValueError(f"folder must be a plain name, got {self.folder!r}")


@dataclass(frozen=True)
class TableConfig:
    """What a table compares, and by what besides the distance."""

    description: str
    question: str  # that it answers
    base: str  # a recipe's name
    agreement: bool  # also judge whether samples show the class asked for (small images; see eval/agreement.py)
    rows: tuple[RowConfig, ...]

    def __post_init__(self):
        folders = [row.folder for row in self.rows]
        if not folders or len(set(folders)) < len(folders):
            raise ValueError(f"rows must be one or more with a folder each of their own, got {folders}")


@dataclass(frozen=True)
class Line:
    """A row's figures. `scores`: {NFE and metric: value}; `agreement` as a share, None if it is not asked for."""

    name: str
    scores: dict[str, float]
    samples: int
    agreement: Agreement | None


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.table", description=__doc__)
    parser.add_argument("table", type=Path, help="a YAML of recipes/tables/")
    parser.add_argument("--rows", help="only these, by number or folder: 1,3 or omega1,omega2")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override in every row")
    parser.add_argument("--out", type=Path, help="folder for the rows' run folders and the table (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print each row's size and speed, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config, rows = load_table(args)
    out = args.out or Path("runs") / args.table.stem
    processes = start_processes(args.device)
    say = print if processes.is_main else (lambda line: None)
    lines = []
    try:
        for number, (row, recipe) in enumerate(rows, 1):
            say(f"{'' if number == 1 else chr(10)}{row.name} ({number} of {len(rows)})")
            if args.dry_run:
                say(estimate(recipe, processes))
                continue
            run = RunFolder(out / row.folder)
            if code := job(recipe, run, processes):
                return code
            lines.append(measure(config, row, recipe, run, processes))
        if lines and processes.is_main:
            print(f"\n{write_table(config, lines, out)}")
            picture(rows, out)
            print(f"\ntable     {out / 'table.md'}\nsamples   {out / 'samples.png'}")
    finally:
        stop_processes()
    return 0


def check(argv: list[str], world: int) -> None:
    """What can be known before processes start. Raises ConfigError."""
    for _, recipe in load_table(parse(argv))[1]:
        split_batch(recipe, world)


def load_table(args: argparse.Namespace) -> tuple[TableConfig, list[Row]]:
    """The table and the rows chosen, each with its recipe. Raises ConfigError or UserError."""
    config = settings.build(TableConfig, settings.read_yaml(args.table), "", str(args.table))
    base = RECIPES / f"{config.base}.yaml"
    if not base.exists():
        raise ConfigError(f"{args.table}: base {config.base} is not a recipe")
    rows = [(row, load_config(base, [*row.set, *args.set])) for row in config.rows]
    if args.rows is None:
        return config, rows
    named = {key: pair for i, pair in enumerate(rows, 1) for key in (str(i), pair[0].folder)}
    asked = args.rows.split(",")
    if unknown := [name for name in asked if name not in named]:
        raise UserError(f"--rows {unknown[0]}: the rows are {', '.join(named)}")
    return config, [named[name] for name in asked]


def measure(config: TableConfig, row: RowConfig, recipe: RunConfig, run: RunFolder, processes: Processes) -> Line:
    """The figures of a finished run; scores that stand in its folder are read."""
    results = score_run(run, recipe, processes, say=lambda table: None)
    found = on_main(processes, lambda: _agreement(run, processes)) if config.agreement else None
    scores = {f"{r['protocol']['nfe']}-NFE {name}": value for r in results for name, value in r["metrics"].items()}
    return Line(row.name, scores, recipe.eval.samples, found)


def _agreement(run: RunFolder, processes: Processes) -> Agreement:
    model = load_model(run.path, None, processes.device)
    file = agreement_file(run, model, AGREEMENT_STEPS)
    if file.exists():
        return Agreement(**read_json(file))
    found = agreement(model, model.config.eval.samples, AGREEMENT_STEPS)
    write_json(file, asdict(found))
    return found


def write_table(config: TableConfig, lines: list[Line], out: Path) -> str:
    """`table.md` and `table.csv` in `out`; the table as text."""
    header = ["", *lines[0].scores]
    if config.agreement:
        header.append(f"{AGREEMENT_STEPS}-NFE agreement")
    rows = [header, *(_cells(line) for line in lines)]
    notes = [config.question, f"{lines[0].samples:,} samples a figure."]
    if config.agreement:
        real = lines[0].agreement.real
        notes.append(
            f"Agreement: samples that a classifier fitted to the real images gives the label they were asked for; "
            f"of real images it gets {real:.1%} right (cross-validated)."
        )
    markdown = [f"| {' | '.join(row)} |" for row in rows]
    markdown.insert(1, f"|{'---|' * len(header)}")
    sheet = io.StringIO()
    csv.writer(sheet).writerows(rows)
    for file, text in (("table.md", "\n".join([*markdown, "", *notes, ""])), ("table.csv", sheet.getvalue())):
        with write_errors_named(out / file):
            (out / file).write_text(text, encoding="utf-8")
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    aligned = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([*aligned, "", *notes])


def _cells(line: Line) -> list[str]:
    judged = [] if line.agreement is None else [f"{line.agreement.agreement:.1%}"]
    return [line.name, *(f"{value:.3f}" for value in line.scores.values()), *judged]


def picture(rows: list[Row], out: Path) -> None:
    """The rows' grids of samples side by side, as samples.png."""
    grids = [Image.open(out / row.folder / "samples.png") for row, _ in rows]
    size = max(grid.width for grid in grids) / 150
    figure, axes = plt.subplots(1, len(grids), figsize=(size * len(grids), size + 0.3), squeeze=False)
    for axis, grid, (row, _) in zip(axes[0], grids, rows, strict=True):
        axis.imshow(grid, cmap="gray", vmin=0, vmax=255)
        axis.set_title(row.name, fontsize=11)
        axis.axis("off")
    with write_errors_named(out / "samples.png"):
        figure.savefig(out / "samples.png", dpi=150, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    raise SystemExit(run_main(main))
