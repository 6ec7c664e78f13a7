"""The results of a table: figures by row with spread over seeds, and whether the order is the paper's."""

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy.stats import ttest_ind

from eval.scoring.classifier import (
    ClassifierAccuracy,
    accuracy_file,
    classifier_accuracy,
    read_accuracy,
    write_accuracy,
)
from eval.scoring.score import score_run
from eval.tables.config import RowConfig, Run, Table
from meanflow.training.checkpoint import checkpoint_path
from meanflow.training.model import load
from meanflow.training.processes import DistributedContext, run_on_rank0
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder, starts

CLASSIFIED_STEPS = 1
ACCURACY = f"{CLASSIFIED_STEPS}-NFE classifier accuracy"
LEVEL = 0.05  # of Welch's t-test, below which two rows are called different


@dataclass(frozen=True)
class Result:
    """One run. `figures`: {"1-NFE fd-pixels": 1.5, …}, at milestones with their step; `accuracy` None if not asked."""

    figures: dict[str, float]
    accuracy: ClassifierAccuracy | None
    cautions: tuple[str, ...]  # why its figures do not compare with published ones
    process_hours: float  # of training
    device: str  # in words, of its last start


@dataclass(frozen=True)
class Mean:
    """Of the seeds: the mean and the sample standard deviation, None of a single one."""

    mean: float
    deviation: float | None
    count: int

    @classmethod
    def of(cls, values: list[float]) -> "Mean":
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, len(values))

    def text(self, form: str = "{:.3f}") -> str:
        shown = form.format(self.mean)
        return shown if self.deviation is None else f"{shown} ± {form.format(self.deviation)}"


@dataclass(frozen=True)
class Line:
    """A row and the results of its seeds."""

    row: RowConfig
    results: tuple[Result, ...]

    def figure(self, label: str) -> Mean:
        return Mean.of([result.figures[label] for result in self.results])

    @property
    def labels(self) -> list[str]:
        return list(self.results[0].figures)

    @property
    def hours(self) -> float:
        """Of training times processes, the mean of the row's runs."""
        return statistics.fmean(result.process_hours for result in self.results)

    @property
    def accuracy(self) -> Mean | None:
        judged = [result.accuracy.accuracy for result in self.results if result.accuracy is not None]
        return Mean.of(judged) if judged else None


def measure(table: Table, run: Run, folder: RunFolder, ctx: DistributedContext) -> Result:
    """The figures of a finished run; scores that are in its folder are read. Raises AssetError or NumericsError."""
    every, last = run.recipe.checkpoint.milestone_every, run.recipe.train.steps
    steps = [*range(every, last, every), last] if table.config.milestones else [last]
    figures: dict[str, float] = {}
    cautions: dict[str, None] = {}
    for step in steps:
        at = f" at {step:,} steps" if table.config.milestones else ""
        what = checkpoint_path(folder.checkpoints, step)
        for result in score_run(folder, run.recipe, ctx, what):
            nfe, comparable = result["protocol"]["nfe"], result["comparable"]
            for name, value in result["metrics"].items():
                mark = "" if comparable or name.startswith("fd-") else " (not comparable)"
                figures[f"{nfe}-NFE {name}{mark}{at}"] = value
            cautions |= dict.fromkeys(result["warnings"])
    found = run_on_rank0(ctx, lambda: _accuracy(folder, last, ctx)) if table.settings.classifier else None
    begun = starts(folder)
    hours = process_seconds(begun, read_metrics(folder.metrics_file)) / 3600
    where = f"{begun[-1]['device']}, {begun[-1]['cores']} cores, torch {begun[-1]['torch']}"
    return Result(figures, found, tuple(cautions), hours, where)


def process_seconds(begun: list[dict[str, Any]], lines: Iterable[dict[str, Any]]) -> float:
    """Seconds of training times the processes of the start that each step belongs to.

    `begun`: the lines of starts.jsonl, whose `step` is where a start went on; `lines`: those of metrics.jsonl, whose
    `seconds` count from the first start.
    """
    total, before, ahead = 0.0, 0.0, [start.get("step", 0) for start in begun]
    for line in lines:
        k = max((k for k, step in enumerate(ahead) if step < line["step"]), default=0)
        total += (line["seconds"] - before) * begun[k]["processes"]
        before = line["seconds"]
    return total


def _accuracy(run: RunFolder, step: int, ctx: DistributedContext) -> ClassifierAccuracy:
    model = load(checkpoint_path(run.checkpoints, step), device=ctx.device)
    file, samples = accuracy_file(run, step, model.ema, CLASSIFIED_STEPS), model.config.eval.samples
    found = read_accuracy(file)
    if found is None or (found.samples, found.seed) != (samples, 0):
        found = classifier_accuracy(model, samples, CLASSIFIED_STEPS)
        write_accuracy(file, found)
    return found


def against_paper(table: Table, lines: list[Line]) -> list[str]:
    """In words: is the order of the rows the paper's? A distance of another kind may only be ordered."""
    paper = table.config.paper
    if paper is None or table.scale == "full" or len(lines) < 2:
        return []
    said = []
    for k, nfe in enumerate(paper.nfe):
        known = sorted((line for line in lines if line.row.paper[k] is not None), key=lambda line: line.row.paper[k])
        label = next((label for label in reversed(lines[0].labels) if label.startswith(f"{nfe}-NFE ")), None)
        if label is None or len(known) < 2:
            continue
        ours = min(known, key=lambda line: line.figure(label).mean)
        text = f"{nfe}-NFE: the paper's best row is {known[0].row.name}, here it is {ours.row.name}"
        seeds = min(len(line.results) for line in known)
        if seeds == 1:
            said.append(f"{text}; one seed, so no spread to judge the order by.")
            continue
        if ours is not known[0] and not _differ(ours, known[0], label):
            text += " (not significantly)"
        same, against = 0, []
        for a, b in combinations(known, 2):
            if a.row.paper[k] == b.row.paper[k] or not _differ(a, b, label):
                continue
            if a.figure(label).mean < b.figure(label).mean:
                same += 1
            else:
                against.append(f"{b.row.name} is better than {a.row.name}")
        pairs = math.comb(len(known), 2)
        text += f". Of {pairs} pairs of rows {same} differ as in the paper and {len(against)} against it"
        test = f" (Welch's t-test of {seeds} seeds, {LEVEL:.0%} for each pair; the others do not differ significantly)"
        said.append(f"{text}{': ' if against else ''}{'; '.join(against)}{test}.")
    return said


def _differ(a: Line, b: Line, label: str) -> bool:
    values = [[result.figures[label] for result in line.results] for line in (a, b)]
    return bool(ttest_ind(*values, equal_var=False).pvalue < LEVEL)
