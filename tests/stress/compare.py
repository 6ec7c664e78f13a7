"""Are two runs the same?"""

import hashlib
import json
from pathlib import Path

import torch
from running import assert_equal_runs, comparable_metrics


def assert_equal_jobs(a: Path, b: Path) -> None:
    """Also the samples and every score; and nothing is left that would have to be cleaned up by hand."""
    assert_equal_runs(a, b)
    assert scores(a) == scores(b) != {}
    for name in ("samples.png", "curves.png"):
        assert (b / name).exists(), name
    assert (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    left = [path for path in b.rglob("*") if path.suffix == ".tmp" or path.name == "work"]
    assert not left, f"left behind: {left}"


def scores(run: Path) -> dict[str, dict]:
    return {path.name: json.loads(path.read_text())["metrics"] for path in sorted((run / "eval").glob("*.json"))}


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Relative to the largest number of all."""
    assert a.keys() == b.keys()
    scale = max(float(x.abs().max()) for x in a.values())
    return max(float((a[name] - b[name]).abs().max()) for name in a) / scale


def curve_difference(a: Path, b: Path, key: str = "loss") -> float:
    """The largest relative difference of a metric at any step."""
    ours, theirs = ([line[key] for line in comparable_metrics(run)] for run in (a, b))
    assert len(ours) == len(theirs)
    return max(abs(x - y) / abs(x) for x, y in zip(ours, theirs, strict=True))


def sha256_of(folder: Path) -> dict[str, str]:
    """Of every file that is not hidden, by name; the plan and manifest may name another place."""
    files = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
