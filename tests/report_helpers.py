"""Run folders as plots and reports read them, with known contents."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from meanflow.errors import UserError


def write_run(folder: Path, steps: int = 300, starts: list[dict] = (), **columns: Any) -> Path:
    """A run folder whose metrics are known; `columns` are values, or functions of the step."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(steps)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "images": step * 8}
            line |= {key: 100 / step * math.exp(numbers.normal() / 5) for key in ("loss", "error", "grad_norm")}
            line |= {"lr": min(1.0, step / 50), "images_per_s": 80.0, "seconds": step / 10, "memory_mb": 300.0}
            line |= {key: value(step) if callable(value) else value for key, value in columns.items()}
            file.write(json.dumps(line) + "\n")
    (folder / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    return folder


def write_score(
    run: Path,
    value: float,
    nfe: int = 1,
    n: int = 1000,
    metric: str = "fd-pixels",
    step: int = 6,
    ema: str = "0.9",
    **more: Any,
) -> None:
    """A result of `run.sh fid`, as far as it is read; `more` replaces parts of it."""
    (run / "eval").mkdir(exist_ok=True)
    extractor = "inception-v3-compat" if metric == "fid" else metric.rpartition("-")[2]
    protocol = {"n": n, "nfe": nfe, "ema": ema, "metrics": ["fid"], "extractor": extractor}
    result = {
        "status": "complete",
        "metrics": {metric: value},
        "comparable": False,
        "subject": {"step": step},
        "protocol": protocol | {"reference": {"spec": more.pop("reference", "digits-train")}},
        "circumstances": {"command": "fid.py RUN --steps 1"},
        "warnings": [],
    } | more
    name = f"{len(list((run / 'eval').iterdir())):03d}.json"
    (run / "eval" / name).write_text(json.dumps(result))


def refused(kind: type[UserError], command, *arguments: Any) -> str:
    """The single line with which `command` refuses these arguments."""
    with pytest.raises(kind) as caught:
        command([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return str(caught.value)
