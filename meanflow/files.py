"""Files: hashed, read as JSON, and written so that a crash leaves the old file or the whole new one."""

import glob
import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from meanflow.errors import AssetError, write_errors_named


def sha256_file(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. Raises AssetError if it cannot be read."""
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror or error})") from error
    return digest.hexdigest()


def sha256_json(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def read_json(path: Path) -> Any:
    """Raises AssetError for a file that is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise AssetError(f"{path}: cannot be read as JSON ({error})") from error


@contextmanager
def replacing(path: Path, tag: object = None, sync: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` at the end of the block, and is deleted if the block fails.

    tag: part of the temporary name, by default the machine and the process id. sync: flush to disk before renaming.
    Raises AssetError if the disk refuses.
    """
    temporary = path.with_name(f"{path.name}.{f'{platform.node()}-{os.getpid()}' if tag is None else tag}.tmp")
    try:
        with write_errors_named(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = temporary.open("wb")
        try:
            yield file
            with write_errors_named(path):
                file.flush()
                if sync:
                    os.fsync(file.fileno())
        finally:
            with write_errors_named(path):  # on a full disk closing fails too
                file.close()
        with write_errors_named(path):
            os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):  # the disk may refuse this too
            temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, tag: object = None, sync: bool = False) -> None:
    """See `replacing`."""
    with replacing(path, tag, sync) as file, write_errors_named(path):
        file.write(data)


def remove_leftovers(path: Path) -> None:
    """Delete what processes of this machine left that were killed while they wrote `path`."""
    for file in path.parent.glob(f"{glob.escape(path.name)}.{glob.escape(platform.node())}-*.tmp"):
        pid = file.name.removesuffix(".tmp").rpartition("-")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            file.unlink(missing_ok=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def write_text(path: Path, text: str) -> None:
    """See `replacing`."""
    remove_leftovers(path)
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    """See `replacing`."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def make_folder(path: Path) -> Path:
    """Make the folder `path` and check that it can be written, before long work. Raises AssetError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise AssetError(f"{path}: cannot be written ({error.strerror or error}); name another folder") from error
