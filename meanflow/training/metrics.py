"""`metrics.jsonl`: one line a step. The device is read once in many steps, never each step."""

import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanflow.errors import write_errors_named
from meanflow.training.distributed import Processes
from meanflow.training.guard import NotFinite

SUMS = ("loss", "error", "error_still", "still", "error_moving", "moving", "stop")


class StepSums:
    """Sums over this process's samples of one step, on the device: a vector in the order of `SUMS`."""

    def __init__(self, device: torch.device, stop_requested: bool):
        self.total = torch.zeros(len(SUMS), device=device)
        self.total[-1] = float(stop_requested)

    def add(self, weighted: Tensor, squared_error: Tensor, moving: int) -> None:
        """Per-sample losses and errors (b,), of which the first `moving` have r ≠ t."""
        error_moving, error_still = squared_error[:moving].sum(), squared_error[moving:].sum()
        self.total[0] += weighted.detach().sum()
        self.total[1] += error_moving + error_still
        self.total[2] += error_still
        self.total[3] += len(squared_error) - moving
        self.total[4] += error_moving
        self.total[5] += moving


class MetricsLog:
    """Collects each step's numbers and writes them in order.

    Fields of a line: step, images, loss (weighted, Eq. 22), error (‖u − u_tgt‖², unweighted), error_still and
    error_moving (the same on r = t and r ≠ t alone; null where there are none), grad_norm, lr, images_per_s,
    seconds (of training, pauses left out), memory_mb (peak). With train.spike_guard also skipped, the updates it
    left out so far.
    """

    def __init__(self, path: Path, processes: Processes, flush_every: int, seconds: float, tensorboard: Any = None):
        self.path, self.processes, self.tensorboard = path, processes, tensorboard
        self.flush_every = 1 if processes.device.type == "cpu" else flush_every  # reading a CPU costs nothing
        self.seconds = seconds
        self.pending: list[tuple[dict[str, Any], Tensor]] = []
        self.last: dict[str, Any] = {}
        self.clock = time.perf_counter()

    def record(
        self,
        step: int,
        images: int,
        batch: int,
        lr: float,
        sums: StepSums,
        grad_norm: Tensor,
        skipped: Tensor | None = None,
    ) -> None:
        """Note step `step` (counted from 1) without waiting for the device."""
        line = {"step": step, "images": images, "lr": lr, "batch": batch}
        line["memory_mb"] = peak_memory_mb(self.processes.device)
        same = [x.detach().float().view(1) for x in (grad_norm, skipped) if x is not None]  # on every process
        self.pending.append((line, torch.cat([sums.total, *same])))

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
        sums = torch.stack([vector for _, vector in self.pending])
        same = sums[:, len(SUMS) :].cpu().tolist()
        sums = self.processes.all_reduce(sums).cpu().tolist()
        self._clock_steps()
        lines = [_line(host, row, *numbers) for (host, _), row, numbers in zip(self.pending, sums, same, strict=True)]
        bad = next((line for line in lines if not _finite(line)), None)
        if bad:
            lines = lines[: lines.index(bad)]
        self.pending.clear()
        if lines:
            self.last = lines[-1]
            if self.processes.is_main:
                self._write(lines)
        if bad:
            raise NotFinite(bad["step"], f"loss {bad['loss']}, gradient norm {bad['grad_norm']}: not finite")
        return any(row[SUMS.index("stop")] > 0 for row in sums)

    def _clock_steps(self) -> None:
        """Share the time since the last reading among the pending steps: only now is the device known to be done."""
        now = time.perf_counter()
        elapsed, self.clock = (now - self.clock) / len(self.pending), now
        for line, _ in self.pending:
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

    def sync(self) -> None:
        """Make what was written survive a power cut, before a checkpoint relies on it."""
        if self.processes.is_main and self.path.exists():
            with open(self.path, "rb") as file, write_errors_named(self.path):
                os.fsync(file.fileno())


def _line(host: dict[str, Any], sums: list[float], grad_norm: float, skipped: float | None = None) -> dict[str, Any]:
    total = dict(zip(SUMS, sums, strict=False))
    count = total["still"] + total["moving"]
    return {
        "step": host["step"],
        "images": host["images"],
        "loss": total["loss"] / count,
        "error": total["error"] / count,
        "error_still": total["error_still"] / total["still"] if total["still"] else None,
        "error_moving": total["error_moving"] / total["moving"] if total["moving"] else None,
        "grad_norm": grad_norm,
        **({} if skipped is None else {"skipped": int(skipped)}),
        **{key: _rounded(host[key]) for key in ("lr", "images_per_s", "seconds", "memory_mb")},
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


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file; a torn last line (a run killed while writing) is left out."""
    if not path.exists():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except (json.JSONDecodeError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def rewind_metrics(path: Path, step: int) -> None:
    """Drop all lines after `step`: a run that continues from there writes them again."""
    lines = [line for line in read_metrics(path) if line["step"] <= step]
    temporary = path.with_suffix(".tmp")
    with write_errors_named(path):
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
        os.replace(temporary, path)
