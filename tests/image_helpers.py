"""Image files, folders and archives for the tests."""

import io
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from meanflow.data import DataConfig, Dataset, load_dataset

Files = dict[str, bytes]


def pixels(key: int, mode: str = "RGB", size: int = 8) -> np.ndarray:
    """Random, by `key`."""
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return np.random.default_rng(key).integers(0, 256, shape, dtype=np.uint8)


def encoded(array: np.ndarray, kind: str = "PNG", mode: str | None = None, **options) -> bytes:
    image, buffer = Image.fromarray(array), io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind, **options)
    return buffer.getvalue()


def png(key: int = 0, **how) -> bytes:
    return encoded(pixels(key, **how))


def tar_of(files: Files, mode: str = "w", form: int = tarfile.GNU_FORMAT, prefix: str = "") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode, format=form) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: Files, method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def written(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def folder_of(files: Files, at: Path) -> Path:
    for name, data in files.items():
        written(at / name, data)
    return at


PACKERS = {  # archives are recognised by content: the suffix says nothing
    "folder": lambda files, at: folder_of(files, at / "images"),
    "zip": lambda files, at: written(at / "images.bin", zip_of(files)),
    "tar": lambda files, at: written(at / "images.bin", tar_of(files)),
    "tar.gz": lambda files, at: written(at / "images.bin", tar_of(files, "w:gz")),
    "tar.xz": lambda files, at: written(at / "images.bin", tar_of(files, "w:xz")),
    "tar of .": lambda files, at: written(at / "images.bin", tar_of(files, prefix="./")),
}


def load(path: Path | str, size: int = 8, channels: int = 3, **settings) -> Dataset:
    return load_dataset(DataConfig(path=str(path), **settings), size, channels, progress=False)
