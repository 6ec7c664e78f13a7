"""What the job says at its end."""

import math
from pathlib import Path
from typing import Any

from eval.scoring.score import REAL_VS_REAL_UP_TO, real_vs_real
from meanflow.training.config import RunConfig
from meanflow.training.run_folder import RunFolder


def closing_table(config: RunConfig, run: RunFolder, results: list[dict[str, Any]]) -> str:
    """Scores by NFE, the real-vs-real distance where it is cheap, and where the files are."""
    cells = [("distance", "value", "samples")]
    for result in results:
        for name, value in result["metrics"].items():
            protocol = result["protocol"]
            note = "" if result["comparable"] or name.startswith("fd-") else " (not comparable)"
            cells.append((f"{protocol['nfe']}-NFE {name}{note}", f"{value:.3f}", f"{protocol['n']:,}"))
    if math.prod(config.image_shape) <= REAL_VS_REAL_UP_TO:
        cells.append(("two halves of the real images", f"{real_vs_real(config):.3f}", ""))
    width = max(len(row[0]) for row in cells)
    lines = [f"{name:<{width}}  {value:>9}  {count:>9}".rstrip() for name, value, count in cells]
    files = [f"{label:<8}  {path}" for label, path in _files(run).items()]
    return "\n".join(["", *lines, "", *files])


def _files(run: RunFolder) -> dict[str, Path]:
    return {
        "samples": run.path / "samples.png",
        "curves": run.curves,
        "scores": run.eval,
        "metrics": run.metrics_file,
        "weights": run.checkpoints,
    }
