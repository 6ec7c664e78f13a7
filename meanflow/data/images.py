"""Image files in ImageFolder layout → tensors. Nothing is resized or converted unasked: other images are errors.

    cat/1.png dog/1.png               classes are the top folders, in sorted order
    train/cat/1.png test/cat/1.png    `split` chooses train/, or test/ (else val/)
    1.png 2.png                       no classes

A single folder around everything, as archives often have, is stepped into.
"""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meanflow.data.archives import Parts, Source, open_source
from meanflow.errors import AssetError, ConfigError
from meanflow.logs import progress_bar

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
SPLIT_FOLDERS = {"train": ("train",), "test": ("test", "val")}
SHOW_PROGRESS_ABOVE = 5000  # fewer are read in a second or two
IN_FLIGHT, IN_FLIGHT_BYTES = 512, 64 * 2**20  # files of an archive read ahead of the decoders
MAX_PIXELS = 2**26  # of an image once its short side is cropped to size; only a strip is larger


# --- which files, and their classes ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Layout:
    """What a split of a source holds. Paths are inside the source."""

    images: list[Parts]  # sorted; without those that lie beside class folders
    class_depth: int | None  # of the path's part that is the class; None: a flat folder, without classes
    loose: list[Parts]  # images beside class folders
    empty: list[Parts]  # class folders without images

    def class_of(self, parts: Parts) -> str | None:
        return None if self.class_depth is None else parts[self.class_depth]

    @property
    def classes(self) -> tuple[str, ...]:
        return () if self.class_depth is None else tuple(sorted({parts[self.class_depth] for parts in self.images}))


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
        return Layout(images, None, [], [])
    images = [parts for parts in images if len(parts) > depth + 1]
    filled = {parts[depth] for parts in images}
    empty = [(*base, name) for name in sorted(_children(source, base) - filled)]
    return Layout(images, depth, loose, empty)


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


# --- reading -----------------------------------------------------------------------------------------------------


def load_images(
    path: str, split: str, image_size: int, channels: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[str, ...]]:
    """Images of a folder, zip or tar, uint8 (N, C, S, S), sorted by path; labels, int64 (N,), None for a flat folder;
    class names.

    Raises AssetError for an unreadable source or, by name, an image that is broken or of another size or mode, and
    ConfigError if the source does not have the split.
    """
    with open_source(path) as source, decoders() as pool:
        layout = arrange(source, split)
        rows = {parts: row for row, parts in enumerate(layout.images)}
        images = torch.empty(len(rows), channels, image_size, image_size, dtype=torch.uint8)
        show = progress and len(rows) > SHOW_PROGRESS_ABOVE
        with progress_bar(total=len(rows), desc="reading images", unit="img", disable=not show) as bar:
            # In the archive's own order: going back in a compressed tar means unpacking it again.
            needed = (parts for parts in source.files if parts in rows)
            for parts, future in decode_ahead(pool, source, needed, lambda *job: _decode(*job, image_size, channels)):
                images[rows[parts]] = future.result()
                bar.update()
    if not layout.classes:
        return images, None, ()
    numbers = {name: number for number, name in enumerate(layout.classes)}
    return images, torch.tensor([numbers[layout.class_of(parts)] for parts in layout.images]), layout.classes


@contextmanager
def decoders(processes: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode images, with Pillow's warning about decompression bombs made an error.

    processes: how many processes of this machine decode at the same time.
    """
    workers = max(1, min(8, (os.cpu_count() or 1) // processes))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", UserWarning)  # odd metadata that Pillow copes with
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield pool
        except BaseException:  # Ctrl-C too: what is queued is not decoded any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def decode_ahead(
    pool: ThreadPoolExecutor,
    source: Source,
    files: Iterable[Parts],
    decode: Callable[[str, Path | BytesIO], object],
) -> Iterator[tuple[Parts, Future]]:
    """`decode(name, data)` of the files in their order, up to IN_FLIGHT of them ahead of the consumer.

    Fewer if they are large: what an archive's files unpack to is in memory until they are decoded.
    """
    pending: deque = deque()
    held = 0
    for parts in files:
        data = source.read(parts)
        size = data.getbuffer().nbytes if isinstance(data, BytesIO) else 0
        pending.append((parts, pool.submit(decode, source.name(parts), data), size))
        held += size
        while pending and (len(pending) >= IN_FLIGHT or held > IN_FLIGHT_BYTES):
            *done, size = pending.popleft()
            held -= size
            yield tuple(done)
    yield from ((parts, future) for parts, future, _ in pending)


@contextmanager
def open_image(name: str, data: Path | BytesIO) -> Iterator[Image.Image]:
    """An image whose header is read and whose pixels are not. Raises AssetError by `name` if it is none, or broken."""
    try:
        image = Image.open(data, formats=FORMATS)
    except Exception as error:  # a damaged file raises nearly anything in Pillow's parsers
        raise AssetError(f"{name} is not an image or is broken ({_reason(error)})") from error
    with image:
        yield image


def load_pixels(name: str, image: Image.Image) -> None:
    """Read the pixels. Raises AssetError by `name` if the file is broken or cut short."""
    try:
        image.load()
    except Exception as error:  # as above
        raise AssetError(f"{name} is broken ({_reason(error)})") from error


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"  # Pillow's own text names a memory address
    return str(error) or type(error).__name__


def _decode(name: str, data: Path | BytesIO, image_size: int, channels: int) -> torch.Tensor:
    """One file → uint8 (C, S, S). Raises AssetError by `name` for another image than this."""
    mode = MODES[channels]
    with open_image(name, data) as image:
        facts = facts_of(image)
        for problem in problems(facts, image_size, mode).values():
            advice = _advice(Path(name).suffix, facts, image_size, mode)
            raise AssetError(f"{name} {problem}; {advice}; `bash run.sh check_data` lists all such images")
        load_pixels(name, image)
        pixels = torch.from_numpy(np.array(image))  # (S, S) or (S, S, 3)
    return pixels.view(image_size, image_size, channels).permute(2, 0, 1)


def check_first(source: Source, layout: Layout, image_size: int, channels: int) -> None:
    """Raises AssetError if the first image is not what a network of this size and channels takes."""
    first = layout.images[0]
    _decode(source.name(first), source.read(first), image_size, channels)


# --- images that do not fit --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Facts:
    width: int
    height: int
    mode: str  # Pillow's
    deep: bool  # a channel has 16 bits or more


def facts_of(image: Image.Image) -> Facts:
    return Facts(image.width, image.height, image.mode, deeper_than_8_bits(image))


def deeper_than_8_bits(image: Image.Image) -> bool:
    """Whether a channel has 16 bits or more. Pillow opens 16-bit colour as RGB, and cuts it to 8."""
    return ";16" in repr(image.tile) or image.mode[0] in "IF"


def problems(image: Facts, size: int, mode: str) -> dict[str, str]:
    """What keeps an image from being `size` pixels a side in `mode`: {"size", "mode" or "depth": what is wrong}."""
    found = {}
    if (image.width, image.height) != (size, size):
        found["size"] = f"is {image.width}x{image.height}, not {size}x{size}"
    if image.mode != mode:
        found["mode"] = f"has mode {image.mode}, not {mode}"
    elif image.deep:
        found["depth"] = "has 16 bits a channel, not 8"
    return found


def _advice(suffix: str, image: Facts, size: int, mode: str) -> str:
    """Change the model, where it could take such images, or the images."""
    settings = []
    if image.width == image.height != size and image.width % 4 == 0:
        settings.append(size_settings(image.width))
    if image.mode != mode and image.mode in MODES.values():
        settings.append(f"model.channels={ {name: n for n, name in MODES.items()}[image.mode] }")
    instead = f"if all images are so, --set {' '.join(settings)}, or " if settings else ""
    return f"{instead}in a copy of the folder run: {repair_command([suffix], size, mode)}"


def size_settings(size: int) -> str:
    """The settings with which the pixel recipes' U-nets, of three resolutions, train at a size that 4 divides."""
    return f"model.image_size={size} model.attention=[{size // 4}]"


def repair_command(suffixes: Iterable[str], size: int, mode: str) -> str:
    """A shell command that brings all images in and below a folder to this size and mode."""
    shifted = "i.point(lambda v: v / 256).convert('L') if i.mode[0] == 'I' else i"  # 16 bits: converted, they clip
    fit = f"o.fit(o.exif_transpose({shifted}).convert('{mode}'), ({size}, {size})).save(p, quality=95)"
    unfit = f"(i.size, i.mode) != (({size}, {size}), '{mode}') or ';16' in repr(i.tile)"
    script = (
        "import sys; from PIL import Image, ImageOps as o; "
        f"[{fit} for p in sys.argv[1:] for i in [Image.open(p)] if {unfit}]"
    )
    names = " -o ".join(f"-name '*{suffix}'" for suffix in sorted(suffixes))
    return f"""find . -type f \\( {names} \\) -exec python -c "{script}" {{}} +"""


# --- cropping, for latents ---------------------------------------------------------------------------------------


def crop_file(name: str, data: Path | BytesIO, size: int) -> torch.Tensor:
    """One file of any size and mode → uint8 (3, size, size), cropped as ADM does. Raises AssetError by `name`."""
    with open_image(name, data) as image:
        width, height = image.size
        if max(width, height) * size**2 > MAX_PIXELS * min(width, height):
            raise AssetError(f"{name} is {width}x{height}, too narrow a strip to be cropped to {size}x{size}")
        if deeper_than_8_bits(image):  # converted, its bright half would be white
            raise AssetError(f"{name} has 16 bits a channel or more, not 8")
        load_pixels(name, image)
        cropped = centre_crop(image.convert("RGB"), size)
    return torch.from_numpy(np.array(cropped)).permute(2, 0, 1)


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The middle size×size pixels of an image whose short side is brought to `size`: ADM's preprocessing.

    Halved by a box filter while the short side is at least 2·size, then scaled by a bicubic one until it is `size`.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
