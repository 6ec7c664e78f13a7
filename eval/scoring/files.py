"""What evaluation reads and writes besides JSON: npz without pickles, tensors, and the hash of images."""

import _codecs
import hashlib
from pathlib import Path

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


def read_npz(path: Path) -> dict[str, np.ndarray]:
    """All arrays of an npz, never unpickled. Raises AssetError if it is missing, damaged, a bomb or holds objects."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if not hasattr(file, "files"):
                raise AssetError(f"{path} is a bare array: save it with numpy.savez")
            for info in file.zip.infolist():
                if info.file_size > max(ALWAYS_FINE, MAX_RATIO * info.compress_size):
                    name, size = info.filename.removesuffix(".npy"), info.file_size / 2**20
                    raise AssetError(f"{path}: {name} unpacks to {size:.0f} MB, more than {MAX_RATIO} times its size")
            arrays = {name: file[name] for name in sorted(file.files)}
    except FileNotFoundError:
        raise AssetError(f"{path}: no such file") from None
    except AssetError:
        raise
    except Exception as error:  # a damaged file raises nearly anything in the readers of zip and npy
        text = " ".join(str(error).split())[:160] or type(error).__name__
        reason = "it holds pickled objects, which are never loaded" if "pickle" in text else text
        raise AssetError(f"{path} is not a readable npz file: {reason}") from None
    for name, array in arrays.items():
        if not isinstance(array, np.ndarray):  # numpy gives the bytes of members that are no npy
            raise AssetError(f"{path}: {name} is not an array")
    return arrays


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
