"""The picture of guidance as an input: accuracy and distance against the scale ω, above samples at some of them."""

from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import NullLocator, PercentFormatter
from torch import Tensor

from eval.sampling.grid import grid
from meanflow.errors import write_errors_named
from meanflow.files import replacing
from meanflow.logs import aligned

DISTANCE, ACCURACY = "#1f5fa8", "#d1603d"


@dataclass(frozen=True)
class Curve:
    """A value for each scale of `omegas`, in rising order. accuracies 0 … 1, None where no classifier can judge."""

    metric: str
    omegas: tuple[float, ...]
    interval: tuple[float, float]
    distances: tuple[float, ...]
    accuracies: tuple[float, ...] | None
    real_accuracy: float | None
    n: int
    nfe: int
    ema: str
    step: int

    @property
    def best(self) -> int:
        """Which scale has the least distance."""
        return int(np.argmin(self.distances))

    def table(self) -> str:
        """Text: a row for each scale."""
        rows = [["guidance", self.metric, "accuracy"]]
        for k, (omega, distance) in enumerate(zip(self.omegas, self.distances, strict=True)):
            accuracy = "" if self.accuracies is None else f"{self.accuracies[k]:.1%}"
            rows.append([f"ω {omega:g}", f"{distance:.4f}", accuracy, "least distance" if k == self.best else ""])
        rows[0].append("")
        return "\n".join(["", *aligned(rows)])


def draw(curve: Curve, samples: dict[float, Tensor], columns: int, out: Path) -> None:
    """Write the PNG. samples: {ω: uint8 (N, C, H, W)}, shown in grids of `columns`. Raises AssetError from the disk."""
    figure = plt.figure(figsize=(7.2, 5.3), dpi=160, layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[3.5, 1.8])
    axis = top.subplots()
    axis.set_xscale("log")
    axis.set_xticks(curve.omegas, [f"{omega:g}" for omega in curve.omegas])
    axis.xaxis.set_minor_locator(NullLocator())
    low, high = curve.interval
    within = "" if (low, high) == (0, 1) else f", for t in [{low:g}, {high:g}]"
    axis.set_xlabel(f"guidance scale ω, chosen after training{within} (1: none)")
    axis.plot(curve.omegas, curve.distances, "o-", color=DISTANCE, label=f"distance ({curve.metric}, less is better)")
    best = curve.omegas[curve.best], curve.distances[curve.best]
    axis.plot(*best, "o", markersize=11, markerfacecolor="none", color=DISTANCE)
    axis.annotate(f"{best[1]:.3g}", best, (0, 10), textcoords="offset points", ha="center", color=DISTANCE, fontsize=9)
    axis.set_ylabel(f"distance ({curve.metric})", color=DISTANCE)
    axis.set_ylim(0, 1.15 * max(curve.distances))
    axis.tick_params(axis="y", colors=DISTANCE)
    axis.spines[["top", "right"]].set_visible(False)
    if curve.accuracies is not None:
        other = axis.twinx()
        other.plot(curve.omegas, curve.accuracies, "s-", color=ACCURACY)
        other.axhline(curve.real_accuracy, color=ACCURACY, linestyle=":", linewidth=1)
        other.annotate(
            "real images", (1, curve.real_accuracy), (-2, -3), xycoords=("axes fraction", "data"),
            textcoords="offset points", ha="right", va="top", color=ACCURACY, fontsize=8,
        )  # fmt: skip
        other.set_ylabel("recognised as the class asked for", color=ACCURACY)
        floor = min(0.9, min(curve.accuracies) - 0.02)
        other.set_ylim(max(0.0, floor), 1 + 0.04 * (1 - max(0.0, floor)))
        other.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        other.tick_params(axis="y", colors=ACCURACY)
        other.spines[["top", "left"]].set_visible(False)
    title = f"One network, {curve.nfe}-NFE samples: guidance is an input"
    axis.set_title(f"{title} ({curve.n:,} samples a scale, the same noises)", fontsize=10)
    _draw_samples(bottom, samples, columns)
    with replacing(out) as file, write_errors_named(out):
        figure.savefig(file, format="png")
    plt.close(figure)


def _draw_samples(figure, samples: dict[float, Tensor], columns: int) -> None:
    axes = np.atleast_1d(figure.subplots(1, len(samples)))
    for axis, (omega, images) in zip(axes, samples.items(), strict=True):
        picture = grid(images, columns, gap=1)
        axis.imshow(picture, cmap="gray" if picture.mode == "L" else None, vmin=0, vmax=255)
        axis.set_title(f"ω = {omega:g}", fontsize=9)
        axis.axis("off")
