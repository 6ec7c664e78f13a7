"""Folders of files, and zips and tars that are read in place and never extracted.

Archives may come from strangers, so signs of an attack or a mistake are refused before anything is read: links and
devices, absolute paths and "..", members listed twice, members above 64 MB, and archives that unpack to more than a
hundred times their size.
"""

import lzma
import os
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

from meanflow.errors import AssetError

MAX_MEMBER_BYTES = 64 * 2**20
MAX_RATIO = 100  # of unpacked to packed bytes; images hardly compress
MAX_HEADER_BYTES = 2**20  # of a tar's long names and extended headers

Parts = tuple[str, ...]  # a path inside a source, split at its slashes
# What zipfile and tarfile raise for damaged headers.
DAMAGE = (
    *(tarfile.TarError, zipfile.BadZipFile, zlib.error, lzma.LZMAError),
    *(EOFError, ValueError, OverflowError, struct.error),
)


@dataclass(frozen=True, eq=False)
class Source:
    """The listing of a folder or archive, without hidden files, and how to read its files."""

    where: str  # the setting and its path, for messages
    files: dict[Parts, Any] = field(default_factory=dict)  # path → handle for `open`, in the order of fastest reading
    folders: set[Parts] = field(default_factory=set)  # every folder that is listed or implied by a file
    open: Callable[[Any], Path | BytesIO] = lambda handle: handle
    layout: Callable[[str], Any] | None = None  # split → Layout, where the source itself tells (parquet.py)

    def read(self, parts: Parts) -> Path | BytesIO:
        """What Pillow can open: the path of a folder's file, or the bytes of an archive's, read now."""
        with _damage_explained(self.where):
            return self.open(self.files[parts])

    def name(self, parts: Parts) -> str:
        """A file's name for messages: the source and the path inside it."""
        return f"{self.where}: {'/'.join(parts)}"


@contextmanager
def open_source(path: str, setting: str = "data.path") -> Iterator[Source]:
    """Open a folder, .zip, .tar, .tar.gz, .tar.xz, .tar.bz2 or parquet; recognised by content, not by suffix.

    A folder with more parquet than image files is what the parquet files hold.

    `~` is expanded. setting: where the user named the path, for messages; may be empty. Raises AssetError for a path
    that is missing, unreadable, not an archive, damaged, or that has unsafe members.
    """
    from meanflow.data import parquet  # here: it is made of this module's sources

    where, location = f"{setting} {path}".strip(), Path(os.path.expanduser(path))
    with ExitStack() as stack:
        with _damage_explained(where):
            if not location.exists():
                relative = "" if location.is_absolute() else f" in {Path.cwd()}"
                raise AssetError(f"{where}: no such file or folder{relative}")
            if location.is_dir():
                source = _folder(where, location)
                if tables := parquet.tables_in(source):
                    source = parquet.open_tables(where, tables)
            elif parquet.is_table(location):
                source = parquet.open_tables(where, {(location.name,): location})
            elif _is_zip(location):
                source = _zip(where, stack.enter_context(zipfile.ZipFile(location)))
            else:
                archive = stack.enter_context(_open_tar(where, location))
                source = _tar(where, archive, location.stat().st_size)
        yield source


@contextmanager
def _damage_explained(where: str) -> Iterator[None]:
    """Turn what the readers of folders and archives raise into an AssetError."""
    try:
        yield
    except DAMAGE as error:
        raise AssetError(f"{where} is damaged or cut short ({error}): copy or download it again") from error
    except NotImplementedError as error:
        raise AssetError(f"{where} is compressed in a way Python cannot read ({error})") from error
    except OSError as error:
        raise AssetError(f"{where} cannot be read: {error.strerror or error}") from error


def _is_zip(location: Path) -> bool:
    with location.open("rb") as file:
        return file.read(4) in (b"PK\3\4", b"PK\5\6")


def _folder(where: str, root: Path) -> Source:
    source, seen = Source(where), set()

    def give_up(error: OSError):
        raise error

    for base, folders, names in os.walk(root, onerror=give_up, followlinks=True):
        real = os.path.realpath(base)
        if real in seen:  # a link to a folder above would never end
            raise AssetError(f"{where}: {base} is reached twice through links: remove the link")
        seen.add(real)
        folders[:] = sorted(folder for folder in folders if not folder.startswith("."))
        parts = Path(base).relative_to(root).parts
        source.folders.update((*parts, folder) for folder in folders)
        source.files.update({(*parts, n): Path(base, n) for n in sorted(names) if not n.startswith(".")})
    return source


def _zip(where: str, archive: zipfile.ZipFile) -> Source:
    source = Source(where, open=lambda info: BytesIO(archive.read(info)))
    for info in archive.infolist():
        name, mode = info.filename.replace("\\", "/"), info.external_attr >> 16
        if info.flag_bits & 1:
            raise AssetError(f"{where} is encrypted: pack it again without a password")
        special = stat.S_IFMT(mode) not in (0, stat.S_IFREG, stat.S_IFDIR)
        _add_member(source, name, info, name.endswith("/"), info.file_size, special)
        _refuse_bomb(f"{where}: member {name}", info.file_size, info.compress_size)
    return source


class _StrictTarInfo(tarfile.TarInfo):
    """A damaged or missing header is an error; tarfile takes it for the end of the archive.

    So is one that asks for more than a megabyte to be read as a name or an extended header.
    """

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
        info = super().frombuf(buf, encoding, errors)
        if not info.isreg() and not 0 <= info.size <= MAX_HEADER_BYTES:
            raise tarfile.InvalidHeaderError("a header of an impossible size")
        return info

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # the block of zeros that ends an archive
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def _open_tar(where: str, location: Path) -> tarfile.TarFile:
    try:
        return tarfile.open(location, "r:*", tarinfo=_StrictTarInfo)
    except (tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise AssetError(f"{where} is not a folder, zip or tar of images, or it is damaged") from error


def _tar(where: str, archive: tarfile.TarFile, packed: int) -> Source:
    source = Source(where, open=lambda info: BytesIO(archive.extractfile(info).read()))
    for info in archive:
        special = not (info.isfile() or info.isdir())
        _add_member(source, info.name, info, info.isdir(), info.size, special)
        _refuse_bomb(where, info.offset_data + info.size, packed)
    return source


def _refuse_bomb(label: str, unpacked: int, packed: int):
    if unpacked > max(2**20, MAX_RATIO * packed):
        raise AssetError(f"{label} unpacks to more than {MAX_RATIO} times its size: pack only images")


def _add_member(source: Source, name: str, handle: Any, is_folder: bool, size: int, special: bool):
    parts = tuple(part for part in name.split("/") if part not in ("", "."))
    label = f"{source.where}: member {name}"
    if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in parts:
        raise AssetError(f"{label} points outside the archive: pack it again with plain relative paths")
    if special:
        raise AssetError(f"{label} is a link or a device: pack it again with the files themselves")
    if size > MAX_MEMBER_BYTES:
        raise AssetError(f"{label} unpacks to {size / 2**20:.0f} MB, above {MAX_MEMBER_BYTES // 2**20} MB")
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return
    if not parts and not is_folder:
        raise AssetError(f"{label} has no name: pack it again")
    if not is_folder and parts in source.files:
        raise AssetError(f"{label} is in the archive twice: remove one")
    source.folders.update(parts[:depth] for depth in range(1, len(parts) + is_folder))
    if not is_folder:
        source.files[parts] = handle
