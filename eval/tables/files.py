"""A table as table.md, table.csv and table.json, and as text for the terminal."""

import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.scoring.files import write_atomically


def write_files(
    out: Path, facts: dict[str, Any], rows: list[list[str]], notes: list[str], sheet: list[list[Any]], runs: list[str]
) -> str:
    """Write the three files into `out`, and return the table as text.

    `facts`: description, question and scale. `rows`: cells to be read, the header first; `sheet`: the same as numbers
    to compute with; `runs`: the names of the run folders, which lie beside `out`. Raises AssetError, naming the file.
    """
    header, *body = rows
    markdown = [f"| {' | '.join(row)} |" for row in rows]
    markdown.insert(1, f"|{'---|' * len(header)}")
    page = "\n".join(
        [f"# {facts['description']}", "", facts["question"], "", *markdown, "", *(f"* {note}" for note in notes), ""]
    )
    tree = {**facts, "header": header, "rows": body, "notes": notes, "runs": runs}
    numbers = io.StringIO()
    csv.writer(numbers).writerows(sheet)
    files = {
        "table.md": page,
        "table.csv": numbers.getvalue(),
        "table.json": json.dumps(tree, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in files.items():
        write_atomically(out / name, lambda file, text=text: file.write(text.encode()))
    return "\n".join([*aligned(rows), "", facts["question"], *notes])


def aligned(rows: list[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with the first `left` columns to the left and the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
