"""The overhead of the JVP (appendix B.4) on the machine at hand: an objective's step against a Flow Matching step."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib.pyplot as plt
import torch

from eval.benchmark import FLOW_MATCHING
from eval.benchmark.clock import ratio
from eval.benchmark.rows import Plan, Report, measure
from eval.reports.curves import COLOURS, plain
from eval.tables import SCALES
from eval.tables.files import write_files
from meanflow.errors import ConfigError, UserError, write_errors_named
from meanflow.training import settings
from meanflow.training.config import RECIPES, load_config
from meanflow.training.run_folder import environment

FIXED = ("train.batch", "train.precision", "train.compile", "train.jvp")
WAYS = {FLOW_MATCHING: "Flow Matching", "dual": "{}, dual numbers", "func": "{}, torch.func.jvp"}  # {}: the objective


@dataclass(frozen=True)
class BenchScaleConfig:
    batch: int  # images a step
    repeats: int  # rounds, of which the median counts

    def __post_init__(self):
        if self.batch < 1 or self.repeats < 1:
            raise ValueError("batch and repeats must be ≥ 1")


@dataclass(frozen=True)
class PaperSeconds:
    """The paper's seconds an iteration, and on what."""

    flow_matching: float
    with_jvp: float
    hardware: str


@dataclass(frozen=True)
class OverheadConfig:
    kind: Literal["overhead"]
    description: str
    question: str
    base: str  # a recipe's name
    paper: PaperSeconds
    full: BenchScaleConfig
    gpu: BenchScaleConfig
    cpu: BenchScaleConfig


@dataclass(frozen=True)
class Overhead:
    """The benchmark at one scale."""

    name: str
    config: OverheadConfig
    scale: str
    changes: tuple[str, ...]

    @property
    def settings(self) -> BenchScaleConfig:
        return getattr(self.config, self.scale)


def is_one(path: Path) -> bool:
    """Raises ConfigError if `path` is not YAML."""
    return settings.read_yaml(path).get("kind") == "overhead"


def load(path: Path, scale: str | None, changes: list[str]) -> Overhead:
    """Raises ConfigError or UserError."""
    config = settings.build(OverheadConfig, settings.read_yaml(path), "", str(path))
    if scale not in (None, *SCALES):
        raise UserError(f"--scale {scale}: {path.stem} has {', '.join(SCALES)}")
    base = RECIPES / f"{config.base}.yaml"
    if not base.exists():
        raise ConfigError(f"{path}: base {config.base} is not a recipe")
    if fixed := [change for change in changes if change.partition("=")[0].strip() in FIXED]:
        raise UserError(f"--set {fixed[0]}: {path.stem} sets {', '.join(FIXED)} itself")
    load_config(base, changes)
    return Overhead(path.stem, config, scale or "full", tuple(changes))


def run(overhead: Overhead, out: Path, device: torch.device) -> str:
    """Measure, write table.md, table.csv, table.json and figure.png; the table as text. Raises AssetError."""
    config, chosen = overhead.config, overhead.settings
    with write_errors_named(out):
        out.mkdir(parents=True, exist_ok=True)
    how = (chosen.batch, chosen.repeats, ("tf32" if device.type == "cuda" else "fp32",), ("dual", "func"), ())
    recipe = RECIPES / f"{config.base}.yaml"
    report = measure(Plan(recipe, overhead.changes, *how, ("step",), device))
    rows = _rows(config.paper, report)
    where = environment()
    about = [
        f"Ours: {report.recipe}, {report.parameters / 1e6:.1f} M parameters, batch {report.batch}, r≠t "
        f"{report.share:.0%}, {how[2][0]}; medians and quartiles of {chosen.repeats} interleaved rounds on "
        f"{where['device']}, {torch.get_num_threads()} thread(s), torch {where['torch']}.",
        f"Paper: {config.paper.hardware}.",
    ]
    if overhead.changes:
        about.insert(1, f"Changed by --set {' '.join(overhead.changes)}.")
    facts = {"description": config.description, "question": config.question, "scale": overhead.scale}
    text = write_files(out, facts, rows, about, rows, [])
    with write_errors_named(out):
        _draw(report, config.paper, out / "figure.png")
    return text


def _rows(paper: PaperSeconds, report: Report) -> list[list[str]]:
    header = ["step", "s/iteration", "of Flow Matching's", "paper: s/iteration", "paper: of Flow Matching's"]
    quoted = {FLOW_MATCHING: paper.flow_matching, "dual": paper.with_jvp}
    rounds = {_way(step.name): step.rounds for step in report.steps}
    rows = [header]
    for step in report.steps:
        way, own = _way(step.name), step.seconds
        against = ratio(rounds[way], rounds[FLOW_MATCHING])
        theirs = quoted.get(way)
        ours = f"{against.median:.2f} ({against.low:.2f} – {against.high:.2f})"
        rows.append([WAYS[way].format(report.objective), f"{own.median:.3g} ({own.low:.3g} – {own.high:.3g})", ours])
        rows[-1] += ["", ""] if theirs is None else [f"{theirs:.3f}", f"{theirs / paper.flow_matching:.2f}"]
    return rows


def _way(name: str) -> str:
    return next(way for way in WAYS if name.startswith(way))


def _draw(report: Report, paper: PaperSeconds, file: Path) -> None:
    rounds = {_way(step.name): step.rounds for step in report.steps}
    name = report.objective
    bars = {WAYS[way].format(name): ratio(rounds[way], rounds[FLOW_MATCHING]).median for way in rounds}
    bars[f"paper: {name}"] = paper.with_jvp / paper.flow_matching
    figure, axis = plt.subplots(figsize=(5.2, 2.2), layout="constrained")
    colours = [COLOURS[5], COLOURS[0], COLOURS[1], COLOURS[4]]
    drawn = axis.barh(list(bars), list(bars.values()), color=colours, height=0.6)
    axis.bar_label(drawn, fmt="%.2f", fontsize=8, padding=3)
    axis.invert_yaxis()
    axis.set_xlabel("time of a step / Flow Matching's", fontsize=8)
    axis.set_xlim(0, 1.15 * max(bars.values()))
    axis.tick_params(labelsize=8)
    plain(axis, log=False)
    axis.grid(visible=False, axis="y")
    figure.savefig(file, dpi=150)
    plt.close(figure)
