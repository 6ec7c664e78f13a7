"""Checkpoints: one `.pt` of tensors and a JSON string, and a `.json` beside it with its checksum.

`{"model": {name: tensor}, "ema": {decay: {name: tensor}}, "optimizer": {name: {key: tensor}}, "meta": JSON}`,
which `torch.load(weights_only=True)` reads without this package. A checkpoint is complete when its JSON is there:
both files are written under another name, flushed to disk, and renamed, the JSON last.
"""

import hashlib
import io
import json
import os
import pickle
import pickletools
import re
import warnings
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanflow.errors import AssetError
from meanflow.files import sha256_file

FORMAT = 2
LEGACY_PICKLES = 2**26  # bytes; names and shapes of tensors are far smaller
PARTS = ("model", "ema", "optimizer")
FACTS = {"step": int, "images": int, "seconds": int | float, "config": dict, "data": dict}  # of `meta`, at least
MOMENTS = {"step", "exp_avg", "exp_avg_sq"}  # of each parameter in `optimizer`


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds. `meta`: format, step, images, seconds, config, data, versions."""

    model: dict[str, Tensor]
    ema: dict[str, dict[str, Tensor]]
    optimizer: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]

    @property
    def kept(self) -> dict[str, dict[str, Tensor]]:
        """{decay, or "weights": {name: tensor}}: each set of weights that a network can be loaded with."""
        return self.ema | ({"weights": self.model} if self.model else {})


class _HashingFile:
    """A binary file that knows the SHA-256 of what was written."""

    def __init__(self, path: Path):
        self.file, self.digest = open(path, "wb"), hashlib.sha256()  # noqa: SIM115 - closed by save

    def write(self, data: bytes) -> int:
        self.digest.update(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


def checkpoint_path(folder: Path, step: int) -> Path:
    return folder / f"{step:08d}.pt"


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> Path:
    """Write atomically. Raises AssetError, leaving every earlier checkpoint as it was, if the disk refuses."""
    path = checkpoint_path(folder, step)
    temporary, sidecar = path.with_suffix(".pt.tmp"), path.with_suffix(".json.tmp")
    content = {part: getattr(checkpoint, part) for part in PARTS} | {"meta": json.dumps(checkpoint.meta)}
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
            with suppress(OSError):  # the disk may refuse this too
                leftover.unlink(missing_ok=True)
        raise AssetError(
            f"{path}: the checkpoint of step {step} could not be saved ({_reason(error)}); earlier ones are intact: "
            "free space and run the same command again"
        ) from error
    return path


def _reason(error: BaseException) -> str:
    """The operating system's message if there is one; PyTorch wraps it in lines of C++."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return (cause and cause.strerror) or next(iter(str(error).splitlines()), type(error).__name__)


def _steps(folder: Path, suffix: str) -> set[int]:
    """Steps that have a file with this suffix; files not named as ours are ignored."""
    return {int(path.stem) for path in folder.glob(f"*{suffix}") if re.fullmatch(r"\d{8,}", path.stem)}


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return [checkpoint_path(folder, step) for step in sorted(_steps(folder, ".pt") & _steps(folder, ".json"))]


def prune_checkpoints(folder: Path, step: int, keep: int, milestone_every: int | None) -> None:
    """Once `step` is saved: delete all but the newest `keep` and the milestones, and what an interrupted save left.

    Later ones are damaged, or the run would have continued from them: they are renamed to *.damaged.
    """
    earlier = [int(path.stem) for path in list_checkpoints(folder) if int(path.stem) <= step]
    kept = {s for s in earlier if milestone_every and s % milestone_every == 0} | set(earlier[-keep:])
    for other in (_steps(folder, ".pt") | _steps(folder, ".json")) - kept:
        path = checkpoint_path(folder, other)
        for file in (path.with_suffix(".json"), path):  # in this order: without its JSON it no longer counts
            if other < step:
                file.unlink(missing_ok=True)
            elif file.exists():
                file.rename(f"{file}.damaged")
    for leftover in folder.glob("*.tmp"):
        leftover.unlink()


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one of our checkpoints; its checksum is compared if its JSON is there.

    Never runs code from the file. Raises AssetError naming the file if it is missing, damaged or of another kind.
    """
    try:
        _compare_checksum(path)
        content = load_tensors(path)
    except AssetError:
        raise
    except FileNotFoundError as error:
        raise AssetError(f"{path}: no such checkpoint") from error
    except pickle.UnpicklingError as error:  # PyTorch's own text advises to load it unsafely
        raise AssetError(f"{path}: cannot be read as a checkpoint (it is not a file of tensors alone)") from error
    except Exception as error:  # a damaged file raises nearly anything in PyTorch's reader
        raise AssetError(f"{path}: cannot be read as a checkpoint ({_reason(error)})") from error
    try:
        if not isinstance(content, dict):
            raise TypeError
        meta = json.loads(content["meta"])
        if meta["format"] != FORMAT:
            raise AssetError(f"{path}: has checkpoint format {meta['format']}, this version reads {FORMAT}")
        checkpoint = Checkpoint(*(content[part] for part in PARTS), meta)
        check_kinds(checkpoint)
        return checkpoint
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        raise AssetError(f"{path}: is not a checkpoint of this project") from error


def load_tensors(path: Path, mmap: bool = False) -> Any:
    """`torch.load` of tensors and containers on the CPU, and of what `torch.serialization.safe_globals` allows.

    Raises AssetError for bombs, which PyTorch would read into memory; for a damaged file nearly anything.
    """
    _refuse_bombs(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about pickles that the next line refuses anyway
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def _refuse_bombs(path: Path) -> None:
    """PyTorch stores tensors uncompressed, so a zip must not unpack to more than its size.

    The one callable that its weights-only reader gives a size chosen by the file is bytearray, so that is refused too.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if sum(info.file_size for info in archive.infolist()) > path.stat().st_size:
                raise AssetError(f"{path}: unpacks to more than it is, which no checkpoint does")
            pickles = [io.BytesIO(archive.read(name)) for name in archive.namelist() if name.endswith("/data.pkl")]
    else:
        with open(path, "rb") as file:  # as PyTorch wrote before 1.6: five pickles, then the tensors
            pickles = [io.BytesIO(file.read(LEGACY_PICKLES))] * 5
    for pickled in pickles:
        for op, argument, _ in pickletools.genops(pickled):
            if op.name == "GLOBAL" and argument.endswith("bytearray"):
                raise AssetError(f"{path}: holds more than tensors (a bytearray)")


def check_kinds(checkpoint: Checkpoint) -> None:
    """Raises TypeError unless types are those of `Checkpoint`; names and shapes are checked by who restores it."""
    groups = [checkpoint.model, *_named(checkpoint.ema).values(), *_named(checkpoint.optimizer).values()]
    for group in groups:
        for tensor in _named(group).values():
            plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and tensor.device.type == "cpu"
            if not plain or not tensor.is_floating_point():
                raise TypeError
    if any(moments.keys() != MOMENTS for moments in checkpoint.optimizer.values()):
        raise TypeError
    for fact, kind in FACTS.items():
        value = checkpoint.meta[fact]
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError
    if not 0 <= checkpoint.meta["step"] < 2**62 or not isinstance(checkpoint.meta["data"]["images"], int):
        raise TypeError


def _named(group: Any) -> dict[str, Any]:
    if not isinstance(group, dict) or not all(isinstance(name, str) for name in group):
        raise TypeError
    return group


def _compare_checksum(path: Path) -> None:
    sidecar = path.with_suffix(".json")
    if not sidecar.exists() or not path.exists():
        return
    try:
        expected = json.loads(sidecar.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise AssetError(f"{sidecar}: is damaged, so {path.name} cannot be checked") from error
    if sha256_file(path) != expected:
        raise AssetError(f"{path}: is damaged (its checksum differs from the one in {sidecar.name})")


def load_newest(folder: Path) -> tuple[Path, Checkpoint, list[str]] | None:
    """The newest intact checkpoint and a line on each damaged one passed over; None if there are none at all.

    Raises AssetError if there are some and all are damaged: starting anew would overwrite the run.
    """
    complaints: list[str] = []
    for step in sorted(_steps(folder, ".pt") | _steps(folder, ".json"), reverse=True):
        path = checkpoint_path(folder, step)
        try:
            if not path.with_suffix(".json").exists():
                raise AssetError(f"{path}: is incomplete (its JSON is missing)")
            return path, load_checkpoint(path), complaints
        except AssetError as error:
            complaints.append(str(error))
    if complaints:
        raise AssetError(f"no intact checkpoint in {folder}: {'; '.join(complaints)}. To start anew, remove the run")
    return None
