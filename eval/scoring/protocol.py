"""What is recorded with a score, so that it can be reproduced: the protocol, its hash, the result file.

A result is JSON: `schema` (the layout's version), `status` ("complete" or "incomplete"), `metrics`, `comparable`,
`protocol` (all that the numbers depend on), `subject` (which run, step, checkpoint), `circumstances` (what they do not
depend on: command, time, processes, seconds) and `warnings`.
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
from eval.scoring.metrics import MetricOptions
from eval.scoring.options import FULL_N
from eval.scoring.references import Reference
from eval.scoring.sources import EvalTarget
from meanflow.errors import UserError
from meanflow.files import read_json, sha256_json, write_json
from meanflow.logs import aligned
from meanflow.training.settings import flatten

SCHEMA = 1


@dataclass(frozen=True)
class Request:
    """One evaluation: `metrics` of some targets, all against `reference`, all through `extractor`.

    `out` is where results go, and `cache` where features of references are kept (None: small ones, beside the results).
    """

    metrics: tuple[str, ...]
    extractor: Extractor
    reference: Reference
    options: MetricOptions
    batch: int
    out: Path
    cache: Path | None
    resume: str  # "fresh", "continue" (refused if only other evaluations lie unfinished) or "reuse" (results too)

    @property
    def layers(self) -> list[str]:
        """Of the extractor, as far as the metrics need them."""
        return sorted({self.extractor.layers[metric] for metric in self.metrics})


def protocol(request: Request, target: EvalTarget) -> dict:
    """All that a target's numbers depend on. Plain JSON; equal for any number of processes."""
    extractor = request.extractor
    return {
        "n": target.source.n,
        "samples": target.source.describe(),
        **target.how,
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


def open_work(root: Path, protocols: dict[str, dict], resume: str) -> Path:
    """The folder under `root` for the pieces of an evaluation: {target: protocol}, whose hash is its name.

    It may hold pieces already, unless `resume` is "fresh". Raises UserError if that is "continue" and only evaluations
    with other settings lie unfinished there.
    """
    folder = root / sha256_json(protocols)[:16]
    unfinished = sorted(root.glob("*/settings.json"), key=lambda path: path.stat().st_mtime)
    if folder.exists() and resume == "fresh":
        shutil.rmtree(folder)
    elif resume == "continue" and unfinished and not folder.exists():
        other, mine = flatten(read_json(unfinished[-1])), flatten(protocols)
        differing = sorted(k for k in {*other, *mine} if other.get(k) != mine.get(k))
        key = differing[0]
        raise UserError(
            f"--resume: the unfinished evaluation {unfinished[-1].parent} has other settings ({key}: "
            f"{other.get(key)} there, {mine.get(key)} here): repeat its command, or drop --resume to begin anew"
        )
    if not (folder / "settings.json").exists():
        write_json(folder / "settings.json", protocols)
    return folder


def up_to_date(path: Path, protocol: dict) -> dict | None:
    """The complete result at `path` if it was made under the same protocol."""
    if not path.exists():
        return None
    found = read_json(path)
    same = found.get("status") == "complete" and found.get("protocol") == json.loads(json.dumps(protocol))
    return found if same else None


def result(
    request: Request,
    target: EvalTarget,
    status: str,
    metrics: dict[str, float],
    warnings: list[str],
    circumstances: dict,
) -> dict:
    """The JSON of one target, as described at the top of this file."""
    known = request.extractor.is_inception and not request.extractor.warnings
    return {
        "schema": SCHEMA,
        "name": target.name,
        "status": status,
        "metrics": metrics,
        "comparable": status == "complete" and known and target.source.n >= FULL_N,
        "protocol": protocol(request, target),
        "subject": target.about,
        "circumstances": {
            "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "machine": platform.machine(),
            **circumstances,
        },
        "warnings": warnings,
    }


def best_guidance(results: list[dict], metric: str) -> list[str]:
    """For each EMA and NFE of which several guidances were scored: which has the least `metric`, a distance."""
    groups: dict[tuple, list[dict]] = {}
    for item in results:
        if "guidance" in (how := item["protocol"]) and metric in item["metrics"]:
            groups.setdefault((how["ema"], tuple(how["time_grid"])), []).append(item)
    lines = []
    for (ema, grid), items in groups.items():
        if len(items) > 1:
            best = min(items, key=lambda item: item["metrics"][metric])
            (low, high), value = best["protocol"]["interval"], best["metrics"][metric]
            chosen = f"--guidance {best['protocol']['guidance']:g} --interval {low:g},{high:g}"
            lines.append(f"best of {len(items)} at NFE {len(grid) - 1}, EMA {ema}: {chosen}, {metric} {value:.4f}")
    return lines


def table(results: list[dict]) -> str:
    """Results as text, a row for each target. Fewer than 50,000 samples: "not comparable"."""
    names = list(dict.fromkeys(name for result in results for name in result["metrics"]))
    rows = [["", *names, "N", ""]]
    for item in results:
        n = item["protocol"]["n"]
        note = "" if item["comparable"] else "not comparable"
        values = [f"{item['metrics'][name]:.4f}" if name in item["metrics"] else "-" for name in names]
        rows.append([item["name"], *values, f"{n:,}", note])
    return "\n".join(aligned(rows))
