"""Images/s of the recipe's step on two devices against one, gradients summed. Also the program that torchrun starts."""

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from eval.benchmark.clock import seconds_of
from eval.benchmark.steps import Setting, Step
from eval.checking.report import FAILED, NOT_RUN, OK, Finding
from eval.checking.speed import ROUNDS, Speed, changed
from meanflow.training.processes import leaving_distributed, start_distributed

ROOT = Path(__file__).resolve().parents[2]
SECONDS = 240
EXPECTED = 0.8  # of the ideal rate; less says that the gradients' exchange is slow


def two_devices(setting: Setting, best: Speed, folder: Path, device: torch.device) -> Iterator[Finding]:
    """The rate of two processes with the fastest settings as a share of twice the rate of one."""
    name = "images/s on two devices against one"
    if device.type == "cuda" and torch.cuda.device_count() < 2:
        yield Finding(name, NOT_RUN, "there is one GPU")
        return
    how = changed(setting, best.settings)
    one, two = (rate(how, processes, folder, device) for processes in (1, 2))
    share = two / (2 * one)
    figure = f"{two:.3g} against {one:.3g}: {share:.0%} of twice the rate"
    yield Finding(name, OK if share > EXPECTED else FAILED, figure)


def rate(setting: Setting, processes: int, folder: Path, device: torch.device) -> float:
    """Images/s of `processes` processes together. Raises RuntimeError with the last line that they wrote."""
    file = folder / f"rate-{processes}.json"
    fields = {**vars(setting), "recipe": str(setting.recipe), "overrides": list(setting.overrides)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command += [__file__, json.dumps(fields), device.type, str(file)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, env=environment)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["no message"])[-1])
    return json.loads(file.read_text())


def main(fields: str, kind: str, file: str) -> None:
    tree = json.loads(fields)
    setting = replace(Setting(**tree), recipe=Path(tree["recipe"]), overrides=tuple(tree["overrides"]))
    with leaving_distributed():
        ctx = start_distributed(kind)
        step = Step(setting, ctx.device, ctx=ctx)
        step()
        ctx.barrier()
        seconds = statistics.median(seconds_of(step, ctx.device) for _ in range(ROUNDS))
        ctx.barrier()
        if ctx.is_main:
            Path(file).write_text(json.dumps(setting.batch * ctx.world / seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
