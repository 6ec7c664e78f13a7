"""What folders say of themselves, read for the report: a run's (see RunFolder) and a table's (see eval/table.py)."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.plot import run_names
from eval.scoring.extractors import INCEPTION
from eval.scoring.files import read_json
from eval.scoring.protocol import FULL_N
from eval.tables.config import SCALES
from meanflow.errors import AssetError
from meanflow.training import settings
from meanflow.training.metrics import read_metrics
from meanflow.training.run_folder import RunFolder, starts

TABLE = "table.json"


@dataclass(frozen=True)
class Score:
    """One number of eval/*.json under its own name. `why` it may not stand beside published ones; "" if it may."""

    metric: str
    value: float | None  # None: its evaluation is unfinished
    nfe: int
    ema: str
    n: int
    step: int
    extractor: str
    reference: str
    why: str
    command: str

    @property
    def is_distance(self) -> bool:
        """A Fréchet distance, of which less is better."""
        return self.metric == "fid" or self.metric.startswith("fd-")


@dataclass(frozen=True)
class Failure:
    """A step whose numbers could not be used, `what` they were, and the file that makes the step again."""

    step: int
    what: str
    file: Path


@dataclass(frozen=True, eq=False)  # each is itself, and can be a key
class RunRecord:
    """A run folder as it stands. `settings` are those of `yaml`, config.yaml's text, as {dotted key: value}."""

    folder: RunFolder
    name: str
    yaml: str
    settings: dict[str, Any]
    last: dict[str, Any]  # line of metrics.jsonl
    scores: tuple[Score, ...]
    starts: tuple[dict[str, Any], ...]
    failures: tuple[Failure, ...]
    command: str  # that its scores were made by; "" if there are none

    @property
    def steps(self) -> int | None:
        """How many steps the run shall take."""
        steps = self.settings.get("train.steps")
        return steps if isinstance(steps, int) else None

    @property
    def finished(self) -> bool:
        return self.steps is not None and self.last["step"] >= self.steps

    def least(self, metric: str, nfe: int, n: int) -> Score | None:
        """The best score of one distance, at whatever step and EMA."""
        found = [s for s in self.scores if (s.metric, s.nfe, s.n) == (metric, nfe, n) and s.value is not None]
        return min(found, key=lambda score: score.value, default=None)

    def best(self) -> list[Score]:
        """For each distance and NFE the least one, among those of the most samples: others do not compare."""
        found = [score for score in self.scores if score.is_distance and score.value is not None]
        most: dict[tuple[str, int], int] = {}
        for score in found:
            most[score.metric, score.nfe] = max(score.n, most.get((score.metric, score.nfe), 0))
        return [self.least(*key, n) for key, n in sorted(most.items())]


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


def read_runs(folders: list[RunFolder]) -> tuple[RunRecord, ...]:
    """Raises AssetError or ConfigError, naming the file, for what is no run folder, has no steps yet or is damaged."""
    return tuple(_read_run(folder, name) for folder, name in run_names(folders).items())


def _read_run(folder: RunFolder, name: str) -> RunRecord:
    if not folder.config_file.exists():
        raise AssetError(f"{folder.path}: is no run folder, it has no config.yaml")
    tree = settings.read_yaml(folder.config_file)
    lines = read_metrics(folder.metrics_file)
    if not lines:
        raise AssetError(f"{folder.path}: has no steps in metrics.jsonl yet, so there is nothing to report")
    results = [(path, read_json(path)) for path in sorted(folder.eval.glob("*.json"))]
    scores = [score for path, result in results for score in _scores(path, result)]
    return RunRecord(
        folder,
        name,
        folder.config_file.read_text(encoding="utf-8"),
        settings.flatten(tree),
        lines[-1],
        tuple(scores),
        tuple(starts(folder)),
        tuple(_read_failure(path) for path in sorted(folder.failures.glob("*.json"))),
        next(
            (str(result["circumstances"]["command"]) for _, result in reversed(results) if "step" in result["subject"]),
            "",
        ),
    )


def _scores(path: Path, result: Any) -> list[Score]:
    """Scores of this run's networks; other evaluations that were put beside them have no step."""
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
        }
        metrics = result["metrics"] or dict.fromkeys(protocol["metrics"])
        return [Score(str(m), None if v is None else float(v), **shared) for m, v in metrics.items()]
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(f"{path}: is not a result of eval.fid ({error!r}); move it away") from error


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


def _read_failure(path: Path) -> Failure:
    try:
        failure = read_json(path)["failure"]
        return Failure(int(failure["step"]), str(failure["what"]), path)
    except (LookupError, TypeError, ValueError) as error:
        raise AssetError(f"{path}: is not a failure that a run recorded ({error!r}); move it away") from error


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
    runs = tuple(_read_run(RunFolder(beside / name), name) for name in there)
    absent = tuple(name for name in names if name not in there)
    return TableRecord(path, **texts, header=header, rows=rows, notes=notes, runs=runs, absent=absent)


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
