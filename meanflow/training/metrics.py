"""`metrics.jsonl`: one line a step. A GPU is read once in `logging.flush_every` steps, not at each."""

import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from meanflow.errors import write_errors_named
from meanflow.objectives import Loss
from meanflow.training.divergence import NotFinite
from meanflow.training.processes import DistributedContext
from meanflow.training.records import BLOCK, parse_line
from meanflow.training.trackers import Evaluation, Tracker


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


@dataclass
class Pending:
    """A step that is not written yet. same: its gradient norm and skipped updates, equal on all processes."""

    line: dict[str, Any]
    sums: StepSums
    same: list[Tensor]
    stop: bool


class MetricsLog:
    """Collects each step's numbers and writes them in order.

    Fields of a line: step, images, loss, the objective's values (null where a step has no such rows), grad_norm,
    lr, images_per_s, seconds (of training, without checkpoints and evaluations), memory_mb (peak). With
    train.spike_guard also skipped, the updates it has skipped so far.
    """

    def __init__(
        self, path: Path, ctx: DistributedContext, flush_every: int, seconds: float, trackers: Sequence[Tracker] = ()
    ):
        self.path, self.ctx, self.trackers = path, ctx, trackers
        self.flush_every = 1 if ctx.device.type == "cpu" else flush_every  # reading a CPU costs nothing
        self.seconds = seconds
        self.pending: list[Pending] = []
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
        self.pending.append(
            Pending(line, sums, [x.detach().float() for x in (grad_norm, skipped) if x is not None], stop)
        )

    @property
    def due(self) -> bool:
        """Whether to flush: after `flush_every` steps, which ranks reach together; a single process also to stop."""
        return len(self.pending) >= self.flush_every or (self.ctx.world == 1 and any(row.stop for row in self.pending))

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
        same = torch.stack([x for row in self.pending for x in row.same]).tolist()
        host = [number for row in self.pending for number in (*row.sums.counts.values(), row.stop)]
        device = torch.stack([x for row in self.pending for x in row.sums.sums.values()])
        summed = torch.cat([device, torch.tensor(host, dtype=torch.float32, device=self.ctx.device)])
        summed = self.ctx.all_reduce(summed).tolist()
        self._clock_steps()

        sums, counts, same = iter(summed[: len(device)]), iter(summed[len(device) :]), iter(same)
        lines, stopping = [], False
        for row in self.pending:
            names = list(row.sums.sums)
            pairs = [(next(sums), next(counts)) for _ in names]
            means = {name: total / count if count else None for name, (total, count) in zip(names, pairs, strict=True)}
            stopping |= next(counts) > 0
            lines.append(_line(row.line, means, *(next(same) for _ in row.same)))
        self.pending.clear()
        bad = next((line for line in lines if not _finite(line)), None)
        good = lines if bad is None else lines[: lines.index(bad)]
        if good:
            self.last = good[-1]
            if self.ctx.is_main:
                self._write(good)
        if bad is not None:
            raise NotFinite(bad["step"], f"loss {bad['loss']}, gradient norm {bad['grad_norm']}: not finite")
        return stopping

    def _clock_steps(self) -> None:
        """Divide the time since the last reading among the pending steps: only now is the device known to be done."""
        now, memory = time.perf_counter(), peak_memory_mb(self.ctx.device)
        elapsed, self.clock = (now - self.clock) / len(self.pending), now
        for row in self.pending:
            self.seconds += elapsed
            row.line |= {"images_per_s": row.line["batch"] / max(elapsed, 1e-9), "seconds": self.seconds}
            row.line["memory_mb"] = memory

    def _write(self, lines: list[dict[str, Any]]) -> None:
        with write_errors_named(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        for tracker in self.trackers:
            for line in lines:
                values = {name: value for name, value in line.items() if name != "step" and value is not None}
                tracker.log(line["step"], values)

    def show(self, step: int, evaluation: Evaluation) -> None:
        """Pass what an evaluation of step `step` has found on to the trackers."""
        for tracker in self.trackers:
            tracker.log(step, evaluation.scores)
            tracker.show(step, evaluation.pictures)

    def summary(self) -> dict[str, str]:
        """The latest numbers for a progress bar: the loss, the first value that the objective logs, and the rate."""
        shown = [key for key in self.last if key not in ("step", "images")][:2]
        return {key: f"{self.last[key]:.4g}" for key in (*shown, "images_per_s") if self.last.get(key) is not None}

    def close(self) -> None:
        """Close the trackers."""
        for tracker in self.trackers:
            tracker.close()

    def sync(self) -> None:
        """Flush the file to disk, before a checkpoint relies on it."""
        if self.ctx.is_main and self.path.exists():
            with open(self.path, "rb") as file, write_errors_named(self.path):
                os.fsync(file.fileno())


def _line(
    known: dict[str, Any], means: dict[str, float | None], grad_norm: float, skipped: float | None = None
) -> dict[str, Any]:
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
    """Drop all lines after `step`: a run that continues from there writes them again.

    Reads from the end, so it costs as much as there is to drop. Raises AssetError if the file cannot be changed.
    """
    if not path.exists():
        return
    with write_errors_named(path), open(path, "r+b") as file:
        keep = 0
        for start, text in _backwards(file):
            number = _step(parse_line(text.decode("utf-8", errors="replace"))) if text.endswith(b"\n") else None
            if number is not None and number <= step:
                keep = start + len(text)
                break
        if keep < file.seek(0, os.SEEK_END):
            file.truncate(keep)


def _backwards(file: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Where each line begins, and the line with its newline, from the last to the first."""
    start, head = file.seek(0, os.SEEK_END), b""  # head: the beginning of what was read, an incomplete line
    while start > 0:
        end, start = start, max(0, start - BLOCK)
        file.seek(start)
        first, *lines = (file.read(end - start) + head).splitlines(keepends=True)
        place = end + len(head)
        for line in reversed(lines):
            place -= len(line)
            yield place, line
        head = first
    if head:
        yield 0, head


def _step(line: Any) -> int | None:
    """The step of a metrics line; None where it is none."""
    step = line.get("step") if isinstance(line, dict) else None
    return step if isinstance(step, int) else None
