"""Which files of a source are the data set, and which class each belongs to: the ImageFolder layout.

    cat/1.png dog/1.png               classes are the top folders, in sorted order
    train/cat/1.png test/cat/1.png    `split` chooses train/, or test/ (else val/)
    1.png 2.png                       no classes

A single folder around all of it, as archives often have, is stepped into.
"""

from meanflow.data.sources import Parts, Source
from meanflow.errors import AssetError, ConfigError

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}


def arrange(source: Source, split: str) -> list[tuple[Parts, str | None]]:
    """The image files of a split with their class names, sorted by path. Class None: a flat folder.

    Raises:
        AssetError: no images, a class folder without images, or loose images beside class folders.
        ConfigError: the source does not have the split.
    """
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
        return [(parts, None) for parts in images]
    if loose:
        raise AssetError(f"{source.name(loose[0])} lies beside class folders: move it into one of them")
    filled = {parts[depth] for parts in images}
    empty = sorted(_children(source, base) - filled)
    if empty:
        raise AssetError(f"{source.name((*base, empty[0]))}/ is a class folder without images: "
                         "fill it or remove it")  # fmt: skip
    return [(parts, parts[depth]) for parts in images]


def _children(source: Source, base: Parts) -> set[str]:
    """Names of the folders directly in `base`."""
    return {parts[-1] for parts in source.folders if parts[:-1] == base}


def _wrapper(source: Source, images: list[Parts]) -> Parts:
    """The folder that holds class or split folders: the root, or deeper while one lone folder holds all."""
    base: Parts = ()
    while True:
        children = _children(source, base)
        if len(children) != 1 or children & {"train", "test", "val"}:
            return base
        if any(len(parts) < len(base) + 3 for parts in images):  # its images are the one class, or loose
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
