"""Parquet files with a column of images, as data sets on the Hugging Face hub are: a folder of them, or a single one.

    data/train-00000-of-00002.parquet      a split is told by words in the names of files, else of folders:
    plain_text/test-00000-of-00001.parquet   train; test; validation, valid, val or dev

The image column holds the bytes of image files, in a struct {bytes, path} or alone. The label column is one that the
file's `huggingface` metadata calls a ClassLabel, whose names are the classes, or one called label, whose distinct
values are. Rows are read in batches, as they are asked for.
"""

import importlib.util
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from io import BytesIO
from itertools import accumulate
from pathlib import Path
from typing import Any

from meanflow.data.archives import MAX_MEMBER_BYTES, MAX_RATIO, Parts, Source
from meanflow.data.layout import SPLIT_FOLDERS, SUFFIXES, Layout
from meanflow.errors import AssetError, ConfigError

SUFFIX = ".parquet"
SPLIT_WORDS = {"train": "train", "test": "test", **dict.fromkeys(("validation", "valid", "val", "dev"), "val")}
IMAGE_NAMES, LABEL_NAMES = ("image", "img"), ("label", "labels", "class")
BATCH = 64  # rows in memory


def is_table(location: Path) -> bool:
    with location.open("rb") as file:
        return file.read(4) == b"PAR1"


def tables_in(folder: Source) -> dict[Parts, Path]:
    """The parquet files of a folder, if it does not hold more images: a README may have some, as tables may go with."""
    images = sum(parts[-1].lower().endswith(SUFFIXES) for parts in folder.files)
    tables = {parts: path for parts, path in folder.files.items() if parts[-1].lower().endswith(SUFFIX)}
    return {} if images > len(tables) else tables


def open_tables(where: str, files: dict[Parts, Path]) -> Source:
    """The rows of parquet files as a source of image files. Its `files` are in the tables' order.

    Raises ConfigError without the package pyarrow, and AssetError, naming the file, for one that is damaged, has no
    column of images, or unpacks to a hundred times its size.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{where} is parquet, which needs the package pyarrow: pip install pyarrow")
    tables = {parts: Table(f"{where}: {'/'.join(parts)}", path) for parts, path in files.items()}
    rows = {(*parts, f"row {k}"): (table, k) for parts, table in tables.items() for k in range(table.count)}
    return Source(
        where,
        rows,
        open=lambda handle: BytesIO(handle[0].read(handle[1])),
        layout=lambda split: _layout(where, tables, rows, split),
    )


def _layout(where: str, tables: dict[Parts, "Table"], rows: Iterable[Parts], split: str) -> Layout:
    chosen = _of_split(where, tables, split)
    images = [parts for parts in rows if parts[:-1] in chosen]
    if not images:
        raise AssetError(f"{where} has no rows in its {split} split")
    named = {table.classes for table in chosen.values()}
    if len(named) > 1:
        raise AssetError(f"{where}: its files name different classes")
    (classes,) = named
    values = [value for table in chosen.values() for value in table.labels()]
    missing = [value is None or (classes is not None and value == -1) for value in values]
    if all(missing):
        return Layout(images, (), None, [], [])
    if any(missing):
        raise AssetError(f"{where}: {'/'.join(images[missing.index(True)])} has no label, and others have")
    if classes is None:
        distinct = sorted(set(values))
        numbers = {value: number for number, value in enumerate(distinct)}
        return Layout(images, tuple(map(str, distinct)), [numbers[value] for value in values], [], [])
    if not 0 <= min(values) <= max(values) < len(classes):
        raise AssetError(f"{where} has labels beyond its {len(classes)} classes")
    return Layout(images, classes, values, [], [])


def _of_split(where: str, tables: dict[Parts, "Table"], split: str) -> dict[Parts, "Table"]:
    """The tables of a split. Raises ConfigError if there are none, or they lie in several folders."""
    found = {parts: _split_of(parts) for parts in tables}
    if set(found.values()) == {None}:  # the hub takes files that are named after no split for training data
        found = dict.fromkeys(found, "train")
    names = [name for name in SPLIT_FOLDERS[split] if name in found.values()]
    if not names:
        splits = ", ".join(sorted({name for name in found.values() if name}))
        raise ConfigError(f"data.split is {split!r}, but the files of {where} are named after {splits} only")
    chosen = {parts: table for parts, table in tables.items() if found[parts] == names[0]}
    folders = {"/".join(part for part in parts[:-1] if _split_of((part,)) is None) for parts in chosen}
    if len(folders) > 1:
        listed = ", ".join(sorted(folder or "." for folder in folders))
        raise ConfigError(f"{where} holds several data sets ({listed}): name the folder of one of them")
    return chosen


def _split_of(parts: Parts) -> str | None:
    for part in reversed(parts):
        for word in re.split("[^a-z]+", part.lower().removesuffix(SUFFIX)):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return None


class Table:
    """One parquet file: `count` rows, of which `read` gives the image files; fastest in their order."""

    def __init__(self, name: str, path: Path):
        self.name, self.path, self.file = name, path, None
        with path.open("rb") as start:
            if start.read(23) == b"version https://git-lfs":
                raise AssetError(f"{name} is the pointer of a Git LFS file: git lfs pull")
        with self._open() as file:
            schema, groups = file.schema_arrow, [file.metadata.row_group(k) for k in range(file.num_row_groups)]
        features = _features(schema)
        self.image = _image_column(name, schema, features)
        self.label, self.classes = _label_column(schema, features)
        *self.starts, self.count = accumulate((group.num_rows for group in groups), initial=0)
        packed, unpacked = path.stat().st_size, sum(group.total_byte_size for group in groups)
        if unpacked > max(2**20, MAX_RATIO * packed):
            raise AssetError(f"{name} unpacks to more than {MAX_RATIO} times its size: pack only images")
        self._end()

    def labels(self) -> list[Any]:
        """The label of each row; None where there is none."""
        if self.label is None:
            return [None] * self.count
        with _damage_named(self.name), self._open() as file:
            return file.read(columns=[self.label]).column(0).to_pylist()

    def read(self, row: int) -> bytes:
        """Raises AssetError for a row that holds no file."""
        group = bisect_right(self.starts, row) - 1
        if self.file is None or row < self.start or self.starts[group] > self.start + len(self.batch):
            self._begin(group)
        while row >= self.start + len(self.batch):
            self.start += len(self.batch)
            with _damage_named(self.name):
                batch = next(self.batches, None)
            if batch is None:
                raise AssetError(f"{self.name} is cut short: download it again")
            self.batch = batch.column(0)
        data = self.batch[row - self.start].as_py()
        if row == self.count - 1:
            self._end()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise AssetError(f"{self.name}/row {row} has no bytes of an image, at most the path of a file elsewhere")
        if len(data) > MAX_MEMBER_BYTES:
            raise AssetError(f"{self.name}/row {row} is above {MAX_MEMBER_BYTES // 2**20} MB")
        return data

    def _begin(self, group: int) -> None:
        """Read on from the first row of a row group."""
        self._end()
        self.file, self.start = self._open(), self.starts[group]
        groups = range(group, len(self.starts))
        self.batches = self.file.iter_batches(BATCH, row_groups=list(groups), columns=[self.image])

    def _end(self) -> None:
        """Close the file: there may be more of them than a process may have open."""
        if self.file is not None:
            self.file.close()
        self.file, self.batches, self.start, self.batch = None, iter(()), 0, []

    def _open(self) -> Any:
        from pyarrow.parquet import ParquetFile  # optional, and 170 MB

        with _damage_named(self.name):
            return ParquetFile(self.path, pre_buffer=False, buffer_size=2**20)


@contextmanager
def _damage_named(name: str) -> Iterator[None]:
    """Turn what pyarrow raises for damaged files into an AssetError."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise AssetError(f"{name} is damaged ({reason}): copy or download it again") from error


def _features(schema: Any) -> dict[str, Any]:
    """{column: its description} of the `huggingface` metadata; empty where a file has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
    except (KeyError, TypeError, ValueError):
        return {}
    return {n: f for n, f in features.items() if isinstance(f, dict)} if isinstance(features, dict) else {}


def _image_column(name: str, schema: Any, features: dict[str, Any]) -> str:
    """The column called an Image, else the one that holds bytes; of several the one named image or img."""
    import pyarrow.types as types

    def holds_bytes(kind: Any) -> bool:
        if types.is_struct(kind):
            return kind.get_field_index("bytes") >= 0 and holds_bytes(kind.field("bytes").type)
        return types.is_binary(kind) or types.is_large_binary(kind)

    columns = [field.name for field in schema if holds_bytes(field.type)]
    columns = [c for c in columns if features.get(c, {}).get("_type") == "Image"] or columns
    if not columns:
        raise AssetError(f"{name} has no column of images (it has {', '.join(schema.names)})")
    best = [c for c in columns if c in IMAGE_NAMES] or columns
    if len(best) > 1:
        raise AssetError(f"{name} has several columns of images ({', '.join(best)}): call one of them image")
    return best[0]


def _label_column(schema: Any, features: dict[str, Any]) -> tuple[str | None, tuple[str, ...] | None]:
    """(the column, the classes' names); of several ClassLabels the one called label, else the first."""
    named = {
        column: tuple(map(str, feature["names"]))
        for column, feature in features.items()
        if feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list) and column in schema.names
    }
    if named:
        column = next((name for name in LABEL_NAMES if name in named), next(iter(named)))
        return column, named[column]
    plain = [name for name in LABEL_NAMES if name in schema.names and _is_label(schema.field(name).type)]
    return (plain[0] if plain else None), None


def _is_label(kind: Any) -> bool:
    import pyarrow.types as types

    return types.is_integer(kind) or types.is_string(kind) or types.is_large_string(kind)
