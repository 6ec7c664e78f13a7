"""Which files of a source are images of a split, and their classes.

    cat/1.png dog/1.png               classes are the top folders, in sorted order
    train/cat/1.png test/cat/1.png    `split` chooses train/, or test/ (else val/)
    1.png 2.png                       no classes

A single folder around everything, as archives often have, is stepped into. Parquet files say all this themselves: see
parquet.py.
"""

from dataclasses import dataclass

from meanflow.data.archives import Parts, Source
from meanflow.errors import AssetError, ConfigError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


@dataclass(frozen=True)
class Layout:
    """What a split of a source holds. Paths are inside the source."""

    images: list[Parts]  # in the order of training; without those that lie beside class folders
    classes: tuple[str, ...]  # by label; empty for a flat folder, without classes
    labels: list[int] | None  # of each image; None without classes
    loose: list[Parts]  # images beside class folders
    empty: list[Parts]  # class folders without images


def arrange(source: Source, split: str) -> Layout:
    """The layout of a split. Raises AssetError for no images, an empty class folder, or images beside class folders,
    and ConfigError if the source does not have the split."""
    layout = survey(source, split)
    if layout.loose:
        raise AssetError(f"{source.name(layout.loose[0])} lies beside class folders: move it into one of them")
    if layout.empty:
        raise AssetError(f"{source.name(layout.empty[0])}/ is a class folder without images: fill it or remove it")
    return layout


def survey(source: Source, split: str) -> Layout:
    """The layout of a split, with what is wrong with it. Raises AssetError without images, ConfigError as `arrange`."""
    if source.layout is not None:
        return source.layout(split)
    if ("config.yaml",) in source.files and {("metrics.jsonl",), ("checkpoints",)} & {*source.files, *source.folders}:
        raise AssetError(
            f"{source.where} is a run folder, not a folder of images: its config.yaml names what it was trained on"
        )
    images = sorted(parts for parts in source.files if parts[-1].lower().endswith(SUFFIXES))
    if not images:
        raise AssetError(f"{source.where} has no images (looked for {' '.join(SUFFIXES)})")
    base = _split_folder(source, images, _wrapper(source, images), split)
    depth = len(base)
    images = [parts for parts in images if parts[:depth] == base]
    if not images:
        raise AssetError(f"{source.name(base)}/ has no images (looked for {' '.join(SUFFIXES)})")
    loose = [parts for parts in images if len(parts) == depth + 1]
    if len(loose) == len(images):
        return Layout(images, (), None, [], [])
    images = [parts for parts in images if len(parts) > depth + 1]
    classes = tuple(sorted({parts[depth] for parts in images}))
    empty = [(*base, name) for name in sorted(_children(source, base).difference(classes))]
    numbers = {name: number for number, name in enumerate(classes)}
    return Layout(images, classes, [numbers[parts[depth]] for parts in images], loose, empty)


def _children(source: Source, base: Parts) -> set[str]:
    """Names of the folders directly in `base`."""
    return {parts[-1] for parts in source.folders if parts[:-1] == base}


def _wrapper(source: Source, images: list[Parts]) -> Parts:
    """The folder that holds class or split folders: the root, or deeper while a single folder holds everything."""
    base: Parts = ()
    while True:
        children = _children(source, base)
        if len(children) != 1 or children & {"train", "test", "val"}:
            return base
        if any(len(parts) < len(base) + 3 for parts in images):  # its images are the only class, or loose
            return base
        base = (*base, *children)


def _split_folder(source: Source, images: list[Parts], base: Parts, split: str) -> Parts:
    """`base`, or its train/, test/ or val/ folder if it is divided into these."""
    known = {name for names in SPLIT_FOLDERS.values() for name in names}
    children = _children(source, base)
    with_classes = {parts[len(base)] for parts in images if len(parts) >= len(base) + 3}
    divided = bool(known & with_classes) or (bool(children) and children <= known)
    if not divided:
        if split == "test":
            raise ConfigError(f"data.split is 'test', but {source.where} has no test/ or val/ folder")
        return base
    for name in SPLIT_FOLDERS[split]:
        if name in children:
            return (*base, name)
    raise ConfigError(f"data.split is {split!r}, but {source.where} only has {', '.join(sorted(children))}")
