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
from collections.abc import Iterable
from io import BytesIO
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


def is_table_folder(source: Source) -> bool:
    """Whether a folder has parquet files and no image files."""
    suffixes = {Path(parts[-1]).suffix.lower() for parts in source.files}
    return SUFFIX in suffixes and not suffixes & set(SUFFIXES)


def open_tables(folder: Source) -> Source:
    """The rows of a folder's parquet files as a source of image files. Its `files` are in the tables' order.

    Raises ConfigError without the package pyarrow, and AssetError, naming the file, for one that is damaged, has no
    column of images, or unpacks to a hundred times its size.
    """
    if importlib.util.find_spec("pyarrow") is None:
        raise ConfigError(f"{folder.where} is parquet, which needs the package pyarrow: pip install pyarrow")
    paths = {parts: path for parts, path in folder.files.items() if parts[-1].lower().endswith(SUFFIX)}
    tables = {parts: Table(folder.name(parts), path) for parts, path in paths.items()}
    rows = {(*parts, f"row {k}"): (table, k) for parts, table in tables.items() for k in range(table.count)}
    return Source(
        folder.where,
        rows,
        open=lambda handle: BytesIO(handle[0].read(handle[1])),
        layout=lambda split: _layout(folder.where, tables, rows, split),
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
        from pyarrow.parquet import ParquetFile  # optional, and 170 MB

        self.name = name
        try:
            self.file = ParquetFile(path, pre_buffer=False, buffer_size=2**20)
        except (ValueError, OSError) as error:
            with path.open("rb") as file:
                pointer = file.read(23) == b"version https://git-lfs"
            what = "is the pointer of a Git LFS file: git lfs pull" if pointer else "is damaged: download it again"
            raise AssetError(f"{name} {what}") from error
        self.count = self.file.metadata.num_rows
        features = _features(self.file.schema_arrow)
        self.image = _image_column(name, self.file.schema_arrow, features)
        self.label, self.classes = _label_column(self.file.schema_arrow, features)
        groups = [self.file.metadata.row_group(k) for k in range(self.file.num_row_groups)]
        self.starts = [sum(group.num_rows for group in groups[:k]) for k in range(len(groups))]
        packed, unpacked = path.stat().st_size, sum(group.total_byte_size for group in groups)
        if unpacked > max(2**20, MAX_RATIO * packed):
            raise AssetError(f"{name} unpacks to more than {MAX_RATIO} times its size: pack only images")
        self._begin(0)

    def labels(self) -> list[Any]:
        """The label of each row; None where there is none."""
        if self.label is None:
            return [None] * self.count
        return self.file.read(columns=[self.label]).column(0).to_pylist()

    def read(self, row: int) -> bytes:
        """Raises AssetError for a row that holds no file."""
        group = max(k for k, start in enumerate(self.starts) if start <= row)
        if row < self.start or self.starts[group] > self.start + len(self.batch):
            self._begin(group)
        while row >= self.start + len(self.batch):
            self.start += len(self.batch)
            batch = next(self.batches, None)
            if batch is None:
                raise AssetError(f"{self.name} is cut short: download it again")
            self.batch = batch.column(0)
        data = self.batch[row - self.start].as_py()
        data = data["bytes"] if isinstance(data, dict) else data
        if data is None:
            raise AssetError(f"{self.name}/row {row} has no bytes of an image, at most the path of a file elsewhere")
        if len(data) > MAX_MEMBER_BYTES:
            raise AssetError(f"{self.name}/row {row} is above {MAX_MEMBER_BYTES // 2**20} MB")
        return data

    def _begin(self, group: int) -> None:
        """Read on from the first row of a row group."""
        groups = list(range(group, self.file.num_row_groups))
        self.batches = self.file.iter_batches(BATCH, row_groups=groups, columns=[self.image])
        self.start, self.batch = self.starts[group] if groups else 0, []


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
