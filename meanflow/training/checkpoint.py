"""Checkpoints: one `.pt` of tensors and a JSON string, and a `.json` beside it with its checksum.

`{"model": {name: tensor}, "ema": {decay: {name: tensor}}, "optimizer": {name: {key: tensor}}, "meta": JSON}`,
loadable with `torch.load(weights_only=True)` and without this package. A checkpoint is complete when its JSON
stands beside it: both are written under another name, flushed to disk, and renamed, the JSON last.
"""

import hashlib
import json
import os
import pickle
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanflow.errors import AssetError

FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `meta`: format, step, images, seconds, config, data, versions."""

    model: dict[str, Tensor]
    ema: dict[str, dict[str, Tensor]]
    optimizer: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


class _HashingFile:
    """A binary file that knows the SHA-256 of what was written."""

    def __init__(self, path: Path):
        self.file, self.digest = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 - closed by save

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def file_sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}.pt"


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write atomically. Raises AssetError, leaving every earlier checkpoint as it was, if the disk refuses."""
    path = checkpoint_path(folder, step)
    temporary, sidecar = path.with_suffix(".pt.tmp"), path.with_suffix(".json.tmp")
    content = {"model": checkpoint.model, "ema": checkpoint.ema, "optimizer": checkpoint.optimizer}
    content["meta"] = json.dumps(checkpoint.meta)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        out = _HashingFile(temporary)
        with out.file:
            torch.save(content, out)
            out.flush()
            os.fsync(out.file.fileno())
        summary = {"sha256": out.digest.hexdigest(), "bytes": temporary.stat().st_size, **checkpoint.meta}
        with open(sidecar, "w", encoding="utf-8") as file:
            json.dump(summary, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        os.replace(sidecar, path.with_suffix(".json"))
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        for leftover in (temporary, sidecar):
            leftover.unlink(missing_ok=True)
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise AssetError(
            f"{path}: the checkpoint of step {step} could not be saved ({reason}); earlier ones are intact: "
            "free space and run the same command again"
        ) from error
    return path


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(path for path in folder.glob("[0-9]*.pt") if path.with_suffix(".json").exists())


def prune_checkpoints(folder: Path, keep: int, milestone_every: int | None) -> None:
    """Delete all but the newest `keep` and the milestones, and what an interrupted save left."""
    for path in list_checkpoints(folder)[:-keep]:
        if not milestone_every or int(path.stem) % milestone_every:
            path.with_suffix(".json").unlink()  # first: without it the checkpoint no longer counts
            path.unlink()
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint of ours; the checksum is compared where the JSON stands beside it.

    Never runs code from the file. Raises AssetError naming the file if it is missing, damaged or of another kind.
    """
    sidecar = path.with_suffix(".json")
    try:
        if sidecar.exists():
            expected = json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]
            if file_sha256(path) != expected:
                raise AssetError(f"{path}: is damaged (its checksum differs from the one in {sidecar.name})")
        content = torch.load(path, map_location="cpu", weights_only=True)
        meta = json.loads(content["meta"])
        if meta["format"] != FORMAT:
            raise AssetError(f"{path}: has checkpoint format {meta['format']}, this version reads {FORMAT}")
        return Checkpoint(content["model"], content["ema"], content["optimizer"], meta)
    except FileNotFoundError as error:
        raise AssetError(f"{path}: no such checkpoint") from error
    except (OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, EOFError) as error:
        raise AssetError(f"{path}: cannot be read as a checkpoint ({str(error).splitlines()[0]})") from error
    except (KeyError, TypeError, ValueError) as error:
        raise AssetError(f"{path}: is not a checkpoint of this project (no {error})") from error


def load_newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest intact checkpoint and a line on each damaged one passed over; None if there are none at all.

    Raises AssetError if there are some and all are damaged: starting anew silently would bury the run.
    """
    complaints: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        try:
            return path, load_checkpoint(path), complaints
        except AssetError as error:  # noqa: PERF203 - a handful of files
            complaints.append(str(error))
    if complaints:
        raise AssetError(f"no intact checkpoint in {folder}: {'; '.join(complaints)}. To start anew, remove the run")
    return None
