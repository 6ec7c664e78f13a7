"""The files of prepared latents.

    plan.json          what is being prepared: a `Plan`
    shard-00000.bin    float16 (n, 2, 2, C, h, w): image, (as it is, mirrored), (mean, std); then the shard's seal
    shard-00000.json   its count, bytes, SHA-256 and labels, and the images left out; written last, so that it counts
    labels.bin         int32 (N,)
    manifest.json      the plan's fields, the shards, the number of latents, the images left out; written at the end

A shard stands for `shard_images` consecutive files of the listing and holds those that could be read. Its seal is a
line of text that says to which preparation and place it belongs, so that a foreign shard is known without a checksum.
Everything is written under another name, flushed to disk and renamed.
"""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanflow.errors import AssetError, ConfigError, NumericsError, write_errors_named
from meanflow.files import replacing, sha256_json, write_bytes

FORMAT = 1
PLAN, MANIFEST, LABELS = "plan.json", "manifest.json", "labels.bin"
IDENTITY = ("source", "split", "listing", "files", "classes", "image_size", "shape", "dtype", "scale")


@dataclass(frozen=True)
class Plan:
    """What makes one preparation differ from another. Tuples are lists in JSON."""

    format: int
    source: str
    images: str | None  # the folder or archive; another place with the same listing will do
    split: str
    listing: str  # sha256 of the file names in their order
    files: int
    classes: tuple[str, ...]
    image_size: int
    shape: tuple[int, ...]  # (C, h, w)
    dtype: str
    scale: float
    codec: dict[str, str | None]  # Codec.record
    shard_images: int

    @property
    def shards(self) -> int:
        return -(-self.files // self.shard_images)

    @property
    def record_bytes(self) -> int:
        """Bytes of one image: two mirrors of mean and std in float16."""
        return 2 * 2 * 2 * math.prod(self.shape)

    def numbers(self, index: int) -> range:
        """Which files of the listing shard `index` stands for."""
        return range(index * self.shard_images, min((index + 1) * self.shard_images, self.files))

    def identity(self) -> dict[str, Any]:
        """What has to agree for two preparations to be the same."""
        return {name: getattr(self, name) for name in IDENTITY} | {"codec": self.codec["sha256"] or self.codec["name"]}

    def seal(self, index: int) -> bytes:
        digest = sha256_json([self.identity(), self.shard_images])
        return f"meanflow latents {FORMAT} {digest} {index:05d}\n".encode()


@dataclass(frozen=True)
class Shard:
    """A finished shard, as the manifest lists it."""

    file: str
    count: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A finished preparation."""

    plan: Plan
    count: int
    shards: tuple[Shard, ...]
    labels_sha256: str
    skipped: tuple[tuple[str, str], ...]  # (file, what is wrong with it)


def shard_path(folder: Path, index: int) -> Path:
    return folder / f"shard-{index:05d}.bin"


# --- writing -----------------------------------------------------------------------------------------------------


class ShardWriter:
    """A shard being written; `new_shard` opens and completes it."""

    def __init__(self, file: Any, path: Path):
        self.file, self.path = file, path
        self.digest, self.bytes = hashlib.sha256(), 0
        self.labels: list[int] = []
        self.skipped: list[tuple[str, str]] = []

    def add(self, records: Tensor, labels: list[int]) -> None:
        """Append float32 (n, 2, 2, C, h, w). Raises NumericsError for what float16 cannot hold, AssetError."""
        records = records.half()
        if not torch.isfinite(records).all():
            raise NumericsError(f"{self.path}: the VAE gives latents that are not finite in float16")
        self._write(records.cpu().contiguous().numpy().tobytes())
        self.labels += labels

    def _write(self, data: bytes) -> None:
        self.digest.update(data)
        self.bytes += len(data)
        with write_errors_named(self.path):
            self.file.write(data)

    def finish(self, seal: bytes) -> dict[str, Any]:
        self._write(seal)
        counted = {"count": len(self.labels), "bytes": self.bytes, "sha256": self.digest.hexdigest()}
        return counted | {"labels": self.labels, "skipped": self.skipped}


@contextmanager
def new_shard(folder: Path, plan: Plan, index: int, rank: int) -> Iterator[ShardWriter]:
    """Yields the writer of shard `index`, which is complete once the block ends, and gone if it fails.

    Raises AssetError if the disk refuses.
    """
    path = shard_path(folder, index)
    with replacing(path, rank, sync=True) as file:
        writer = ShardWriter(file, path)
        yield writer
        entry = writer.finish(plan.seal(index))
    write_bytes(path.with_suffix(".json"), json.dumps(entry).encode(), rank, sync=True)


def remove_leftovers(folder: Path, rank: int, world: int) -> None:
    """Delete what a killed process `rank` left half written; process 0 also clears up after those no longer there."""
    for file in folder.glob("*.*.tmp"):
        owner = file.name.split(".")[-2]
        if owner == str(rank) or (rank == 0 and owner.isdigit() and int(owner) >= world):
            with write_errors_named(file):
                file.unlink(missing_ok=True)


def write_manifest(folder: Path, plan: Plan, rank: int) -> Manifest | None:
    """Write the manifest if all shards are there (any number of processes may, all write the same); else None."""
    entries = [shard_entry(folder, plan, index) for index in range(plan.shards)]
    if None in entries:
        return None
    labels = torch.tensor([label for entry in entries for label in entry["labels"]], dtype=torch.int32)
    raw = labels.numpy().astype("<i4").tobytes()
    shards = tuple(
        Shard(shard_path(folder, index).name, entry["count"], entry["bytes"], entry["sha256"])
        for index, entry in enumerate(entries)
    )
    skipped = tuple((file, reason) for entry in entries for file, reason in entry["skipped"])
    if not len(labels):
        raise AssetError(f"{plan.images}: none of its {plan.files:,} images can be read ({skipped[0][1]})")
    manifest = Manifest(plan, len(labels), shards, hashlib.sha256(raw).hexdigest(), skipped)
    tree = asdict(manifest)
    write_bytes(folder / LABELS, raw, rank, sync=True)
    content = json.dumps(tree.pop("plan") | tree, indent=1).encode()
    write_bytes(folder / MANIFEST, content, rank, sync=True)
    return manifest


def shard_entry(folder: Path, plan: Plan, index: int) -> dict[str, Any] | None:
    """What is written beside a shard; None if it is not done, or its file is no longer whole."""
    path = shard_path(folder, index)
    try:
        entry = json.loads(path.with_suffix(".json").read_bytes())
        return None if fault(path, entry["count"], entry["bytes"], plan, index) else entry
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # not there, or not ours: it is made again
        return None


# --- reading -----------------------------------------------------------------------------------------------------


def fault(path: Path, count: int, size: int, plan: Plan, index: int) -> str | None:
    """What is wrong with a shard by its size and seal, cheaply; None if nothing is."""
    seal = plan.seal(index)
    if size != count * plan.record_bytes + len(seal):
        return "does not have the size that its count of latents makes"
    try:
        with path.open("rb") as file:
            found = os.fstat(file.fileno()).st_size
            if found != size:
                return (
                    f"is truncated ({found:,} of {size:,} bytes)" if found < size else "is longer than it was written"
                )
            file.seek(size - len(seal))
            return None if file.read() == seal else "is foreign: it belongs to another preparation or another place"
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"


def read_plan(path: Path) -> Plan:
    """Raises AssetError for a damaged file, ConfigError for one of another version."""
    return _plan(_read_json(path), path)


def read_manifest(folder: Path) -> Manifest:
    """Raises AssetError if it is missing or damaged, ConfigError for one of another version."""
    path = folder / MANIFEST
    if not os.path.exists(path):  # unlike Path.exists, also False where it may not be looked for
        if os.path.exists(folder / PLAN):
            raise AssetError(f"{folder}: its latents are unfinished: the command that began them continues them")
        raise AssetError(f"{folder}: has no latents: set data.images to the images to prepare them from")
    tree = _read_json(path)
    plan = _plan(tree, path)
    try:
        shards = tuple(Shard(**shard) for shard in tree["shards"])
        manifest = Manifest(
            plan, tree["count"], shards, tree["labels_sha256"], tuple(tuple(pair) for pair in tree["skipped"])
        )
        if len(shards) != plan.shards:
            raise ValueError("its numbers do not agree")
        expected = [shard_path(folder, index).name for index in range(plan.shards)]
        if [shard.file for shard in shards] != expected or sum(shard.count for shard in shards) != manifest.count:
            raise ValueError("its numbers do not agree")
        return manifest
    except (LookupError, TypeError, ValueError) as error:
        raise AssetError(
            f"{path}: is damaged ({error}): delete it and prepare again, which keeps the shards"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(tree, dict):
            raise ValueError("not an object")
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path}: is damaged or cannot be read ({error}): delete it and prepare again") from error
    return tree


def _plan(tree: dict[str, Any], path: Path) -> Plan:
    version = tree.get("format")
    if version != FORMAT:
        raise ConfigError(f"{path}: has latents of format {version}, this version reads {FORMAT}: prepare them again")
    try:
        values = {field.name: tree[field.name] for field in fields(Plan)}
        values |= {name: tuple(values[name]) for name in ("classes", "shape")}
        plan = Plan(**values)
        if plan.dtype != "float16" or len(plan.shape) != 3 or plan.files < 1 or plan.shard_images < 1:
            raise ValueError("its numbers do not agree")
        plan.seal(plan.record_bytes)  # fails where a field is of another type
        return plan
    except (LookupError, TypeError, ValueError) as error:
        raise AssetError(f"{path}: is damaged ({error}): delete it and prepare again") from error
