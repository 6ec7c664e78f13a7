"""`metrics.jsonl`: one line a step. The device is read once in many steps, never each step."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from meanflow.errors import write_errors_named
from meanflow.objectives import Loss
from meanflow.training.divergence import NotFinite
from meanflow.training.processes import DistributedContext
from meanflow.training.records import BLOCK, parse_line
from meanflow.training.records import read_metrics as read_metrics


class StepSums:
    """Sums over this process's samples of one step: of the loss and of each value that the objective logs.

    Sums are on the device, counts on the host: nothing waits.
    """

    def __init__(self):
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}

    def add(self, loss: Loss) -> None:
        for name, value in {"loss": loss.per_sample.detach(), **loss.logged}.items():
            values, rows = value if isinstance(value, tuple) else (value, None)
            if rows is not None and not rows.all():
                values = values[rows.nonzero()[:, 0].to(values.device, non_blocking=True)]
            self.sums[name] = self.sums.get(name, 0) + values.detach().float().sum()
            self.counts[name] = self.counts.get(name, 0) + len(values)


class MetricsLog:
    """Collects each step's numbers and writes them in order.

    Fields of a line: step, images, loss, whatever the objective logs (null where a step has no such rows), grad_norm,
    lr, images_per_s, seconds (of training, pauses left out), memory_mb (peak). With train.spike_guard also skipped,
    the updates it left out so far.
    """

    def __init__(self, path: Path, ctx: DistributedContext, flush_every: int, seconds: float, tensorboard: Any = None):
        self.path, self.ctx, self.tensorboard = path, ctx, tensorboard
        self.flush_every = 1 if ctx.device.type == "cpu" else flush_every  # reading a CPU costs nothing
        self.seconds = seconds
        self.pending: list[tuple[dict[str, Any], list[str], Tensor, list[float]]] = []  # line, names, sums, counts
        self.last: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def record(
        self,
        step: int,
        batch: int,
        lr: float,
        sums: StepSums,
        grad_norm: Tensor,
        skipped: Tensor | None = None,
        stop: bool = False,
    ) -> None:
        """Note step `step` (counted from 1) without waiting for the device. stop: this process was asked to stop."""
        line = {"step": step, "images": step * batch, "lr": lr, "batch": batch}
        line["memory_mb"] = peak_memory_mb(self.ctx.device)
        same = [x.detach().float() for x in (grad_norm, skipped) if x is not None]  # on every process
        host = [*sums.counts.values(), float(stop)]
        self.pending.append((line, list(sums.sums), torch.stack([*same, *sums.sums.values()]), host))

    @property
    def due(self) -> bool:
        return len(self.pending) >= self.flush_every

    def pause(self) -> None:
        """Time until now (a checkpoint, an evaluation) is not training."""
        self.clock = time.perf_counter()

    def flush(self) -> bool:
        """Write what is pending; True if any process was asked to stop.

        Every process must call it at the same step. Raises NotFinite at the first step whose loss or gradient
        is not finite; its update was skipped on the device, so the weights are still those before it.
        """
        if not self.pending:
            return False
        device = torch.stack([row for _, _, row, _ in self.pending])
        same = device.shape[1] - len(self.pending[0][1])  # the norm, and with a spike guard its count
        host = torch.tensor([row for *_, row in self.pending], device=self.ctx.device)
        equal = device[:, :same].cpu().tolist()
        sums = self.ctx.all_reduce(torch.cat([device[:, same:], host], 1)).cpu().tolist()
        self._clock_steps()
        lines = [
            _line(line, names, row, *numbers)
            for (line, names, *_), row, numbers in zip(self.pending, sums, equal, strict=True)
        ]
        bad = next((line for line in lines if not _finite(line)), None)
        if bad:
            lines = lines[: lines.index(bad)]
        self.pending.clear()
        if lines:
            self.last = lines[-1]
            if self.ctx.is_main:
                self._write(lines)
        if bad:
            raise NotFinite(bad["step"], f"loss {bad['loss']}, gradient norm {bad['grad_norm']}: not finite")
        return any(row[-1] > 0 for row in sums)

    def _clock_steps(self) -> None:
        """Share the time since the last reading among the pending steps: only now is the device known to be done."""
        now = time.perf_counter()
        elapsed, self.clock = (now - self.clock) / len(self.pending), now
        for line, *_ in self.pending:
            self.seconds += elapsed
            line |= {"images_per_s": line["batch"] / max(elapsed, 1e-9), "seconds": self.seconds}

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with write_errors_named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if self.tensorboard:
            for line in lines:
                for name, value in line.items():
                    if name != "step" and value is not None:
                        self.tensorboard.add_scalar(name, value, line["step"])

    def summary(self) -> dict[str, str]:
        """The latest numbers for a progress bar: the loss, the first value that the objective logs, and the rate."""
        shown = [key for key in self.last if key not in ("step", "images")][:2]
        return {key: f"{self.last[key]:.4g}" for key in (*shown, "images_per_s") if self.last.get(key) is not None}

    def close(self) -> None:
        if self.tensorboard:
            self.tensorboard.close()

    def sync(self) -> None:
        """Make what was written survive a power cut, before a checkpoint relies on it."""
        if self.ctx.is_main and self.path.exists():
            with open(self.path, "rb") as file, write_errors_named(self.path):
                os.fsync(file.fileno())


def _line(
    known: dict[str, Any], names: list[str], sums: list[float], grad_norm: float, skipped: float | None = None
) -> dict[str, Any]:
    """sums: of each name, then their counts."""
    counts = sums[len(names) :]
    means = {name: total / count if count else None for name, total, count in zip(names, sums, counts, strict=False)}
    return {
        "step": known["step"],
        "images": known["images"],
        **means,
        "grad_norm": grad_norm,
        **({} if skipped is None else {"skipped": int(skipped)}),
        **{key: _rounded(known[key]) for key in ("lr", "images_per_s", "seconds", "memory_mb")},
    }


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")


def _finite(line: dict[str, Any]) -> bool:
    return math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])


def peak_memory_mb(device: torch.device) -> float:
    """Peak memory so far in MB (10^6 bytes): allocated on a CUDA device, resident otherwise."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss would begin at the size of the process that started this one
        (peak,) = (line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(peak) * 1024 / 1e6
    import resource  # not on every platform; training on a CPU is for trying things out

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def rewind_metrics(path: Path, step: int) -> None:
    """Drop all lines after `step`: a run that continues from there writes them again. Reads from the end."""
    if not path.exists():
        return
    with write_errors_named(path), open(path, "r+b") as file:
        end = file.seek(0, os.SEEK_END)
        while end > 0:
            start = _line_start(file, end)
            file.seek(start)
            text = file.read(end - start)
            line = parse_line(text.decode("utf-8", errors="replace")) if text.endswith(b"\n") else None
            if isinstance(line, dict) and isinstance(line.get("step"), int) and line["step"] <= step:
                break
            end = start
        file.truncate(end)


def _line_start(file: BinaryIO, end: int) -> int:
    """Where the line that ends before byte `end` begins."""
    stop = end - 1  # its own newline
    while stop > 0:
        begin = max(0, stop - BLOCK)
        file.seek(begin)
        found = file.read(stop - begin).rfind(b"\n")
        if found >= 0:
            return begin + found + 1
        stop = begin
    return 0
