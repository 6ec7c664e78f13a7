"""Short real runs of the digits demo: killed and continued, and in two processes."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from eval.checking.report import FAILED, NOT_RUN, OK, Finding
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
STEPS = 24
SHORT = (f"train.steps={STEPS}", "train.deterministic=true", "checkpoint.every=8", "train.batch=16")
SHORT += ("logging.flush_every=1",)  # so that the file says how far a run is
SHORT += ("train.compile=null", "eval.samples=128", "eval.batch=128", "eval.every_samples=128", "eval.steps=[1]")
SECONDS = 120  # for one of these runs, most of which is the start
LOSS_TOLERANCE = 1e-4  # sums over processes are rounded in another order, and the steps let it grow


def killed_and_resumed(folder: Path, device: torch.device) -> Iterator[Finding]:
    """A run that is killed and started again ends with the weights of one that was not."""
    whole, torn = folder / "whole", folder / "torn"
    finish(start(whole, device))
    process = start(torn, device)
    _kill_after(process, torn, step=STEPS // 2)
    reached = len(list(read_metrics(torn / "metrics.jsonl")))
    finish(start(torn, device))
    one, two = (find_checkpoint(run)[1] for run in (whole, torn))
    difference = largest_difference(one, two)
    figure = f"killed after step {reached} of {STEPS}: " + (
        "weights, averages and moments are equal to the bit" if difference == 0 else f"differ by up to {difference:.1e}"
    )
    yield Finding("demo, killed and continued", OK if difference == 0 else FAILED, figure)


def two_processes(folder: Path, device: torch.device) -> Iterator[Finding]:
    """Two processes with half of each batch compute what one does with the whole."""
    name = "demo, two processes against one"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        yield Finding(name, NOT_RUN, "there is one GPU")
        return
    runs = {processes: folder / f"processes-{processes}" for processes in (1, 2)}
    for processes, run in runs.items():
        finish(start(run, device, processes))
    one, two = ([line["loss"] for line in read_metrics(run / "metrics.jsonl")] for run in runs.values())
    error = max(abs(a - b) / abs(a) for a, b in zip(one, two, strict=True))
    outcome = OK if error < LOSS_TOLERANCE else FAILED
    yield Finding(name, outcome, f"losses of {STEPS} steps differ by up to {error:.1e}")


def start(run: Path, device: torch.device, processes: int = 1) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "run.py"), "demo", "--out", str(run), "--device", device.type]
    environment = os.environ | {"NPROC": str(processes), "PYTHONPATH": str(ROOT)}
    with (run.parent / f"{run.name}.log").open("a") as output:
        return subprocess.Popen(
            [*command, "--set", *SHORT], stdout=output, stderr=subprocess.STDOUT, cwd=run.parent, env=environment
        )


def finish(process: subprocess.Popen) -> None:
    """Raises RuntimeError with the last line of what it said if it fails."""
    try:
        code = process.wait(SECONDS)
    except subprocess.TimeoutExpired:
        process.terminate()
        raise
    if code:
        run = Path(process.args[process.args.index("--out") + 1])
        said = (run.parent / f"{run.name}.log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"exit code {code}: {said[-1] if said else ''}")


def _kill_after(process: subprocess.Popen, run: Path, step: int) -> None:
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + SECONDS
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.exists() and metrics.read_bytes().count(b"\n") >= step:
            break
        time.sleep(0.01)
    if process.poll() is not None:
        raise RuntimeError("the run ended before it could be killed")
    process.kill()
    process.wait()


def largest_difference(one: Checkpoint, two: Checkpoint) -> float:
    """Of any weight, average or moment, absolute."""
    pairs = [(one.model, two.model)]
    for parts in ((one.ema, two.ema), (one.optimizer, two.optimizer)):
        pairs += [(parts[0][name], parts[1][name]) for name in parts[0]]
    return max(float((a[name] - b[name]).abs().max()) for a, b in pairs for name in a)
