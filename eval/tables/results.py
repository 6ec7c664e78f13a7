"""What the runs of a table came to: figures by row with spread over seeds, and whether the order is the paper's."""

import math
import statistics
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from eval.agreement import Agreement, agreement, agreement_file
from eval.files import read_json, write_json
from eval.generate import load_model
from eval.processes import on_main
from eval.score import score_run
from eval.tables.config import RowConfig, Run, Table
from meanflow.training.checkpoint import checkpoint_path
from meanflow.training.distributed import Processes
from meanflow.training.metrics import read_metrics
from meanflow.training.run_folder import RunFolder, starts

AGREEMENT_STEPS = 1
AGREEMENT = f"{AGREEMENT_STEPS}-NFE agreement"
CLEAR = 2  # standard errors of a difference, beyond which two rows are called different


@dataclass(frozen=True)
class Result:
    """One run. `figures`: {"1-NFE fd-pixels": 1.5, …}, at milestones with their step; `agreement` None if not asked."""

    figures: dict[str, float]
    agreement: Agreement | None
    seconds: float  # of training
    start: dict[str, Any]  # the last line of starts.jsonl

    @property
    def process_hours(self) -> float:
        return self.seconds * self.start["processes"] / 3600


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
    def agreement(self) -> Mean | None:
        judged = [result.agreement.agreement for result in self.results if result.agreement is not None]
        return Mean.of(judged) if judged else None


def measure(table: Table, run: Run, folder: RunFolder, processes: Processes) -> Result:
    """The figures of a finished run; scores that stand in its folder are read."""
    figures: dict[str, float] = {}
    for step in _steps(table, run, folder):
        at = "" if step is None else f" at {step:,} steps"
        what = None if step is None else checkpoint_path(folder.checkpoints, step)
        for result in score_run(folder, run.recipe, processes, say=lambda text: None, what=what):
            nfe = result["protocol"]["nfe"]
            figures |= {f"{nfe}-NFE {name}{at}": value for name, value in result["metrics"].items()}
    found = on_main(processes, lambda: _agreement(folder, processes)) if table.settings.agreement else None
    seconds = read_metrics(folder.metrics_file)[-1]["seconds"]
    return Result(figures, found, seconds, starts(folder)[-1])


def _steps(table: Table, run: Run, folder: RunFolder) -> list[int | None]:
    """The checkpoints to score: None for the newest."""
    if not table.config.milestones:
        return [None]
    every, last = run.recipe.checkpoint.milestone_every, run.recipe.train.steps
    return [*range(every, last, every), last]


def _agreement(run: RunFolder, processes: Processes) -> Agreement:
    model = load_model(run.path, None, processes.device)
    file = agreement_file(run, model, AGREEMENT_STEPS)
    if file.exists():
        return Agreement(**read_json(file))
    found = agreement(model, model.config.eval.samples, AGREEMENT_STEPS)
    write_json(file, asdict(found))
    return found


def against_paper(table: Table, lines: list[Line]) -> list[str]:
    """In words: is the order of the rows the paper's? A distance of another kind than the paper's may only be ordered.

    Two rows count as different here if their means are more than two standard errors of the difference apart.
    """
    paper = table.config.paper
    if paper is None or table.scale == "full" or len(lines) < 2:
        return []
    said = []
    for k, nfe in enumerate(paper.nfe):
        known = [line for line in lines if line.row.paper[k] is not None]
        label = next((label for label in reversed(lines[0].labels) if label.startswith(f"{nfe}-NFE ")), None)
        if label is None or len(known) < 2:
            continue
        best, ours = min(known, key=lambda x: x.row.paper[k]), min(known, key=lambda x: x.figure(label).mean)
        text = f"{nfe}-NFE: the paper's best row is {best.row.name}, here it is {ours.row.name}"
        if len(known[0].results) == 1:
            said.append(f"{text}; one seed, so no spread to judge the order by.")
            continue
        if ours is not best and not _clear(ours.figure(label), best.figure(label)):
            text += " (within two standard errors)"
        agree, against = 0, []
        for a, b in combinations(sorted(known, key=lambda x: x.row.paper[k]), 2):
            if a.row.paper[k] == b.row.paper[k] or not _clear(a.figure(label), b.figure(label)):
                continue
            if a.figure(label).mean < b.figure(label).mean:
                agree += 1
            else:
                against.append(f"{b.row.name} is better than {a.row.name}")
        pairs = math.comb(len(known), 2)
        text += (
            f". Of {pairs} pairs of rows {agree} are clearly in the paper's order and {len(against)} clearly against"
        )
        said.append(f"{text}{': ' if against else ''}{'; '.join(against)}.")
    return said


def _clear(a: Mean, b: Mean) -> bool:
    error = math.sqrt(a.deviation**2 / a.count + b.deviation**2 / b.count)
    return abs(a.mean - b.mean) > CLEAR * error
