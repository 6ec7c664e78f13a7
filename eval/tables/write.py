"""A finished table as Markdown, CSV, JSON and pictures: ours beside the paper's, never in one column."""

import math
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter
from PIL import Image

from eval.reports.curves import COLOURS, LOG_FROM, MARKERS, plain
from eval.scoring.score import REAL_VS_REAL_UP_TO, real_vs_real
from eval.tables.config import RowConfig, Run, Table
from eval.tables.files import write_files
from eval.tables.results import ACCURACY, Line, Mean, against_paper
from meanflow.errors import AssetError, write_errors_named

GRID_INCHES = 3.2


def write_table(table: Table, lines: list[Line], diverged: list[Run], out: Path, cuda: bool) -> str:
    """`table.md`, `table.csv`, `table.json`, `figure.png` and `samples.png` in `out`; the table as text.

    `diverged`: runs that have no figures. Raises AssetError, naming the file, where one cannot be read or written.
    """
    facts = {"description": table.config.description, "question": table.config.question, "scale": table.scale}
    rows = [_header(table, lines), *(_cells(table, line) for line in lines)]
    runs = [run.folder for run in table.runs]
    text = write_files(out, facts, rows, notes(table, lines, diverged, cuda), _sheet(table, lines), runs)
    with write_errors_named(out):
        (draw_milestones if table.config.milestones else draw_rows)(table, lines, out / "figure.png")
    draw_samples(table, [line.row for line in lines], out)
    return text


def _header(table: Table, lines: list[Line]) -> list[str]:
    judged = [ACCURACY] if table.settings.classifier else []
    return [table.config.parameter, *_shown(table, lines[0]), *judged, *_quoted(table), "hours"]


def _shown(table: Table, line: Line) -> list[str]:
    """The figures to be read in the table: along milestones those of the end; the others are in the CSV."""
    if not table.config.milestones:
        return line.labels
    end = line.labels[-1].rsplit(" at ", 1)[1]
    return [label for label in line.labels if label.endswith(f" at {end}")]


def _quoted(table: Table) -> list[str]:
    paper = table.config.paper
    return [f"paper: {nfe}-NFE {paper.metric}" for nfe in paper.nfe] if paper else []


def _cells(table: Table, line: Line) -> list[str]:
    judged = [line.accuracy.text("{:.1%}")] if line.accuracy else []
    paper = ["" if value is None else f"{value:.2f}" for value in line.row.paper]
    ours = [line.figure(label).text() for label in _shown(table, line)]
    return [line.row.name, *ours, *judged, *paper, f"{line.hours:.3g}"]


def _sheet(table: Table, lines: list[Line]) -> list[list[Any]]:
    """Numbers to compute with: the mean and the standard deviation of each figure in separate columns."""
    labels = [*lines[0].labels, *([ACCURACY] if table.settings.classifier else [])]
    spread = [name for label in labels for name in (label, f"{label} sd")]
    sheet: list[list[Any]] = [[table.config.parameter, *spread, *_quoted(table), "seeds", "samples", "hours"]]
    for line in lines:
        figures = [line.figure(label) for label in line.labels] + ([line.accuracy] if line.accuracy else [])
        numbers = [value for figure in figures for value in (figure.mean, figure.deviation)]
        sheet.append([line.row.name, *numbers, *line.row.paper, len(line.results), _samples(table), line.hours])
    return sheet


def _samples(table: Table) -> int:
    return table.runs[0].recipe.eval.samples


def notes(table: Table, lines: list[Line], diverged: list[Run], cuda: bool) -> list[str]:
    """What has to be known to read the table: protocol, cost, machine, and what the rows say."""
    chosen, recipe = table.settings, table.runs[0].recipe
    seeds = sorted({run.seed for run in table.runs})
    spread = f"seeds {', '.join(map(str, seeds))}: mean ± standard deviation" if len(seeds) > 1 else f"seed {seeds[0]}"
    said = [f"Ours: {_samples(table):,} samples a figure; {spread}. Scale {table.scale}: {_trained(table)}."]
    if recipe.eval.extractor == "pixels":
        cheap = math.prod(recipe.image_shape) <= REAL_VS_REAL_UP_TO
        real = f" The real-vs-real distance, of two halves of the real images, is {real_vs_real(recipe):.3f}." * cheap
        said.append(f"fd-pixels is the Fréchet distance between pixels in [−1, 1]; it is not FID.{real}")
    if chosen.note:
        said.append(chosen.note)
    if lines[0].accuracy:
        real = lines[0].results[0].accuracy.real
        said.append(
            f"Classifier accuracy: samples that a classifier fitted to the real images gives the label they were asked "
            f"for; of real images it gets {real:.1%} right (cross-validated)."
        )
    if diverged:
        said.append(f"Not finite, and so without figures: {', '.join(run.folder for run in diverged)}.")
    results = [result for line in lines for result in line.results]
    hours, unit = sum(result.process_hours for result in results), "GPU-hours" if cuda else "process-hours"
    machines = "; ".join(dict.fromkeys(result.device for result in results))
    said.append(
        f"Hours are {unit} of training, the mean of a row's runs; {len(results)} runs: {hours:.3g} {unit} ({machines})."
    )
    cautions = dict.fromkeys(caution for result in results for caution in result.cautions)
    return [*said, *cautions, *against_paper(table, lines)]


def _trained(table: Table) -> str:
    """What was trained, from the runs themselves: bases, lengths, batches, and --set."""
    bases = ", ".join(dict.fromkeys(run.changes.partition(" ")[0] for run in table.runs))
    steps, batches = ({getattr(run.recipe.train, key) for run in table.runs} for key in ("steps", "batch"))
    text = f"{bases}, {_range(steps)} steps of {_range(batches)}"
    return f"{text}, changed by --set {' '.join(table.changes)}" if table.changes else text


def _range(numbers: set[int]) -> str:
    low, high = min(numbers), max(numbers)
    return f"{low:,}" if low == high else f"{low:,} – {high:,}"


# --- pictures --------------------------------------------------------------------------------------------------


def draw_rows(table: Table, lines: list[Line], file: Path) -> None:
    """One panel for each kind of figure, the rows along the x axis; the paper's in another panel."""
    ours, paper = lines[0].labels, table.config.paper
    panels = 1 + bool(lines[0].accuracy) + bool(paper)
    width = max(2.6, 0.75 * len(lines) + 1.2)
    figure, axes = plt.subplots(1, panels, figsize=(width * panels, 3.0), squeeze=False, layout="constrained")
    axes, names = list(axes[0]), [line.row.name for line in lines]
    axis = axes.pop(0)
    kinds = {label.split(" ", 1)[1] for label in ours}
    for k, label in enumerate(ours):
        _errors(axis, [line.figure(label) for line in lines], label, k)
    _dress(axis, f"ours: {', '.join(sorted(kinds))}", names, table.config.parameter)
    if lines[0].accuracy:
        axis = axes.pop(0)
        _errors(axis, [line.accuracy for line in lines], ACCURACY, 3)
        _dress(axis, "ours: classifier accuracy", names, table.config.parameter, log=False)
        axis.yaxis.set_major_formatter(PercentFormatter(1))
        axis.set_ylim(top=min(axis.get_ylim()[1], 1.005))
    if paper:
        for k, nfe in enumerate(paper.nfe):
            points = [(i, line.row.paper[k]) for i, line in enumerate(lines) if line.row.paper[k] is not None]
            if points:
                style = {"marker": MARKERS[k], "color": COLOURS[5], "linestyle": ":", "linewidth": 1}
                axes[0].plot(*zip(*points, strict=True), label=f"{nfe}-NFE {paper.metric}", **style)
        _dress(axes[0], f"paper: {paper.metric}", names, table.config.parameter)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _errors(axis, figures: list[Mean], label: str, colour: int, xs: list[int] | None = None) -> None:
    axis.errorbar(
        range(len(figures)) if xs is None else xs,
        [figure.mean for figure in figures],
        [figure.deviation or 0 for figure in figures],
        marker=MARKERS[colour % len(MARKERS)],
        color=COLOURS[colour % len(COLOURS)],
        linestyle=":",
        linewidth=1,
        capsize=3,
        label=label,
    )


def _dress(axis, title: str, names: list[str], parameter: str, log: bool = True) -> None:
    axis.set_title(title, fontsize=9)
    turned = sum(map(len, names)) > 28
    axis.set_xticks(
        range(len(names)), names, fontsize=8, rotation=25 if turned else 0, ha="right" if turned else "center"
    )
    axis.set_xlim(-0.4, len(names) - 0.6)
    axis.set_xlabel(parameter, fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    values = [y for line in axis.lines for y in line.get_ydata() if y and math.isfinite(y)]
    plain(axis, log and bool(values) and min(values) > 0 and max(values) > LOG_FROM * min(values))
    if log:
        axis.legend(fontsize=7, frameon=False)


def draw_milestones(table: Table, lines: list[Line], file: Path) -> None:
    """Distance against training length, a curve for each row (Figure 4), at the first of the recipe's NFE."""
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    nfe = f"{table.runs[0].recipe.eval.steps[0]}-NFE "
    for k, line in enumerate(lines):
        mine = {label.rsplit(" at ", 1)[1]: line.figure(label) for label in line.labels if label.startswith(nfe)}
        steps = [int(at.removesuffix(" steps").replace(",", "")) for at in mine]
        _errors(axis, list(mine.values()), line.row.name, k, steps)
    axis.set_xlabel("step", fontsize=8)
    axis.set_ylabel(lines[0].labels[0].rsplit(" at ", 1)[0], fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    plain(axis, log=True)
    axis.legend(fontsize=8, frameon=False, title=table.config.parameter, title_fontsize=8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def draw_samples(table: Table, rows: list[RowConfig], out: Path) -> None:
    """The rows' grids of samples side by side, of the first seed. Raises AssetError if one cannot be read."""
    first = {run.row: out.parent / run.folder / "samples.png" for run in reversed(table.runs)}
    figure, axes = plt.subplots(1, len(rows), figsize=(GRID_INCHES * len(rows), GRID_INCHES + 0.3), squeeze=False)
    for axis, row in zip(axes[0], rows, strict=True):
        try:
            axis.imshow(np.asarray(Image.open(first[row])), cmap="gray", vmin=0, vmax=255)
        except (OSError, ValueError) as error:
            raise AssetError(f"{first[row]}: cannot be read ({error}); delete it and run the table again") from error
        axis.set_title(row.name, fontsize=11)
        axis.axis("off")
    with write_errors_named(out / "samples.png"):
        figure.savefig(out / "samples.png", dpi=150, bbox_inches="tight", pad_inches=0.05)
    plt.close(figure)
