"""What evaluation reads and writes besides JSON: npz without pickles, tensors, and the hash of images."""

import _codecs
import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from meanflow.errors import AssetError, write_errors_named
from meanflow.files import replacing
from meanflow.training import checkpoint

MAX_RATIO, ALWAYS_FINE = 100, 2**28  # of unpacked to packed bytes; a quarter of a GB is never a bomb


def sha256_images(images: torch.Tensor) -> str:
    """sha256 of uint8 images (N, C, H, W): of their shape and their bytes in that order."""
    digest = hashlib.sha256(repr(tuple(images.shape)).encode())
    for block in images.split(4096):
        digest.update(block.contiguous().numpy().data)
    return digest.hexdigest()


def write_npz(path: Path, arrays: dict[str, np.ndarray]) -> None:
    with replacing(path) as file, write_errors_named(path):
        np.savez(file, **arrays)


class NpzFile:
    """The arrays of an npz, read on demand and never unpickled (zip's own checksums are verified).

    The file is open only while something is read, so that thousands may be at hand. Raises AssetError for a file
    that is missing, damaged or holds pickled objects.
    """

    def __init__(self, path: Path):
        self.path = path
        with self._opened() as arrays:
            self.names = sorted(arrays.files)

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        try:
            with np.load(self.path, allow_pickle=False) as arrays:
                if not hasattr(arrays, "files"):
                    raise AssetError(f"{self.path} is a bare array: save it with numpy.savez")
                yield arrays
        except FileNotFoundError:
            raise AssetError(f"{self.path}: no such file") from None
        except AssetError:
            raise
        except Exception as error:  # a damaged file raises nearly anything in the readers of zip and npy
            text = " ".join(str(error).split())[:160] or type(error).__name__
            reason = "it holds pickled objects, which are never loaded" if "pickle" in text else text
            raise AssetError(f"{self.path} is not a readable npz file: {reason}") from None

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def __getitem__(self, name: str) -> np.ndarray:
        with self._opened() as arrays:
            for info in arrays.zip.infolist():
                if info.filename in (name, f"{name}.npy"):
                    self._refuse_bomb(name, info.file_size, info.compress_size)
            array = arrays[name]
            if not isinstance(array, np.ndarray):  # numpy gives the bytes of members that are no npy
                raise AssetError(f"{self.path}: {name} is not an array")
            return array

    def _refuse_bomb(self, name: str, unpacked: int, packed: int) -> None:
        if unpacked > max(ALWAYS_FINE, MAX_RATIO * packed):
            raise AssetError(
                f"{self.path}: {name} unpacks to {unpacked / 2**20:.0f} MB, more than {MAX_RATIO} times its size"
            )


def load_tensors(path: Path, classes: tuple = ()) -> object:
    """`meanflow.training.checkpoint.load_tensors` with the allow-listed `classes` besides.

    Raises AssetError for a damaged file or one that pickles anything else.
    """
    try:
        with torch.serialization.safe_globals(list(classes)):
            return checkpoint.load_tensors(path)
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except AssetError:
        raise
    except Exception as error:  # torch.load raises errors of zip, pickle and the runtime
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = next((line for line in lines if "Unsupported" in line), lines[0] if lines else "")
        raise AssetError(
            f"{path} is damaged or holds more than tensors, which is never unpickled "
            f"({type(error).__name__}: {reason[:160]})"
        ) from None


def numpy_classes() -> tuple:
    """What numpy arrays need to pass `load_tensors`: plain numeric arrays and nothing that runs."""
    dtypes = [np.dtype(name) for name in ("float64", "float32")]
    reconstruct = np._core.multiarray._reconstruct  # what `ndarray.__reduce__` names
    old_name = (reconstruct, "numpy.core.multiarray._reconstruct")  # files written under numpy 1
    return (reconstruct, old_name, np.ndarray, np.dtype, *(type(d) for d in dtypes), _codecs.encode)
