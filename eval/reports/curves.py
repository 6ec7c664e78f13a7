"""The figure of training curves: a panel for every value of metrics.jsonl, and for scores along the run."""

import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogFormatter, MaxNLocator, StrMethodFormatter

from eval.reports.read import RunRecord, Score, read_runs
from meanflow.errors import AssetError
from meanflow.training.run_folder import RunFolder

X = {"step": "step", "images": "images seen", "seconds": "seconds of training"}
LOG_FROM = 4  # values that differ by more than this factor get a log axis
COLOURS = ("#1f5fa8", "#d1603d", "#3c8d5a", "#7a4fa3", "#b8860b", "#4d4d4d")
MARKERS = "os^Dvx*"
POINTS = 2000  # drawn of a curve: about as many as the picture has pixels
LINES = 15  # of text in a panel
NAMES = 3  # changed settings that a mark spells out


@dataclass(frozen=True)
class Panel:
    """A value of metrics.jsonl: a title that explains it, its unit, and if its axis is logarithmic (None: as helps)."""

    key: str
    title: str
    unit: str = ""
    log: bool | None = None


ERRORS = (  # as several objectives log them (meanflow/objectives/base.py); each may say more in its titles
    Panel("error", "error, all samples"),
    Panel("error_r_eq_t", "error at r = t"),
    Panel("error_r_lt_t", "error at r < t"),
)
ALWAYS = (
    Panel("loss", "training loss"),
    Panel("grad_norm", "gradient norm"),
    Panel("lr", "learning rate", log=False),
    Panel("images_per_s", "throughput", "images/s", False),
    Panel("memory_mb", "peak memory", "MB", False),
    Panel("skipped", "updates left out by the spike guard", log=False),
)


def plot(runs: list[RunFolder], out: Path, x: str = "step", smooth: float = 0.02) -> None:
    """Draw the curves of run folders into `out`; see `draw`."""
    draw(read_runs(runs), out, x, smooth)


def draw(runs: tuple[RunRecord, ...], out: Path, x: str = "step", smooth: float = 0.02) -> None:
    """Write the figure, overlaying several runs.

    x: "step", "images" or "seconds"; smooth: width of the running mean, as a share of the run.
    Raises AssetError, naming the run, if there is nothing to draw or it cannot be written.
    """
    for run in runs:
        if not np.isfinite(run.columns.get(x, np.nan)).all():
            raise AssetError(f"{run.folder.metrics_file}: does not have {x} in every line")
    shown = panels_of(runs)
    if not shown:
        raise AssetError(f"{', '.join(str(run.folder.path) for run in runs)}: metrics.jsonl has steps but no metrics")
    colours = {run: COLOURS[k % len(COLOURS)] for k, run in enumerate(runs)}
    along, single = scores_of(runs)
    texts = [single[k : k + LINES] for k in range(0, len(single), LINES)]
    count = len(shown) + len(along) + len(texts)
    across = 3 if count <= 9 else 4
    down = -(-count // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 2.9 * down), squeeze=False, layout="constrained")
    axes = axes.ravel()
    try:
        for axis, panel in zip(axes, shown, strict=False):
            _value_panel(axis, panel, colours, x, smooth)
        for axis, (title, series) in zip(axes[len(shown) :], along.items(), strict=False):
            _score_panel(axis, title, series, colours, x)
        for axis in axes[: len(shown) + len(along)]:
            _mark_changes(axis, runs, colours, x)
        for axis, lines in zip(axes[len(shown) + len(along) :], texts, strict=False):
            _text_panel(axis, lines, colours)
        for axis in axes[len(shown) + len(along) :]:
            axis.axis("off")
        _legend(figure, axes[0], runs, smooth)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=110, format=out.suffix[1:] or "png")
    except (OSError, ValueError) as error:
        raise AssetError(f"{out}: cannot be written ({error})") from error
    finally:
        plt.close(figure)


def panels_of(runs: Iterable[RunRecord]) -> list[Panel]:
    """What the objectives logged, in the file's order, then what every run has. What is nowhere there is left out."""
    values = {name: 0 for run in runs for name, column in run.columns.items() if np.isfinite(column).any()}
    titles = {name: title for run in runs for name, title in run.titles.items()}
    known = {panel.key: panel for panel in (*ERRORS, *ALWAYS)}
    always = [panel.key for panel in ALWAYS]
    own = [name for name in values if name not in (*X, *always)]
    found = [known.get(name, Panel(name, name)) for name in (*own, *(name for name in always if name in values))]
    return [Panel(p.key, titles.get(p.key, p.title), p.unit, p.log) for p in found]


# --- values ----------------------------------------------------------------------------------------------------------


def _value_panel(axis: Axes, panel: Panel, colours: dict[RunRecord, str], x: str, smooth: float) -> None:
    bounds = []
    for run, colour in colours.items():
        values = run.columns.get(panel.key)
        keep = np.zeros(0, bool) if values is None else np.isfinite(values)
        axis.plot([], [], color=colour, label=run.name)  # in the legend, even where there is no curve
        if keep.any():
            xs, ys = run.columns[x][keep], values[keep]
            _curve(axis, xs, ys, colour, smooth)
            bounds.append(np.percentile(ys, [0.2, 50, 99.8]))  # one outlier must not flatten the curve
    low, middle, high = np.array(bounds).T
    differ = low.min() > 0 and middle.max() > LOG_FROM * middle.min()
    spread = low.min() > 0 and high.max() > LOG_FROM * low.min()
    log = differ or (spread if panel.log is None else panel.log)
    _dress(axis, panel.title, x, panel.unit, log)
    if not log:
        bottom, top = min(0, low.min()), max(0, high.max())
        margin = 0.08 * (top - bottom) or 1
        axis.set_ylim(bottom - margin * (bottom < 0), top + margin)
    ends = [run.columns[x][-1] for run in colours]
    if max(ends) > 10 * min(ends) > 0:  # a short run beside a long one
        axis.set_xscale("log")


def _curve(axis: Axes, xs: np.ndarray, ys: np.ndarray, colour: str, smooth: float) -> None:
    """The range of the steps, pale, and their running mean; without smoothing, or for few steps, these themselves."""
    width = _width(smooth, ys)
    if width == 1:
        axis.plot(xs, ys, color=colour, linewidth=1.2, marker="o" if len(ys) < 20 else "")
        return
    cuts = np.arange(0, len(ys), max(1, len(ys) * 2 // POINTS))
    ranges = np.column_stack([np.minimum.reduceat(ys, cuts), np.maximum.reduceat(ys, cuts)])
    axis.plot(np.repeat(xs[cuts], 2), ranges.ravel(), color=colour, alpha=0.25, linewidth=0.6)
    some = np.unique(np.linspace(0, len(ys) - 1, POINTS).round().astype(int))
    axis.plot(xs[some], running_mean(ys, width)[some], color=colour, linewidth=1.6)


def _width(smooth: float, values: np.ndarray) -> int:
    return max(1, round(smooth * len(values)))


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """The mean of the up to `width` values around each; the window shrinks at both ends, so nothing is invented."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    centre = np.arange(len(values))
    first, last = np.maximum(0, centre - width // 2), np.minimum(len(values), centre + width - width // 2)
    return (total[last] - total[first]) / (last - first)


def _dress(axis: Axes, title: str, x: str, unit: str, log: bool) -> None:
    axis.set_title(textwrap.fill(title, 56), fontsize=9)
    axis.set_xlabel(X[x], fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(which="both", labelsize=8)
    axis.xaxis.set_major_locator(MaxNLocator(5))
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.12g}"))
    plain(axis, log)


def plain(axis: Axes, log: bool) -> None:
    """The look of all panels: a pale grid, no box; on a log axis 0.4, 0.6, 1 rather than powers of ten."""
    if log:
        axis.set_yscale("log")
        for which in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            which(_Numbers(minor_thresholds=(1.5, 0.5)))
    axis.grid(alpha=0.25, which="both" if log else "major", linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)


class _Numbers(LogFormatter):
    """As they are read; which ticks have one is LogFormatter's choice."""

    def __call__(self, x: float, pos: int | None = None) -> str:
        return f"{x:g}" if super().__call__(x, pos) else ""


def _mark_changes(axis: Axes, runs: Iterable[RunRecord], colours: dict[RunRecord, str], x: str) -> None:
    """A thin line where a run went on under other settings, with their keys."""
    for run in runs:
        for step, changed in run.changes:
            where = np.interp(step, run.columns["step"], run.columns[x])
            keys = [*list(changed)[:NAMES], *(["…"] if len(changed) > NAMES else [])]
            axis.axvline(where, color=colours[run], linewidth=0.7, linestyle=(0, (4, 3)))
            how = {"rotation": 90, "fontsize": 6, "va": "top", "ha": "right", "color": colours[run]}
            left = {"xycoords": axis.get_xaxis_transform(), "xytext": (-1.5, 0), "textcoords": "offset points"}
            axis.annotate(", ".join(keys), (where, 0.98), **left, **how)


def _legend(figure, axis: Axes, runs: tuple[RunRecord, ...], smooth: float) -> None:
    """Names of the runs, and what has to be known to read the curves."""
    means = any(_width(smooth, run.columns["step"]) > 1 for run in runs)
    notes = [f"pale: range of the steps; dark: mean over {smooth:.0%} of the run" if means else ""]
    notes += [f"{run.name}: from every {run.every}th step" for run in runs if run.every > 1]
    notes += [f"{run.name}: {note}" if len(runs) > 1 else note for run in runs for note in run.ema_notes()]
    handles, labels = axis.get_legend_handles_labels()
    how = {"loc": "outside lower center", "ncols": min(4, len(labels)), "frameon": False}
    legend = figure.legend(handles, labels, **how, title="\n".join(filter(None, notes)), title_fontsize=8)
    legend.get_title().set_multialignment("center")


# --- scores ----------------------------------------------------------------------------------------------------------

Series = dict[tuple[RunRecord, str], list[Score]]


def scores_of(runs: Iterable[RunRecord]) -> tuple[dict[str, Series], list[tuple[RunRecord, str]]]:
    """{title: its curves} of the metrics that were computed along a run, and a line of text for each other score."""
    grouped: dict[tuple[str, str], Series] = {}
    for run in runs:
        for score in sorted(run.scores, key=lambda score: (score.nfe, score.ema, score.n, score.step)):
            if score.value is not None:
                series = grouped.setdefault((score.metric, score.reference), {})
                series.setdefault((run, score.how), []).append(score)
    metrics = [metric for metric, _ in grouped]
    along: dict[str, Series] = {}
    single = []
    several = len(list(runs)) > 1
    for (metric, reference), series in grouped.items():
        title = metric if metrics.count(metric) == 1 else f"{metric} against {reference}"
        if max(map(len, series.values())) > 1:
            along[title] = series
            continue
        for (run, how), (score,) in series.items():
            value = f"{score.value:.4g}" + (f" ± {score.deviation:.2g}" if score.deviation is not None else "")
            of = f"{run.name}, " if several else ""
            single.append((run, f"{title}: {value} ({of}{how}, step {score.step:,})"))
    return along, single


def _score_panel(axis: Axes, title: str, series: Series, colours: dict[RunRecord, str], x: str) -> None:
    several = len(colours) > 1
    markers = {run: cycle(MARKERS) for run in colours}
    for (run, how), scores in series.items():
        xs = np.interp([score.step for score in scores], run.columns["step"], run.columns[x])
        axis.errorbar(
            xs,
            [score.value for score in scores],
            [score.deviation or 0 for score in scores] if any(score.deviation for score in scores) else None,
            marker=next(markers[run]),
            markersize=4,
            color=colours[run],
            linewidth=1,
            capsize=2,
            alpha=0.8,
            label=f"{run.name}: {how}" if several else how,
        )
    values = [score.value for scores in series.values() for score in scores]
    log = min(values) > 0 and max(values) > LOG_FROM * min(values)
    _dress(axis, title, x, "", log)
    axis.set_xlim(left=0, right=1.05 * max(np.nanmax(run.columns[x]) for run in colours))
    if not log:
        axis.set_ylim(min(0, *values), 1.4 * max(0, *values) or 1)  # room for the legend
    axis.legend(fontsize=6, frameon=False)


def _text_panel(axis: Axes, lines: list[tuple[RunRecord, str]], colours: dict[RunRecord, str]) -> None:
    axis.set_title("scores", fontsize=9)
    for k, (run, text) in enumerate(lines):
        axis.text(0, 0.97 - k / LINES, text, fontsize=7, va="top", color=colours[run], transform=axis.transAxes)
