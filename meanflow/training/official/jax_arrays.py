"""The arrays in checkpoints of JAX programs, read without JAX: folders of Orbax and msgpack files of older flax.

An Orbax folder is an OCDBT database (`manifest.ocdbt`, `d/`) or holds plain files; in both an array is a zarr store
that is named by its path in the tree, joined by dots. The packages `tensorstore` and `msgpack` read them; they are
optional (`pip install meanflow-kit[jax-weights]`).
"""

import importlib
import math
import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from meanflow.errors import AssetError

ORBAX_MARKS = ("_METADATA", "_CHECKPOINT_METADATA", "commit_success.txt", "ocdbt.process_0")
ZARR = {".zarray": "zarr", "zarr.json": "zarr3"}  # an array's own metadata → TensorStore's driver for it
MSGPACK_MAP = re.compile(rb"(?:[\x81-\x8f]|\xde..|\xdf....)(?:[\xa1-\xbf]|\xd9.)[A-Za-z_]", re.DOTALL)  # its first key
NDARRAY, COMPLEX, SCALAR = 1, 2, 3  # flax's extension types
FLOATS = ("float16", "bfloat16", "float32", "float64")
CHUNKED = "__msgpack_chunked_array__"
DTYPES = {name: getattr(torch, name) for name in (*FLOATS, "int8", "uint8", "int16", "int32", "int64")}


@dataclass(frozen=True)
class StoredArray:
    """An array in a file. `read()` raises AssetError if its numbers cannot be read."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor]


Arrays = dict[tuple[str, ...], StoredArray]  # by the path in the tree


def stored_arrays(path: Path) -> Arrays | None:
    """The arrays of the checkpoint at `path`; None if it is neither an Orbax folder nor a msgpack file.

    Raises AssetError if it is damaged, or the package that reads it is missing.
    """
    try:
        if path.is_dir():
            folder = _orbax_folder(path)
            return None if folder is None else _orbax_arrays(folder)
        with path.open("rb") as file:
            start = file.read(8)
    except (FileNotFoundError, ValueError):  # a name with a NUL
        return None
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror or error})") from error
    return _msgpack_arrays(path) if MSGPACK_MAP.match(start) else None


def _package(name: str, path: Path) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise AssetError(f"{path}: is read with the package {name}, which is missing: pip install {name}") from error


def _reason(error: Exception) -> str:
    """The first line, without TensorStore's account of where in its source it happened."""
    text = next(iter(str(error).splitlines()), "") or type(error).__name__
    return re.split(r" \[(?:source locations|tensorstore_spec|domain)", text)[0][:300]


# --- Orbax -----------------------------------------------------------------------------------------------------------


def _orbax_folder(path: Path) -> Path | None:
    """`path`, or the one folder in it (an item of Orbax's CheckpointManager, `default`) that has the arrays."""
    folders = [p for p in sorted(path.iterdir()) if p.is_dir() and not p.name.startswith("ocdbt.process_")]
    found = [path] if _has_arrays(path) else [folder for folder in folders if _has_arrays(folder)]
    if len(found) > 1:
        raise AssetError(f"{path}: holds {len(found)} checkpoints; name one of them, such as {found[-1]}")
    if not found and any((path / mark).exists() for mark in ORBAX_MARKS):
        raise AssetError(f"{path}: is an Orbax checkpoint without its arrays (manifest.ocdbt): copy the whole folder")
    return found[0] if found else None


def _has_arrays(folder: Path) -> bool:
    return (folder / "manifest.ocdbt").is_file() or any(any(folder.glob(f"*/{name}")) for name in ZARR)


def _orbax_arrays(folder: Path) -> Arrays:
    tensorstore = _package("tensorstore", folder)
    files: dict[str, Any] = {"driver": "file", "path": f"{folder.absolute()}/"}
    database = (folder / "manifest.ocdbt").is_file()
    store = {"driver": "ocdbt", "base": files} if database else files

    def opened(name: str, driver: str) -> StoredArray:
        where = store | {"path": f"{name}/"} if database else files | {"path": f"{files['path']}{name}/"}
        array = tensorstore.open({"driver": driver, "kvstore": where}, open=True, read=True).result()

        def read() -> Tensor:
            try:
                if not database:
                    _refuse_lost_chunks(folder / name, array)
                kind = tensorstore.float32 if array.dtype.name in FLOATS else tensorstore.int64
                return torch.from_numpy(tensorstore.cast(array, kind).read().result())
            except Exception as error:  # a damaged file raises nearly anything there
                raise AssetError(f"{folder}: {name} cannot be read ({_reason(error)})") from error

        return StoredArray(tuple(array.shape), array.dtype.name, read)

    try:
        keys = tensorstore.KvStore.open(store).result().list().result()
        found = [key.decode().rpartition("/")[::2] for key in keys]
        return {
            tuple(re.split("[./]", name)): opened(name, ZARR[leaf]) for name, leaf in found if name and leaf in ZARR
        }
    except Exception as error:  # a damaged file raises nearly anything there
        raise AssetError(f"{folder}: cannot be read as an Orbax checkpoint ({_reason(error)})") from error


def _refuse_lost_chunks(folder: Path, array: Any) -> None:
    """Orbax writes every chunk of an array, but TensorStore reads one whose file is lost as zeros."""
    chunk = array.chunk_layout.read_chunk.shape or ()  # None of a single number
    number = math.prod(math.ceil(n / m) for n, m in zip(array.shape, chunk, strict=True))
    there = sum(file.is_file() and file.name not in ZARR for file in folder.rglob("*"))
    if there < number:
        raise ValueError(f"{number - there} of its {number} files are missing")


# --- msgpack ---------------------------------------------------------------------------------------------------------


def _msgpack_arrays(path: Path) -> Arrays:
    msgpack = _package("msgpack", path)

    def extension(code: int, data: bytes) -> StoredArray | None:
        return _packed(*msgpack.unpackb(data)) if code in (NDARRAY, SCALAR) else None

    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            tree = msgpack.unpackb(data, ext_hook=extension)
        return _flattened(tree)
    except Exception as error:  # a damaged file raises nearly anything there
        raise AssetError(f"{path}: cannot be read as a msgpack file of flax ({_reason(error)})") from error


def _packed(shape: list[int], dtype: str, data: bytes) -> StoredArray:
    """flax's form of an array. Raises ValueError if it contradicts itself."""
    if dtype not in DTYPES:  # of random number generators: none of ours
        return StoredArray(tuple(shape), dtype, lambda: torch.empty(0))
    if len(data) != math.prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(f"an array of shape {shape} has {len(data)} bytes")
    flat = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])
    return StoredArray(tuple(shape), dtype, lambda: _widened(flat.reshape(shape)))


def _widened(x: Tensor) -> Tensor:
    return x.float() if x.is_floating_point() else x.long()


def _flattened(tree: Any) -> Arrays:
    """{path: array} of nested dicts; single numbers count as arrays of shape ()."""
    found: Arrays = {}
    stack = [((), tree)]
    while stack:
        path, node = stack.pop()
        if isinstance(node, dict) and CHUNKED in node:
            node = _joined(node)
        if isinstance(node, dict):
            stack += [((*path, key), value) for key, value in node.items()]
        elif isinstance(node, StoredArray):
            found[path] = node
        elif isinstance(node, int):
            found[path] = StoredArray((), "int64", lambda value=node: torch.tensor(value))
    return found


def _joined(node: dict[str, Any]) -> StoredArray:
    """An array of more than 2^30 bytes, which flax divides: {'shape': {'0': …}, 'chunks': {'0': array, …}}."""
    shape = tuple(node["shape"][str(k)] for k in range(len(node["shape"])))
    chunks = [node["chunks"][str(k)] for k in range(len(node["chunks"]))]
    if sum(math.prod(chunk.shape) for chunk in chunks) != math.prod(shape):
        raise ValueError(f"an array of shape {shape} has other chunks")
    return StoredArray(shape, chunks[0].dtype, lambda: torch.cat([chunk.read() for chunk in chunks]).reshape(shape))
