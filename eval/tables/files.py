"""A table as table.md, table.csv and table.json, and as text for the terminal."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from meanflow.files import write_text
from meanflow.logs import aligned


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
        write_text(out / name, text)
    return "\n".join([*aligned(rows), "", facts["question"], *notes])
