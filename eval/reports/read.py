"""Reads run folders (see RunFolder) and tables (see eval/table.py), without PyTorch."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from eval.scoring.options import FULL_N, INCEPTION
from eval.tables import SCALES
from meanflow.errors import AssetError
from meanflow.files import read_json
from meanflow.training import settings
from meanflow.training.records import read_columns
from meanflow.training.run_folder import RunFolder, starts

TABLE = "table.json"
MOSTLY_START = 0.1  # weight of the initial weights in an average, above which a note is given


@dataclass(frozen=True)
class Score:
    """One number of eval/*.json. `why`: why it does not compare with published ones; "" if it does."""

    metric: str
    value: float | None  # None: its evaluation is unfinished
    deviation: float | None  # standard deviation over subsets, of metrics that have one
    nfe: int
    ema: str
    n: int
    step: int
    extractor: str
    reference: str
    why: str
    command: str
    guidance: str = ""  # where it is an input of the network: "ω 2", "ω 7.5 in [0.4, 0.65]"

    @property
    def is_distance(self) -> bool:
        """A Fréchet distance, of which less is better."""
        return self.metric == "fid" or self.metric.startswith("fd-")

    @property
    def how(self) -> str:
        return f"{self.nfe}-NFE, {f'{self.guidance}, ' if self.guidance else ''}EMA {self.ema}, N {self.n:,}"


@dataclass(frozen=True)
class Failure:
    """A step whose numbers could not be used, `what` they were, and the file that makes the step again."""

    step: int
    what: str
    file: Path


@dataclass(frozen=True, eq=False)  # each is itself, and can be a key
class RunRecord:
    """The contents of a run folder. `name` tells it from the others shown; `columns` of metrics.jsonl are (N,) each."""

    folder: RunFolder
    name: str
    columns: dict[str, np.ndarray]
    scores: tuple[Score, ...]
    starts: tuple[dict[str, Any], ...]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """config.yaml as {dotted key: value}. Raises AssetError where there is none, ConfigError if it is damaged."""
        if not self.folder.config_file.exists():
            raise AssetError(f"{self.folder.path}: is no run folder, it has no config.yaml")
        return settings.flatten(settings.read_yaml(self.folder.config_file))

    @property
    def steps(self) -> int | None:
        """How many steps the run is to take."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def last(self) -> dict[str, float]:
        """The last line of metrics.jsonl."""
        return {name: float(column[-1]) for name, column in self.columns.items()}

    @property
    def step(self) -> int:
        return int(self.columns["step"][-1])

    @property
    def every(self) -> int:
        """`columns` hold every so many steps: 1, or more of a long run."""
        last = self.columns["step"][-2:]
        return int(last[-1] - last[0]) if len(last) > 1 else 1

    @property
    def titles(self) -> dict[str, str]:
        """{logged value: its explanation}, as the objective gave it when the run was started."""
        noted = [start["titles"] for start in self.starts if isinstance(start.get("titles"), dict)]
        return {name: str(title) for titles in noted for name, title in titles.items()}

    @property
    def changes(self) -> list[tuple[int, dict[str, list[Any]]]]:
        """(step, {dotted key: [old, new]}) of each start that went on under other settings."""
        noted = [(start.get("step"), start.get("changed")) for start in self.starts]
        return [(step, changed) for step, changed in noted if changed and isinstance(step, int) and step > 0]

    def least(self, metric: str, nfe: int, n: int) -> Score | None:
        """The best score of one distance, over all steps and EMAs."""
        found = [s for s in self.scores if (s.metric, s.nfe, s.n) == (metric, nfe, n) and s.value is not None]
        return min(found, key=lambda score: score.value, default=None)

    def best(self) -> list[Score]:
        """For each distance and NFE the least one, among those of the most samples: others do not compare."""
        found = [score for score in self.scores if score.is_distance and score.value is not None]
        most: dict[tuple[str, int], int] = {}
        for score in found:
            most[score.metric, score.nfe] = max(score.n, most.get((score.metric, score.nfe), 0))
        return [self.least(*key, n) for key, n in sorted(most.items())]

    def ema_notes(self) -> list[str]:
        """`ema_note` of each average that was scored."""
        scored = sorted({(score.step, score.ema) for score in self.scores if score.value is not None})
        return [note for step, ema in scored if (note := ema_note(ema, step))]


@dataclass(frozen=True)
class TableRecord:
    """A table's folder: table.json, its pictures, and the runs of its rows."""

    path: Path
    description: str
    question: str
    scale: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]
    runs: tuple[RunRecord, ...]
    absent: tuple[str, ...]  # runs that are named but not there


# --- runs ------------------------------------------------------------------------------------------------------------


def read_runs(folders: list[RunFolder]) -> tuple[RunRecord, ...]:
    """Raises AssetError, naming the file, for what is no run folder, has no steps yet or is damaged."""
    return tuple(read_run(folder, name) for folder, name in run_names(folders).items())


def read_run(folder: RunFolder, name: str) -> RunRecord:
    columns = read_columns(folder.metrics_file)
    if not columns:
        raise AssetError(f"{folder.path}: has no metrics.jsonl with steps in it; is it a run folder?")
    return RunRecord(folder, name, columns, read_scores(folder), tuple(starts(folder)))


def read_scores(folder: RunFolder) -> tuple[Score, ...]:
    """Raises AssetError, naming the file, if one is damaged."""
    return tuple(score for path in sorted(folder.eval.glob("*.json")) for score in _scores(path))


def run_names(runs: list[RunFolder]) -> dict[RunFolder, str]:
    """What each run is called beside the others: its folder, with as many parents as tell them all apart."""
    parts = {run: run.path.resolve().parts for run in runs}
    names: dict[RunFolder, str] = {}
    for depth in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {run: "/".join(parts[run][-depth:]) for run in runs}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return names


def ema_note(decay: float | str, step: int) -> str | None:
    """A note on an average in which the initial weights still count; None for others.

    decay: of each step, or "weights" for the weights themselves.
    """
    try:
        start = float(decay) ** step
    except ValueError:  # no average
        return None
    if start <= MOSTLY_START:
        return None
    return (
        f"after {step:,} steps {start:.0%} of EMA {decay} is still the weights that the run began with: "
        "its samples and scores improve with more steps, or with a smaller ema.decays"
    )


def _scores(path: Path) -> list[Score]:
    """Scores of this run's networks; other evaluations that were put beside them have no step."""
    result = read_json(path)
    try:
        if "step" not in result["subject"]:
            return []
        protocol = result["protocol"]
        shared = {
            "nfe": int(protocol["nfe"]),
            "ema": str(protocol["ema"]),
            "n": int(protocol["n"]),
            "step": int(result["subject"]["step"]),
            "extractor": str(protocol["extractor"]),
            "reference": str(protocol["reference"]["spec"]),
            "why": _why_not(result),
            "command": str(result["circumstances"]["command"]),
            "guidance": _guidance(protocol),
        }
        complete = result["status"] == "complete"
        metrics = {
            str(metric): None if value is None or not complete else float(value)
            for metric, value in (result["metrics"] or dict.fromkeys(protocol["metrics"])).items()
        }
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(f"{path}: is not a result of eval.fid ({error!r}); move it away") from error
    return [
        Score(metric, value, metrics.get(metric.replace("_mean", "_std")) if "_mean" in metric else None, **shared)
        for metric, value in metrics.items()
        if not ("_std" in metric and metric.replace("_std", "_mean") in metrics)
    ]


def _guidance(protocol: dict[str, Any]) -> str:
    """As meanflow.guidance.GuidanceInput writes it, which would need PyTorch."""
    if "guidance" not in protocol:
        return ""
    low, high = map(float, protocol["interval"])
    return f"ω {float(protocol['guidance']):g}" + ("" if (low, high) == (0, 1) else f" in [{low:g}, {high:g}]")


def _why_not(result: dict[str, Any]) -> str:
    if result["comparable"]:
        return ""
    protocol, reasons = result["protocol"], []
    if result["status"] != "complete":
        reasons.append("unfinished")
    if protocol["extractor"] != INCEPTION:
        reasons.append(f"features are {protocol['extractor']}, not Inception's")
    if protocol["n"] < FULL_N:
        reasons.append(f"fewer than {FULL_N:,} samples")
    return "; ".join([*reasons, *map(str, result["warnings"])])


def read_failures(run: RunFolder) -> list[Failure]:
    """Steps at which the run stopped for its numbers. Raises AssetError, naming the file, if one is damaged."""
    return [_failure(path) for path in sorted(run.failures.glob("*.json"))]


def _failure(path: Path) -> Failure:
    try:
        failure = read_json(path)["failure"]
        return Failure(int(failure["step"]), str(failure["what"]), path)
    except (LookupError, TypeError, ValueError) as error:
        raise AssetError(f"{path}: is not a failure that a run recorded ({error!r}); move it away") from error


def one_seed_each(runs: tuple[RunRecord, ...]) -> tuple[RunRecord, ...]:
    """The first of those runs that differ in nothing but the seed."""
    first: dict[str, RunRecord] = {}
    for run in runs:
        alike = {key: value for key, value in run.settings.items() if key != "seed"}
        first.setdefault(json.dumps(alike, sort_keys=True, default=str), run)
    return tuple(first.values())


def differences(runs: tuple[RunRecord, ...]) -> list[str]:
    """The dotted keys of the settings that are not the same in all runs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if any(run.settings.get(key) != runs[0].settings.get(key) for run in runs)]


# --- tables ----------------------------------------------------------------------------------------------------------


def read_table(path: Path) -> TableRecord:
    """Raises AssetError, naming the file, if table.json or a run that it names is damaged."""
    file = path / TABLE
    found = read_json(file)
    try:
        texts = {key: found[key] for key in ("description", "question", "scale")}
        header, rows, notes, names = (found[key] for key in ("header", "rows", "notes", "runs"))
    except (LookupError, TypeError) as error:
        raise AssetError(f"{file}: is not a table's description ({error!r}); run the table again") from error
    lists = (header, notes, names, *(rows if isinstance(rows, list) else [None]))
    whole = all(isinstance(cells, list) and all(isinstance(cell, str) for cell in cells) for cells in lists)
    if not whole or not header or any(len(row) != len(header) for row in rows):
        raise AssetError(f"{file}: header, rows, notes and runs must be lists of texts, as many in a row as columns")
    if not all(isinstance(text, str) for text in texts.values()) or texts["scale"] not in SCALES:
        raise AssetError(f"{file}: scale must be one of {', '.join(SCALES)}, description and question texts")
    if outside := [name for name in names if Path(name).name != name]:
        raise AssetError(f"{file}: runs names {outside[0]}, which is not the name of a folder beside this one")
    beside = path.resolve().parent
    there = [name for name in names if (beside / name).is_dir()]
    runs = tuple(read_run(RunFolder(beside / name), name) for name in there)
    absent = tuple(name for name in names if name not in there)
    return TableRecord(path, **texts, header=header, rows=rows, notes=notes, runs=runs, absent=absent)
