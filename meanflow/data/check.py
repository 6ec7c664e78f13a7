"""All that is wrong with a folder, zip or tar of images, at once: `bash run.sh check_data`."""

import os
import shlex
from collections import Counter
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path

from meanflow.data.archives import Parts, Source, open_source
from meanflow.data.images import (
    MODES,
    SUFFIXES,
    Facts,
    Layout,
    decode_ahead,
    decoders,
    facts_of,
    load_pixels,
    open_image,
    problems,
    repair_command,
    size_settings,
    survey,
)
from meanflow.errors import AssetError
from meanflow.logs import progress_bar

DEFAULT_SIZE = 64  # pixels a side to bring images to, where none of them is square


@dataclass(frozen=True)
class Group:
    """Files or folders with one fault. `names` are paths inside the source, `details` what is wrong with each."""

    kind: str  # unreadable, size, mode, depth, loose or empty
    title: str
    names: list[str]
    details: list[str]
    repair: str = ""  # how, for the user


@dataclass(frozen=True)
class Report:
    """What a split of a source holds, and what is wrong with it."""

    images: int  # without those that lie beside class folders
    classes: tuple[str, ...]
    size: int  # pixels a side that the images have or should be brought to
    channels: int
    groups: list[Group]
    notes: list[str]

    @property
    def settings(self) -> str:
        """What a recipe has to be told."""
        size = f"model.image_size={self.size}" if self.size == 32 or self.size % 4 else size_settings(self.size)
        return f"{size} model.channels={self.channels} model.classes={len(self.classes)}"


def check_images(path: str, split: str = "train", size: int | None = None, channels: int | None = None) -> Report:
    """Read every image of a split and group what is wrong.

    Args:
        path: a folder, zip or tar in the layout of `meanflow.data.images`; `~` is expanded.
        split: "train" or "test".
        size: pixels a side that the images should have; None: the most common size of those that are square.
        channels: 1 or 3, that they should have; None: 3 unless most are grey.

    Raises:
        AssetError: nothing there, no images, a run folder, or an archive that is damaged or unsafe as a whole.
        ConfigError: the source does not have the split.
    """
    with open_source(path, "") as source:
        layout = survey(source, split)
        facts, unreadable = _read(source, layout)
    size = size or _most_common([f.width for f in facts.values() if f.width == f.height], DEFAULT_SIZE)
    grey = sum(f.mode in ("L", "LA", "1") or f.mode[0] in "IF" for f in facts.values())
    channels = channels or (1 if grey > len(facts) / 2 else 3)
    faults = {parts: problems(f, size, MODES[channels]) for parts, f in facts.items()}
    groups = [
        _group("unreadable", "not images, or broken", unreadable),
        _group("size", f"not {size}x{size} (found {_counted(facts)})", _with("size", faults)),
        _group("mode", f"not {'grey' if channels == 1 else 'RGB'}", _with("mode", faults)),
        _group("depth", "of 16 bits a channel", _with("depth", faults)),
        _group("loose", "images beside class folders", dict.fromkeys(layout.loose, "")),
        _group("empty", "class folders without images", dict.fromkeys(layout.empty, "")),
    ]
    command = f"bash run.sh check_data {shlex.quote(path)}{'' if split == 'train' else f' --split {split}'}"
    groups = [replace(g, repair=_repair(g, command, path, size, channels)) for g in groups if g.names]
    return Report(len(layout.images), layout.classes, size, channels, groups, _notes(source, size))


def _read(source: Source, layout: Layout) -> tuple[dict[Parts, Facts], dict[Parts, str]]:
    """The facts of all images that can be read, and what is wrong with the others."""
    facts, unreadable = {}, {}
    listed = {*layout.images, *layout.loose}
    files = [parts for parts in source.files if parts in listed]
    with decoders() as pool, progress_bar(total=len(files), desc="reading images", unit="img") as bar:
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


def _most_common(values: list[int], default: int) -> int:
    """Of equally common ones the smallest."""
    return min(Counter(values).items(), key=lambda item: (-item[1], item[0]), default=(default, 0))[0]


def _with(kind: str, faults: dict[Parts, dict[str, str]]) -> dict[Parts, str]:
    return {parts: found[kind] for parts, found in faults.items() if kind in found}


def _group(kind: str, what: str, faults: dict[Parts, str]) -> Group:
    ordered = sorted(faults)
    return Group(kind, f"{len(faults):,} {what}", ["/".join(p) for p in ordered], [faults[p] for p in ordered])


def _counted(facts: dict[Parts, Facts]) -> str:
    sizes = Counter(f"{f.width}x{f.height}" for f in facts.values()).most_common()
    more = f", {len(sizes) - 4} other sizes" if len(sizes) > 4 else ""
    return ", ".join(f"{size}: {count:,}" for size, count in sizes[:4]) + more


def _repair(group: Group, command: str, path: str, size: int, channels: int) -> str:
    packed = not os.path.isdir(os.path.expanduser(path))
    if group.kind in ("size", "mode", "depth"):
        where = "in the unpacked folder" if packed else "in a copy of the folder"
        return f"{where}: {repair_command({Path(name).suffix for name in group.names}, size, MODES[channels])}"
    folder = "UNPACKED" if packed else shlex.quote(os.path.expanduser(path))
    remove = (
        f"{command} --list {group.kind} | (cd {folder} && xargs -d '\\n' rm{' -r' if group.kind == 'empty' else ''})"
    )
    first = {"unreadable": "replace them", "loose": "move each into its class folder", "empty": "fill them"}[group.kind]
    return f"{first}, or remove them: {remove}"


def _notes(source: Source, size: int) -> list[str]:
    notes = []
    others = Counter(Path(parts[-1]).suffix.lower() or "no suffix" for parts in source.files if not _is_image(parts))
    if others:
        listed = ", ".join(f"{suffix}: {count:,}" for suffix, count in others.most_common(5))
        notes.append(f"{sum(others.values()):,} other files are ignored ({listed})")
    if size % 4:
        notes.append(f"the recipes' U-nets need a size that 4 divides: check again with --size {max(4, size // 4 * 4)}")
    return notes


def _is_image(parts: Parts) -> bool:
    return parts[-1].lower().endswith(SUFFIXES)
