"""Decoded images in a file, so that the next start reads them in a moment: `data.cache`.

    <folder>/<name of the source>-<size>x<size>x<channels>-<hash>.images
        magic, length of the header, its sha256; the header as JSON: fingerprint of the source, shape, classes, labels,
        sha256 of the pixels; from the next multiple of 4096 on the pixels, uint8 (N, C, S, S)

The hash is of the source's path and of all settings that the pixels depend on, so each of them has one file, which is
replaced when the source changes. Pixels are memory-mapped: processes of a machine share them. A cache is only ever a
copy: where it cannot be read or written, images are decoded, and a line says so.
"""

import hashlib
import json
import math
import os
import re
import shutil
import struct
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import PIL
import torch
from torch import Tensor

from meanflow.data.layout import SUFFIXES
from meanflow.data.parquet import SUFFIX as PARQUET
from meanflow.errors import AssetError, write_errors_named
from meanflow.files import remove_leftovers, replacing, sha256_json
from meanflow.logs import log

MAGIC, FORMAT = b"MFIMAGES", 1
PREFIX = struct.Struct("<8sQ32s")  # magic, bytes of the header, sha256 of the header
PAGE = 4096
LEFT_FREE = 2 * 2**30  # bytes of the disk that stay free
BLOCK = 4096  # images hashed at once
FINGERPRINT, PIXELS = "fingerprint", "sha256"  # keys of the header


class Decoded(NamedTuple):
    """What is kept."""

    images: Tensor  # uint8 (N, C, S, S)
    labels: Tensor | None  # int64 (N,)
    classes: tuple[str, ...]  # by label
    sha256: str  # of the pixels


@dataclass(frozen=True)
class Cache:
    """The file of one source under one set of settings."""

    file: Path
    fingerprint: str  # of the source's files

    def header(self) -> dict[str, Any] | None:
        """The header, if there is an intact one of the source as it is now."""
        try:
            header, _ = _read_header(self.file)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError) as error:
            self._decode_instead(error)
            return None
        return header if header[FINGERPRINT] == self.fingerprint else None

    def read(self) -> Decoded | None:
        """The images, if they are there, intact, and of the source as it is now. Reads all of them, to check them."""
        if self.header() is None:
            return None
        try:
            status = self.file.stat()
            return _read(self.file, (status.st_ino, *_stamp(status)))
        except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: PyTorch's, of a file that cannot be mapped
            self._decode_instead(error)
            return None

    def _decode_instead(self, error: Exception) -> None:
        reason = getattr(error, "strerror", None) or error
        log.warning(f"{self.file} cannot be used ({reason}): decoding the images again")

    def write(self, decoded: Decoded) -> None:
        """Keep the images, if the disk has room. Never raises for what the disk refuses."""
        images, labels = decoded.images.contiguous(), decoded.labels
        header = {
            "format": FORMAT,
            FINGERPRINT: self.fingerprint,
            "shape": list(images.shape),
            "classes": list(decoded.classes),
            "labels": None if labels is None else labels.tolist(),
            PIXELS: decoded.sha256,
        }
        text = json.dumps(header).encode()
        try:
            with write_errors_named(self.file):
                self.file.parent.mkdir(parents=True, exist_ok=True)
                free = shutil.disk_usage(self.file.parent).free
            if free < images.nbytes + len(text) + LEFT_FREE:
                log.warning(
                    f"{self.file.parent}: {images.nbytes / 1e9:.1f} GB of decoded images are not kept for the next "
                    f"start, since {free / 1e9:.1f} GB are free; data.cache names another folder, or null for none"
                )
                return
            remove_leftovers(self.file)
            with replacing(self.file) as file, write_errors_named(self.file):
                file.write(PREFIX.pack(MAGIC, len(text), hashlib.sha256(text).digest()) + text)
                file.write(bytes(_start(len(text)) - PREFIX.size - len(text)))
                for block in images.split(BLOCK):
                    file.write(block.numpy().data)
        except AssetError as error:
            reason = str(error).partition("; ")[0]
            log.warning(f"{reason}; the decoded images are not kept for the next start (data.cache)")
            return
        log.info(f"decoded images are kept in {self.file} ({images.nbytes / 1e6:,.0f} MB); it may be deleted")


def open_cache(folder: Path, path: str, split: str, size: int, channels: int, resize: str | None) -> Cache | None:
    """The cache in `folder` of a source under these settings; None if there is no source that can be read."""
    location = Path(os.path.expanduser(path))
    mark = fingerprint(location)
    if mark is None:
        return None
    real = location.resolve()
    key = sha256_json([FORMAT, PIL.__version__, str(real), split, size, channels, resize])
    name = re.sub(r"[^\w.-]", "_", real.name, flags=re.ASCII)[:64]
    return Cache(folder / f"{name}-{size}x{size}x{channels}-{key[:12]}.images", mark)


def fingerprint(location: Path) -> str | None:
    """A hash of the names, sizes and times of change of all files that may be images. None where it cannot be had.

    The time of change (ctime) is set by the system whenever a file is written, renamed or gets another time: a file of
    the same size that an archive's old time was given to has another.
    """
    try:
        if not location.is_dir():
            return sha256_json(_stamp(location.stat()))
        digest, seen, root = hashlib.sha256(), set(), str(location)
        folders = [root]
        for folder in folders:  # which grows
            real = os.path.realpath(folder)
            if real in seen:
                return None  # links in a circle, which reading refuses
            seen.add(real)
            with os.scandir(folder) as entries:
                listed = sorted((e for e in entries if not e.name.startswith(".")), key=lambda entry: entry.name)
            below = [entry.name for entry in listed if entry.is_dir()]
            folders += (os.path.join(folder, name) for name in below)
            files = [e for e in listed if e.name.lower().endswith((*SUFFIXES, PARQUET)) and not e.is_dir()]
            facts = [folder[len(root) :], below, [(entry.name, *_stamp(entry.stat())) for entry in files]]
            digest.update(repr(facts).encode(errors="surrogateescape"))
        return digest.hexdigest()
    except OSError:
        return None


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def sha256_pixels(images: Tensor) -> str:
    """Of the bytes of uint8 images (N, C, H, W), in that order."""
    digest = hashlib.sha256()
    for block in images.split(BLOCK):
        digest.update(block.contiguous().numpy().data)
    return digest.hexdigest()


def _read_header(file: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the pixels begin. Raises ValueError for a file that is damaged or cut short."""
    with file.open("rb") as opened:
        size, prefix = os.fstat(opened.fileno()).st_size, opened.read(PREFIX.size)
        magic, length, digest = PREFIX.unpack(prefix) if len(prefix) == PREFIX.size else (b"", 0, b"")
        text = opened.read(length) if magic == MAGIC and length < size else b""
    if hashlib.sha256(text).digest() != digest:
        raise ValueError("damaged")
    header, start = json.loads(text), _start(length)
    if size != start + math.prod(header["shape"]):
        raise ValueError("cut short")
    return header, start


def _start(length: int) -> int:
    """Where the pixels begin after a header of this length."""
    return -(-(PREFIX.size + length) // PAGE) * PAGE


@lru_cache(maxsize=1)  # a run reads them for its reference and to train on; mapped memory costs nothing to keep
def _read(file: Path, stamp: tuple[int, ...]) -> Decoded:
    """The images of a file; `stamp` changes with it. Raises ValueError unless they are those that were written."""
    header, start = _read_header(file)
    count = math.prod(header["shape"])
    mapped = torch.from_file(str(file), shared=False, size=start + count, dtype=torch.uint8)
    images = mapped[start:].view(header["shape"])
    if sha256_pixels(images) != header[PIXELS]:
        raise ValueError("wrong checksum")
    labels = None if header["labels"] is None else torch.tensor(header["labels"], dtype=torch.int64)
    return Decoded(images, labels, tuple(header["classes"]), header[PIXELS])
