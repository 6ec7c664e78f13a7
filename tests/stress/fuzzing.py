"""The fuzz tests with thousands of inputs each."""

import os
import re
import subprocess
import sys
from pathlib import Path

from running import ROOT


def fuzz(folder: Path, inputs: int) -> str:
    """`pytest tests/fuzz` in a process of its own."""
    command = [sys.executable, "-m", "pytest", "tests/fuzz", "-p", "no:cacheprovider", f"--basetemp={folder / 'files'}"]
    environment = {**os.environ, "MEANFLOW_FUZZ": str(inputs), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    (folder / "log").write_text(done.stdout + done.stderr)
    assert done.returncode == 0, f"see {folder / 'log'}: {done.stdout[-300:]}"
    found = {
        path: len(re.findall("^@given", path.read_text(), re.M)) for path in (ROOT / "tests/fuzz").glob("test_*.py")
    }
    listed = ", ".join(f"{path.stem.removeprefix('test_fuzz_')} {n * inputs:,}" for path, n in sorted(found.items()))
    return f"{sum(found.values()) * inputs:,} inputs ({listed})"
