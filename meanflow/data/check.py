"""All faults of a folder, zip or tar of images, at once: `bash run.sh check_data`."""

import os
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from meanflow.data.archives import Parts, Source, open_source
from meanflow.data.images import (
    CROP,
    MODES,
    SHOW_PROGRESS_ABOVE,
    Facts,
    decode_ahead,
    decoders,
    facts_of,
    load_pixels,
    open_image,
    problems,
    size_settings,
)
from meanflow.data.layout import SUFFIXES, Layout, survey
from meanflow.errors import AssetError
from meanflow.logs import progress_bar

KINDS = ("unreadable", "size", "mode", "depth", "loose", "empty")  # of faults
CROPPED = "train with --set data.resize=crop, which crops, scales and converts all images"
DEFAULT_SIZE = 64  # pixels a side to bring images to, where none of them is square


@dataclass(frozen=True)
class Group:
    """Files or folders with one kind of fault."""

    kind: str  # one of KINDS
    title: str
    faults: dict[str, str]  # path inside the source → what is wrong with it, or ""
    repair: str  # what to do, with a shell command


@dataclass(frozen=True)
class Report:
    """What a split of a source holds, and what is wrong with it."""

    images: int  # without those beside class folders
    classes: tuple[str, ...]
    size: int  # pixels a side that the images have, or should be brought to
    channels: int
    groups: list[Group]
    notes: list[str]
    resize: str | None  # as they have to be trained on

    @property
    def must_be_repaired(self) -> bool:
        """Whether faults are left where the images are trained on with `settings`."""
        return any(group.repair != CROPPED for group in self.groups)

    @property
    def settings(self) -> str:
        """The settings that a recipe needs for these images."""
        size = f"model.image_size={self.size}" if self.size == 32 or self.size % 4 else size_settings(self.size)
        resize = f" data.resize={self.resize}" if self.resize else ""
        return f"{size} model.channels={self.channels} model.classes={len(self.classes)}{resize}"


def check_images(
    path: str, split: str = "train", size: int | None = None, channels: int | None = None, resize: str | None = None
) -> Report:
    """Read every image of a split and group the faults.

    path: a folder, zip or tar, or parquet, see `meanflow.data.layout`. size: pixels a side that the images should have;
    None: the most common size of those that are square. channels: 1 or 3; None: 3 unless most are grey. resize: as
    `data.resize`; with "crop" an image may have any size and mode.

    Raises AssetError for no images, a run folder, or an archive that is damaged or unsafe as a whole, and ConfigError
    if the source does not have the split.
    """
    with open_source(path, "") as source:
        layout = survey(source, split)
        facts, unreadable = _read(source, layout)
        ignored = [] if source.layout else [p for p in source.files if not p[-1].lower().endswith(SUFFIXES)]
    if size is None:
        size = _most_common((f.width for f in facts.values() if f.width == f.height), DEFAULT_SIZE)
    if channels is None:
        channels = 1 if _most_common((f.mode in ("L", "LA", "1") or f.mode[0] == "I" for f in facts.values()), 0) else 3
    command = f"bash run.sh check_data {shlex.quote(path)}{'' if split == 'train' else f' --split {split}'}"
    folder = os.path.expanduser(path)
    folder = shlex.quote(folder) if os.path.isdir(folder) else "UNPACKED"
    files = _of_rows(unreadable) if source.layout else _of_files(unreadable, layout, command, folder)
    groups = [*_of_images(facts, size, MODES[channels], resize), *files]
    notes = []
    if ignored:
        kinds = _counted(Path(parts[-1]).suffix.lower() or "no suffix" for parts in ignored)
        notes.append(f"other files, which are ignored: {kinds}")
    if size % 4:
        notes.append(f"the recipes' U-nets need a size that 4 divides: check again with --size {max(4, size // 4 * 4)}")
    groups = sorted((group for group in groups if group.faults), key=lambda group: KINDS.index(group.kind))
    resize = resize or (CROP if any(group.repair == CROPPED for group in groups) else None)
    return Report(len(layout.images), layout.classes, size, channels, groups, notes, resize)


def _of_images(facts: dict[Parts, Facts], size: int, mode: str, resize: str | None) -> list[Group]:
    """Images that can be read and are not as they should be."""
    faults = {parts: found for parts, image in facts.items() if (found := problems(image, size, mode, resize))}
    repair = CROPPED if resize is None else "crop or convert them yourself, or leave them out"
    titles = {
        "size": f"not {size}x{size} (found {_counted(f'{image.width}x{image.height}' for image in facts.values())})",
        "mode": "not grey" if mode == "L" else f"not {mode}",
        "depth": "with 16 bits a channel",
    }
    return [
        _group(kind, title, {parts: found[kind] for parts, found in faults.items() if kind in found}, repair)
        for kind, title in titles.items()
    ]


def _of_files(unreadable: dict[Parts, str], layout: Layout, command: str, folder: str) -> list[Group]:
    """Files and folders that have to be replaced or moved."""

    def away(kind: str) -> str:  # nothing is deleted: the folder may be another one than was meant
        move = "mkdir -p ../removed && xargs -d '\\n' mv --backup=numbered -t ../removed --"
        return f"or move them away: {command} --list {kind} | (cd {folder} && {move})"

    loose, empty = dict.fromkeys(layout.loose, ""), dict.fromkeys(layout.empty, "")
    return [
        _group("unreadable", "cannot be read", unreadable, f"replace them, {away('unreadable')}"),
        _group("loose", "beside class folders", loose, f"move each into its class folder, {away('loose')}"),
        _group("empty", "without images", empty, f"fill them, {away('empty')}"),
    ]


def _of_rows(unreadable: dict[Parts, str]) -> list[Group]:
    return [_group("unreadable", "cannot be read", unreadable, "write the parquet files again without these rows")]


def _read(source: Source, layout: Layout) -> tuple[dict[Parts, Facts], dict[Parts, str]]:
    """The facts of all images that can be read, and what is wrong with the others."""
    facts, unreadable = {}, {}
    listed = {*layout.images, *layout.loose}
    files = [parts for parts in source.files if parts in listed]
    quick = len(files) <= SHOW_PROGRESS_ABOVE
    with decoders() as pool, progress_bar(total=len(files), desc="reading images", unit="img", disable=quick) as bar:
        for parts, future in decode_ahead(pool, source, files, _inspect):
            error = future.exception()
            if error is None:
                facts[parts] = future.result()
            elif isinstance(error, AssetError):
                unreadable[parts] = str(error).removeprefix(source.name(parts)).strip()
            else:
                raise error
            bar.update()
    return facts, unreadable


def _inspect(name: str, data: Path | BytesIO) -> Facts:
    with open_image(name, data) as image:
        facts = facts_of(image)
        load_pixels(name, image)
    return facts


def _most_common(values: Iterable[int], default: int) -> int:
    """Of equally common ones the smallest."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]), default=(default, 0))[0]


def _group(kind: str, what: str, faults: dict[Parts, str], repair: str) -> Group:
    noun = ("class folder" if kind == "empty" else "image") + "s" * (len(faults) > 1)
    named = {"/".join(parts): faults[parts] for parts in sorted(faults)}
    return Group(kind, f"{len(faults):,} {noun} {what}", named, repair)


def _counted(names: Iterable[str]) -> str:
    """ "64x64: 120, 30x20: 2 and 7 others"."""
    found = sorted(Counter(names).items(), key=lambda item: (-item[1], item[0]))
    more = f" and {len(found) - 4} others" if len(found) > 4 else ""
    return ", ".join(f"{name}: {count:,}" for name, count in found[:4]) + more
