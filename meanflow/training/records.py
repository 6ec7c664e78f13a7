"""Reading a run's metrics.jsonl. Without PyTorch, whose import takes longer than drawing the curves."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from meanflow.errors import AssetError

RENAMED = {"error_still": "error_r_eq_t", "error_moving": "error_r_lt_t"}  # in files of earlier versions
BLOCK = 2**20  # bytes of a metrics file read at once
MOST = 100_000  # lines that `read_columns` parses


def read_metrics(path: Path, every: int = 1) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, one after the other; damaged ones and a torn last one are left out.

    every: k for only each k-th line, counted so that the last whole one is among them.
    """
    if not path.exists():
        return
    skip = (_count_lines(path) - 1) % every if every > 1 else 0
    with open(path, encoding="utf-8", errors="replace") as file:
        while block := file.readlines(BLOCK):
            texts = block[skip::every]
            skip = (skip - len(block)) % every
            try:
                lines = json.loads(f"[{','.join(texts)}]")  # a block at once: several times as fast
            except (ValueError, RecursionError):
                lines = []
            if len(lines) != len(texts):  # a line of the block is damaged
                lines = [parse_line(text) for text in texts]
            for line in lines:
                if isinstance(line, dict) and isinstance(line.get("step"), int):
                    yield {RENAMED.get(key, key): value for key, value in line.items()}


def parse_line(text: str) -> Any:
    """The JSON value of a line, None for a damaged one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def read_columns(path: Path, most: int = MOST) -> dict[str, np.ndarray]:
    """{name: (N,) float64} of all that a metrics file holds, in its order; NaN where a line has no such value.

    Of a file with more than `most` lines only every k-th is parsed, with k the least that leaves `most`; the last is
    among them. Empty for a file that is missing or has no whole line. Raises AssetError for values that are no numbers.
    """
    every = max(1, -(-_count_lines(path) // most)) if path.exists() else 1
    columns: dict[str, list[float]] = {}
    count = 0
    for line in read_metrics(path, every):
        for name, value in line.items():
            column = columns.setdefault(name, [])
            column.extend([math.nan] * (count - len(column)))
            column.append(math.nan if value is None else value)
        count += 1
    try:
        arrays = {name: np.array(column, dtype=np.float64) for name, column in columns.items()}
    except (TypeError, ValueError, OverflowError) as error:
        raise AssetError(f"{path}: is not a metrics file of ours ({error})") from error
    return {name: np.pad(x, (0, count - len(x)), constant_values=math.nan) for name, x in arrays.items()}


def _count_lines(path: Path) -> int:
    with open(path, "rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(BLOCK), b""))
