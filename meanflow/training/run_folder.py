"""The run folder. It describes itself: the commands of `eval/` need only its path."""

import fcntl
import json
import os
import platform
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meanflow.errors import AssetError, write_errors_named
from meanflow.files import write_text
from meanflow.logs import log

if TYPE_CHECKING:  # these import PyTorch: seconds that plots and reports of a run do not need
    from meanflow.training.checkpoint import Checkpoint
    from meanflow.training.config import RunConfig


@dataclass(frozen=True)
class RunFolder:
    """`config.yaml` (complete, resolved), `metrics.jsonl`, `starts.jsonl` (when, where and with what it was started),
    `checkpoints/`, `failures/` (see eval/replay.py), `samples/`, `eval/`, `curves.png`."""

    path: Path

    config_file = property(lambda self: self.path / "config.yaml")
    metrics_file = property(lambda self: self.path / "metrics.jsonl")
    starts_file = property(lambda self: self.path / "starts.jsonl")
    failures = property(lambda self: self.path / "failures")
    checkpoints = property(lambda self: self.path / "checkpoints")
    samples = property(lambda self: self.path / "samples")
    eval = property(lambda self: self.path / "eval")
    curves = property(lambda self: self.path / "curves.png")

    def lock(self) -> Any:
        """Lock the folder until the returned file is closed or this process ends, however it ends.

        Raises AssetError if another process trains in it, or it cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = open(self.path / ".lock", "w")  # noqa: SIM115 - the open file is the lock
        except OSError as error:
            raise AssetError(f"{self.path}: cannot be written ({error.strerror}); choose another --out") from error
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.close()
            raise AssetError(f"{self.path}: another process is training here; wait for it or stop it") from error
        except OSError as error:  # some network file systems
            log.warning(f"{self.path}: cannot be locked ({error.strerror}): start no second run in it at the same time")
        return file

    def check(self, config: "RunConfig", requested: Collection[str] = ()) -> dict[str, tuple[Any, Any]]:
        """What `config` changes since the last start, {dotted key: (old, new)}. Nothing is written.

        requested: keys given by --set. Raises ConfigError if it would be another run.
        """
        from meanflow.training.config import changes, refuse_changed_run

        old = self.config()
        if old is None:
            return {}
        if any(self.checkpoints.glob("*.pt")):  # before the first one nothing has been learnt
            refuse_changed_run(old, config, str(self.path), requested)
        return changes(old, config)

    def config(self) -> "RunConfig | None":
        """The settings of the last start; None before the first one. Raises ConfigError."""
        from meanflow.training.config import load_config

        return load_config(self.config_file) if self.config_file.exists() else None

    def write_config(self, config: "RunConfig") -> None:
        from meanflow.training.config import config_to_yaml

        write_text(self.config_file, config_to_yaml(config))

    def note_start(self, **facts: Any) -> None:
        """Append a line to starts.jsonl: the time, the environment and `facts`."""
        line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **environment(), **facts})
        with write_errors_named(self.starts_file), open(self.starts_file, "ab+") as file:
            if end := file.tell():  # a line that a full disk or a power cut has torn is replaced
                file.seek(0)
                whole = file.read().rpartition(b"\n")
                file.truncate(end - len(whole[2]))
            file.write(line.encode() + b"\n")


def starts(run: RunFolder) -> list[dict[str, Any]]:
    """The lines of `starts.jsonl`; a torn last one (a crash while writing) is left out.

    Raises AssetError, naming the line, if another one is damaged.
    """
    if not run.starts_file.is_file():
        return []
    lines = [_start(text) for text in run.starts_file.read_text(encoding="utf-8", errors="replace").splitlines()]
    if None in lines[:-1]:
        raise AssetError(f"{run.starts_file}: line {lines.index(None) + 1} is damaged; remove it")
    return [line for line in lines if line is not None]


def _start(text: str) -> dict[str, Any] | None:
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return line if isinstance(line, dict) and _are_changes(line.get("changed", {})) else None


def _are_changes(changed: Any) -> bool:
    """{dotted key: [old value, new value]}?"""
    return isinstance(changed, dict) and all(isinstance(p, list) and len(p) == 2 for p in changed.values())


def find_checkpoint(what: Path) -> tuple[Path, "Checkpoint", list[str]]:
    """The checkpoint file `what`, or the newest intact one of the run folder `what`, and a line on each damaged one.

    `what` may also be a shared folder, or a name of the Hugging Face hub that is no path here (see shared.py). Raises
    AssetError if there is none or it is damaged.
    """
    from meanflow.training import shared
    from meanflow.training.checkpoint import load_checkpoint, load_newest

    if shared.is_hub_name(what):
        what = shared.download(str(what))
    if shared.is_shared(what):
        return *shared.read_shared(what), []
    if not what.is_dir():
        return what, load_checkpoint(what), []
    newest = load_newest(RunFolder(what).checkpoints)
    if newest is None:
        raise AssetError(f"{what}: has no checkpoint yet; train first")
    return newest


def environment() -> dict[str, Any]:
    """Versions and hardware, for records."""
    import torch
    import torchvision

    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "commit": _commit(),
        "device": torch.cuda.get_device_name() if cuda else _cpu_name(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
    }


@lru_cache
def _commit() -> str | None:
    """The commit of this code, followed by + if tracked files differ from it; None outside a git checkout."""
    here = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(("git", "-C", str(here), *arguments), capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if not (here / ".git").exists() or (head := git("rev-parse", "--short=12", "HEAD")) is None:
        return None
    return head + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
