"""What the machine is, and the tests of the suite that need a GPU."""

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from eval.checking.report import FAILED, NOT_RUN, OK, Finding
from meanflow.training.microbatch import free_memory
from meanflow.training.run_folder import environment

ROOT = Path(__file__).resolve().parents[2]


def describe(device: torch.device) -> dict[str, Any]:
    """Hardware and versions: those of `environment`, and what matters to training on several devices."""
    cuda = device.type == "cuda"
    found = environment() | {"threads": torch.get_num_threads(), "memory_free": free_memory(device)}
    if not cuda:
        return found | {"devices": 1}
    return found | {
        "devices": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
        "driver": _driver(),
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if torch.distributed.is_nccl_available() else None,
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    asked = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(asked, capture_output=True, text=True, timeout=60)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def lines(found: dict[str, Any]) -> Iterator[Finding]:
    gpu = f"{found['devices']} × {found['device']}" if "cuda" in found else f"no GPU; {found['device']}"
    yield Finding("device", OK, f"{gpu}, {found['cores']} cores, {found['threads']} threads")
    yield Finding("PyTorch", OK, f"{found['torch']}, torchvision {found['torchvision']}, Python {found['python']}")
    if "cuda" in found:
        versions = ", ".join(f"{name} {found[name]}" for name in ("cuda", "driver", "cudnn", "nccl", "capability"))
        yield Finding("CUDA", OK, versions)
    if found["memory_free"] is not None:
        yield Finding("memory free", OK, f"{found['memory_free'] / 1e9:.1f} GB")


def gpu_tests(device: torch.device) -> Iterator[Finding]:
    """The tests that skip themselves without a GPU, in a process of their own."""
    name, missing = "pytest -m gpu", None
    if device.type != "cuda":
        missing = "no GPU"
    elif importlib.util.find_spec("pytest") is None or not (ROOT / "tests").is_dir():
        missing = "needs a checkout with its tests, and requirements-dev.txt"
    if missing:
        yield Finding(name, NOT_RUN, missing)
        return
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "--durations=0", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    last = (done.stdout.strip().splitlines() or [done.stderr.strip()[-200:]])[-1]
    yield Finding(name, OK if done.returncode == 0 else FAILED, last.strip("= "))
