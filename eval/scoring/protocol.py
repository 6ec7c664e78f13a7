"""What is recorded beside a number, so that it can be made again: the protocol, its hash, the result file.

A result is JSON: `schema` (the layout's version), `status` ("complete" or "incomplete"), `metrics`,
`comparable`, `protocol` (all that the numbers depend on), `subject` (which run, step, checkpoint),
`circumstances` (what they do not depend on: command, time, processes, seconds) and `warnings`.
"""

import datetime
import json
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity

from eval.scoring.extractors import Extractor
from eval.scoring.files import read_json, sha256_json, write_json
from eval.scoring.metrics import MetricOptions
from eval.scoring.references import Reference
from eval.scoring.sources import Source
from meanflow.errors import UserError

SCHEMA = 1
FULL_N = 50_000  # what "FID" means without another number beside it


@dataclass(frozen=True)
class Variant:
    """One thing to score: `source` under a file-safe `name`; `how` (steps, EMA, …) is part of the protocol.

    `subject` says what was scored without changing the numbers (run folder, step, images seen).
    """

    name: str
    source: Source
    how: dict
    subject: dict


@dataclass(frozen=True)
class Request:
    """One evaluation: `metrics` of some variants, all against `reference`, all through `extractor`."""

    metrics: tuple[str, ...]
    extractor: Extractor
    reference: Reference
    options: MetricOptions
    batch: int
    out: Path
    cache: Path
    resume: str  # "fresh", "continue" (refused if only other evaluations lie unfinished) or "reuse" (results too)


def protocol(request: Request, variant: Variant) -> dict:
    """All that a variant's numbers depend on. Plain JSON; equal for any number of processes."""
    extractor = request.extractor
    return {
        "n": variant.source.n,
        "samples": variant.source.describe(),
        **variant.how,
        "metrics": list(request.metrics),
        "metric_options": asdict(request.options),
        "extractor": extractor.name,
        "extractor_weights_sha256": extractor.weights,
        "reference": request.reference.describe(),
        "batch": request.batch,
        "tf32": False,
        "device": _device_name(extractor.device),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_fidelity": torch_fidelity.__version__,
        "numpy": np.__version__,
    }


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def settings(request: Request, variants: list[Variant]) -> dict:
    """The protocols of a whole request, {variant: protocol}: what a resumed evaluation must share."""
    return {variant.name: protocol(request, variant) for variant in variants}


def flat(value: object, prefix: str = "") -> dict[str, object]:
    """{"a": {"b": 1}} → {"a.b": 1}, for comparing settings and naming what differs."""
    if not isinstance(value, dict):
        return {prefix: value}
    out: dict[str, object] = {}
    for key, item in value.items():
        out |= flat(item, f"{prefix}.{key}" if prefix else key)
    return out


def open_work(root: Path, wanted: dict, resume: str) -> Path:
    """The folder for the pieces of an evaluation with the settings `wanted`, under `root`.

    Its name is the settings' hash. It may hold pieces already, unless `resume` is "fresh". Raises UserError if that
    is "continue" and only evaluations with other settings lie unfinished there.
    """
    folder = root / sha256_json(wanted)[:16]
    unfinished = sorted(root.glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
    if folder.exists() and resume == "fresh":
        shutil.rmtree(folder)
    elif resume == "continue" and unfinished and not folder.exists():
        other, mine = flat(read_json(unfinished[-1])), flat(wanted)
        differing = sorted(k for k in {*other, *mine} if other.get(k) != mine.get(k))
        key = differing[0]
        raise UserError(
            f"--resume: the unfinished evaluation {unfinished[-1].parent} has other settings ({key}: "
            f"{other.get(key)} there, "
            f"{mine.get(key)} here): repeat its command, or drop --resume to begin anew"
        )
    if not (folder / "settings.json").exists():
        write_json(folder / "settings.json", wanted)
    return folder


def stands(path: Path, wanted: dict) -> dict | None:
    """The complete result at `path` if it was made under the protocol `wanted`."""
    if not path.exists():
        return None
    found = read_json(path)
    same = found.get("status") == "complete" and found.get("protocol") == json.loads(json.dumps(wanted))
    return found if same else None


def result(
    request: Request,
    variant: Variant,
    status: str,
    metrics: dict[str, float],
    warnings: list[str],
    circumstances: dict,
) -> dict:
    """The JSON of one variant, as described at the top of this file."""
    known = request.extractor.is_inception and not request.extractor.warnings
    return {
        "schema": SCHEMA,
        "name": variant.name,
        "status": status,
        "metrics": metrics,
        "comparable": status == "complete" and known and variant.source.n >= FULL_N,
        "protocol": protocol(request, variant),
        "subject": variant.subject,
        "circumstances": {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            **circumstances,
        },
        "warnings": warnings,
    }


def table(results: list[dict]) -> str:
    """Results as text: one row a variant. Fewer than 50,000 samples: "not comparable"."""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    rows = [["", *names, "N", ""]]
    for item in results:
        n = item["protocol"]["n"]
        note = "" if item["comparable"] else "not comparable"
        values = [f"{item['metrics'][name]:.4f}" if name in item["metrics"] else "-" for name in names]
        rows.append([item["name"], *values, f"{n:,}", note])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for name, *cells in rows:
        right = [cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)]
        lines.append("  ".join([name.ljust(widths[0]), *right]).rstrip())
    return "\n".join(lines)
