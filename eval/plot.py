"""`python -m eval.plot RUN [RUN …]`: the curves of everything in metrics.jsonl, and scores where there are any."""

import argparse
import json
import math
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import LogFormatter

from meanflow.errors import AssetError, UserError, run_main
from meanflow.training.metrics import read_metrics
from meanflow.training.run_folder import RunFolder

LOG_FROM = 4  # scores that differ by more than this factor get a log axis
COLOURS = ("#1f5fa8", "#d1603d", "#3c8d5a", "#7a4fa3", "#b8860b", "#4d4d4d")
MARKERS = "os^Dvx*"


@dataclass(frozen=True)
class Panel:
    """One metric: its key in metrics.jsonl, a title that explains it, the unit, and whether a log axis helps."""

    key: str
    title: str
    unit: str
    log: bool


PANELS = (
    Panel("error", "squared error, all samples", "‖u − u_tgt‖² (unweighted)", True),
    Panel("error_still", "squared error where r = t (instantaneous velocity)", "‖u − v‖²", True),
    Panel("error_moving", "squared error where r < t (average velocity)", "‖u − u_tgt‖²", True),
    Panel("loss", "training loss (weighted, Eq. 22: flat by design near p = 1)", "loss", False),
    Panel("grad_norm", "gradient norm", "norm", True),
    Panel("lr", "learning rate", "rate", False),
    Panel("images_per_s", "throughput", "images/s", False),
    Panel("memory_mb", "peak memory", "MB", False),
)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.plot", description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders; several are overlaid")
    parser.add_argument("--x", choices=("step", "images", "seconds"), default="step", help="horizontal axis (step)")
    parser.add_argument("--smooth", type=float, default=0.02, help="width of smoothing, a share of the run (0.02)")
    parser.add_argument("--out", type=Path, help="the PNG or PDF to write (RUN/curves.png)")
    args = parser.parse_args(argv)
    if not 0 <= args.smooth < 1:
        raise UserError(f"--smooth must be in [0, 1), got {args.smooth}")
    out = args.out or RunFolder(args.runs[0]).curves
    plot([RunFolder(path) for path in args.runs], out, args.x, args.smooth)
    print(f"curves of {', '.join(str(path) for path in args.runs)} → {out}")
    return 0


def plot(runs: list[RunFolder], out: Path, x: str = "step", smooth: float = 0.02) -> None:
    """Write the figure. Raises AssetError, naming the run, if there is nothing to draw or it cannot be written."""
    tables = {run: _columns(run) for run in runs}
    scores = {run: read_scores(run) for run in runs}
    names = run_names(runs)
    panels = [panel for panel in PANELS if any(np.isfinite(table[panel.key]).any() for table in tables.values())]
    metrics = list(dict.fromkeys(point["metric"] for points in scores.values() for point in points))
    if not panels:
        raise AssetError(f"{', '.join(str(run.path) for run in runs)}: metrics.jsonl has steps but no metrics")
    count = len(panels) + len(metrics)
    columns = 3 if count <= 9 else 4
    rows = -(-count // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 2.9 * rows), squeeze=False, layout="constrained")
    axes = axes.ravel()
    for axis, panel in zip(axes, panels, strict=False):
        for colour, run in zip(_colours(runs), runs, strict=True):
            _curve(axis, tables[run], x, panel, colour, smooth, names[run])
        _dress(axis, panel.title, x, panel.unit, panel.log)
        if not panel.log:
            axis.set_ylim(0, 1.05 * axis.get_ylim()[1])
    for axis, metric in zip(axes[len(panels) :], metrics, strict=False):
        _score_panel(axis, metric, names, scores, tables, x)
    for axis in axes[count:]:
        axis.axis("off")
    handles, labels = axes[0].get_legend_handles_labels()
    note = "pale: every step; dark: running mean" if smooth else "every step"
    figure.legend(handles, labels, loc="outside lower center", ncols=min(4, len(labels)), frameon=False, title=note)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format=out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise AssetError(f"{out}: cannot be written ({error})") from error
    finally:
        plt.close(figure)


def _columns(run: RunFolder) -> dict[str, np.ndarray]:
    lines = read_metrics(run.metrics_file)
    if not lines:
        raise AssetError(f"{run.path}: has no metrics.jsonl with steps in it; is it a run folder?")
    keys = ("step", "images", "seconds", *(panel.key for panel in PANELS))
    try:
        rows = [[math.nan if line.get(key) is None else float(line[key]) for key in keys] for line in lines]
    except (TypeError, ValueError) as error:
        raise AssetError(f"{run.metrics_file}: is not a metrics file of ours ({error})") from error
    return dict(zip(keys, np.array(rows).T, strict=True))


def run_names(runs: list[RunFolder]) -> dict[RunFolder, str]:
    """What each run is called beside the others: its folder, with as many parents as tell them all apart."""
    parts = {run: run.path.resolve().parts for run in runs}
    names: dict[RunFolder, str] = {}
    for depth in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {run: "/".join(parts[run][-depth:]) for run in runs}
        if len(set(names.values())) == len(set(parts.values())):
            break
    return names


def _colours(runs: list[RunFolder]) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(len(runs))]


def _curve(axis, table: dict[str, np.ndarray], x: str, panel: Panel, colour: str, smooth: float, name: str) -> None:
    keep = np.isfinite(table[panel.key])
    xs, ys = table[x][keep], table[panel.key][keep]
    width = max(1, round(smooth * len(ys)))
    if width > 1:
        shown = slice(None, None, max(1, len(ys) // 4000))  # a pale background needs no more points than pixels
        axis.plot(xs[shown], ys[shown], color=colour, alpha=0.25, linewidth=0.6)
        axis.plot(xs, running_mean(ys, width), color=colour, linewidth=1.6, label=name)
        low, high = np.percentile(ys, [0.2, 99.8])  # one outlier must not flatten the curve
        if high > low and not panel.log:
            axis.set_ylim(
                min(0, low), max(high * 1.08, axis.get_ylim()[1] if axis.has_data() and len(axis.lines) > 2 else 0)
            )
    else:
        axis.plot(xs, ys, color=colour, linewidth=1.2, marker="o" if len(ys) < 20 else "", label=name)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the up to `width` values around each; the window shrinks at both ends, so nothing is invented."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(0, centre - width // 2), np.minimum(len(values), centre + width - width // 2)
    return (total[last] - total[first]) / (last - first)


def _dress(axis, title: str, x: str, unit: str, log: bool) -> None:
    axis.set_title(title, fontsize=9)
    axis.set_xlabel({"step": "step", "images": "images seen", "seconds": "seconds of training"}[x], fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    plain(axis, log)


def plain(axis, log: bool) -> None:
    """The look of all panels: a pale grid, no box; on a log axis 40, 60, 100 rather than powers of ten."""
    if log:
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(LogFormatter(minor_thresholds=(1.5, 0.5)))
    axis.grid(alpha=0.25, which="both" if log else "major", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


def read_scores(run: RunFolder) -> list[dict[str, Any]]:
    """Each finished evaluation's metrics as {metric, value, step, label (NFE and EMA), n, comparable}."""
    points = []
    for path in sorted(run.eval.glob("*.json")):
        try:
            result = json.loads(path.read_text(encoding="utf-8"))
            if result["status"] != "complete" or "step" not in result["subject"]:
                continue
            protocol = result["protocol"]
            shared = {"step": result["subject"]["step"], "n": protocol["n"], "comparable": result["comparable"]}
            shared["label"] = f"NFE {protocol['nfe']}, EMA {protocol['ema']}, N {protocol['n']:,}"
            points += [{"metric": name, "value": value, **shared} for name, value in result["metrics"].items()]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise AssetError(f"{path}: is not a result of eval.fid ({error}); move it away") from error
    return points


def _score_panel(axis, metric: str, names: dict[RunFolder, str], scores: dict, tables: dict, x: str) -> None:
    runs = list(names)
    for colour, run in zip(_colours(runs), runs, strict=True):
        points = [point for point in scores[run] if point["metric"] == metric]
        for marker, label in zip(cycle(MARKERS), dict.fromkeys(point["label"] for point in points), strict=False):
            chosen = sorted((p["step"], p["value"]) for p in points if p["label"] == label)
            xs = np.interp([step for step, _ in chosen], tables[run]["step"], tables[run][x])
            name = label if len(runs) == 1 else f"{names[run]}: {label}"
            axis.plot(xs, [v for _, v in chosen], marker=marker, color=colour, linewidth=1, label=name, alpha=0.8)
    values = [point["value"] for points in scores.values() for point in points if point["metric"] == metric]
    wide = min(values) > 0 and max(values) > LOG_FROM * min(values)
    _dress(axis, metric, x, metric, wide)
    axis.set_xlim(left=0, right=1.05 * max(np.nanmax(tables[run][x]) for run in runs))
    if not wide:
        axis.set_ylim(min(0, *values), 1.4 * max(0, *values) or 1)  # room for the legend
    axis.legend(fontsize=6, frameon=False)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
