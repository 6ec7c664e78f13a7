"""Files that plots, reports and benchmarks write where the user says."""

import os
from pathlib import Path

from meanflow.errors import AssetError, write_errors_named


def check_out(out: Path, overwrite: bool) -> None:
    """Before the work rather than after. Raises AssetError if `out` is a folder or cannot be, or is to be kept."""
    if out.is_dir():
        raise AssetError(f"--out {out}: is a folder; name a file")
    if out.exists() and not overwrite:
        raise AssetError(f"--out {out}: exists; --overwrite replaces it")
    with write_errors_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)


def write_text(out: Path, text: str) -> None:
    """`out` is the old file or the whole new one. Raises AssetError if it cannot be written."""
    temporary = out.with_name(f".{out.name}.tmp")
    with write_errors_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, out)
