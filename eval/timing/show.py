"""The table and the picture of latencies."""

import io
from collections.abc import Sequence

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from eval.timing.measure import Latency
from meanflow.logs import aligned

COLOURS = ("#0b6bcb", "#d9480f", "#2b8a3e")
MARKERS = ("o", "s", "^", "D", "v")


def table(name: str, rows: Sequence[Latency]) -> str:
    """Lines: milliseconds of a batch, with quartiles, and images a second."""
    header = ("how", "NFE", "batch", "ms", "quartiles", "ms/image", "images/s")
    lines: list[Sequence[str]] = [header]
    for row in rows:
        cells = ["left out", "", "", ""]
        if row.seconds is not None:
            ms = [1e3 * x for x in (row.seconds.median, row.seconds.low, row.seconds.high)]
            spread = f"{number(ms[1])} – {number(ms[2])}"
            cells = [number(ms[0]), spread, number(ms[0] / row.batch), number(row.images_per_s)]
        lines.append((row.mode, str(row.steps), str(row.batch), *cells))
    return "\n".join([name, *aligned(lines)])


def number(x: float) -> str:
    """Three digits."""
    return f"{x:,.0f}" if x >= 100 else f"{x:.3g}"


def ratios(rows: Sequence[Latency]) -> str:
    """How much longer the most evaluations take than one, by each way, at the smallest batch."""
    smallest, most = min(row.batch for row in rows), max(row.steps for row in rows)
    parts = []
    for mode in dict.fromkeys(row.mode for row in rows):
        found = {r.steps: r.seconds for r in rows if r.mode == mode and r.batch == smallest and r.seconds}
        if 1 in found and most in found and most > 1:
            times = found[most].median / found[1].median
            parts.append(f"{mode}: {most} evaluations take {times:.1f} times as long as one (batch {smallest})")
    return "; ".join(parts)


def picture(measured: dict[str, Sequence[Latency]], where: str) -> bytes:
    """A PNG: milliseconds an image over NFE, a panel for each run, a line for each way and batch."""
    figure, axes = plt.subplots(
        1, len(measured), figsize=(4.6 * len(measured), 3.8), squeeze=False, layout="constrained"
    )
    for ax, (name, rows) in zip(axes[0], measured.items(), strict=True):
        modes, batches = (list(dict.fromkeys(getattr(row, key) for row in rows)) for key in ("mode", "batch"))
        for mode in modes:
            for batch in batches:
                line = [r for r in rows if r.mode == mode and r.batch == batch and r.seconds is not None]
                style = {
                    "color": COLOURS[modes.index(mode) % len(COLOURS)],
                    "marker": MARKERS[batches.index(batch) % len(MARKERS)],
                }
                label = f"{mode}, batch {batch}"
                if line:
                    ms = [1e3 * row.seconds.median / batch for row in line]
                    ax.plot([row.steps for row in line], ms, label=label, **style)
        steps = sorted({row.steps for row in rows})
        ax.set(xscale="log", yscale="log", xlabel="network evaluations (NFE)", ylabel="ms an image", title=name)
        ax.set_xticks(steps, [str(k) for k in steps])
        ax.minorticks_off()
        ax.legend(fontsize="x-small")
    figure.suptitle(where, fontsize="small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=120)
    plt.close(figure)
    return out.getvalue()
