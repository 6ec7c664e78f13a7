"""What the benchmark prints."""

from typing import Any

from eval.benchmark.clock import Spread
from eval.benchmark.rows import Report
from meanflow.logs import aligned


def machine(where: dict[str, Any]) -> str:
    """`where`: meanflow.training.run_folder.environment, and threads."""
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}, Python {where['python']}"


def table(report: Report) -> str:
    """The report as two tables: steps and figures."""
    head = (
        f"{report.recipe}: {report.parameters / 1e6:.2f} M parameters, batch {report.batch}, r≠t {report.share:.0%}; "
        "medians and quartiles; matrix rate "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in report.matrix_rates.items())
    )
    steps = [("step", "s/step", "", "images/s", "peak MB", "TFLOP/s", "of matrix rate")]
    for step in report.steps:
        rate = (f"{step.tflops_per_s:.3g}", f"{step.of_matrix_rate:.0%}")
        memory = "" if step.memory_mb is None else f"{step.memory_mb:,.0f}"
        steps.append((step.name, *_cells(step.seconds, "{:.3g}"), f"{step.images_per_s:.3g}", memory, *rate))
    forms = {row: "{:.1%}" if row.name.startswith("share") else "{:.2f}" for row in report.rows}
    rows = [("figure", "measured", ""), *((row.name, *_cells(row.figure, form)) for row, form in forms.items())]
    return "\n".join([head, *aligned(steps, left=len(steps[0])), "", *aligned(rows, left=len(rows[0]))])


def _cells(spread: Spread, form: str) -> tuple[str, str]:
    return form.format(spread.median), f"{form.format(spread.low)} – {form.format(spread.high)}"
