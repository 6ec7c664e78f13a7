"""Image files → tensors. Nothing is resized or converted unasked: other images are errors, unless `data.resize` is set.

layout.py says which files are images of a split, and what their classes are.
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
from meanflow.data.layout import Layout, arrange
from meanflow.errors import AssetError
from meanflow.logs import progress_bar

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
CROP = "crop"
RESIZES = (CROP,)  # what data.resize may be, besides null
SHOW_PROGRESS_ABOVE = 5000  # fewer are read in a second or two
IN_FLIGHT, IN_FLIGHT_BYTES = 512, 64 * 2**20  # files of an archive read ahead of the decoders
FOREIGN = ("F", "La", "LAB")  # modes that have no conversion, or no known range
MAX_PIXELS = 2**26  # of an image once its short side is cropped to size; only a strip is larger


# --- reading -----------------------------------------------------------------------------------------------------


def load_images(
    path: str, split: str, image_size: int, channels: int, progress: bool, resize: str | None = None
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[str, ...]]:
    """Images of a folder, zip, tar or parquet files, uint8 (N, C, S, S), in the order of their layout; labels, int64
    (N,), None without classes; class names.

    resize: as `data.resize`. Raises AssetError for an unreadable source or, by name, an image that is broken or of
    another size or mode, and ConfigError if the source does not have the split.
    """

    def decoded(name: str, data: Path | BytesIO) -> torch.Tensor:
        return decode(name, data, image_size, channels, resize)

    with open_source(path) as source, decoders() as pool:
        layout = arrange(source, split)
        rows = {parts: row for row, parts in enumerate(layout.images)}
        images = torch.empty(len(rows), channels, image_size, image_size, dtype=torch.uint8)
        show = progress and len(rows) > SHOW_PROGRESS_ABOVE
        with progress_bar(total=len(rows), desc="reading images", unit="img", disable=not show) as bar:
            # In the archive's own order: going back in a compressed tar means unpacking it again.
            needed = (parts for parts in source.files if parts in rows)
            for parts, future in decode_ahead(pool, source, needed, decoded):
                images[rows[parts]] = future.result()
                bar.update()
    return images, None if layout.labels is None else torch.tensor(layout.labels), layout.classes


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


class UnfitImage(AssetError):
    """(fault, advice) of an image of another size or mode; the advice is for runs."""

    def __str__(self) -> str:
        fault, advice = self.args
        return f"{fault}: {advice}; bash run.sh check_data lists all such"


def decode(name: str, data: Path | BytesIO, size: int, channels: int, resize: str | None) -> torch.Tensor:
    """One file → uint8 (channels, size, size). Raises AssetError by `name` if it is broken or not what it should be."""
    if resize == CROP:
        return crop_file(name, data, size, channels)
    mode = MODES[channels]
    with open_image(name, data) as image:
        facts = facts_of(image)
        for problem in problems(facts, size, mode).values():
            raise UnfitImage(f"{name} {problem}", _advice(facts, size, mode))
        load_pixels(name, image)
        return _tensor(image)


def _tensor(image: Image.Image) -> torch.Tensor:
    """Grey or RGB → uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def check_first(source: Source, layout: Layout, image_size: int, channels: int, resize: str | None) -> None:
    """Raises AssetError if the first image is not what a network of this size and channels takes."""
    first = layout.images[0]
    decode(source.name(first), source.read(first), image_size, channels, resize)


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


def problems(image: Facts, size: int, mode: str, resize: str | None = None) -> dict[str, str]:
    """What keeps an image from becoming `size` pixels a side in `mode`: {"size", "mode" or "depth": what is wrong}."""
    found = {}
    if resize == CROP:
        if max(image.width, image.height) * size**2 > MAX_PIXELS * min(image.width, image.height):
            found["size"] = f"is {image.width}x{image.height}, too narrow a strip to be cropped to {size}x{size}"
        if image.mode in FOREIGN:
            found["mode"] = f"has mode {image.mode}, which cannot be converted"
        return found
    if (image.width, image.height) != (size, size):
        found["size"] = f"is {image.width}x{image.height}, not {size}x{size}"
    if image.mode != mode:
        found["mode"] = f"has mode {image.mode}, not {mode}"
    elif image.deep:
        found["depth"] = "has 16 bits a channel, not 8"
    return found


def _advice(image: Facts, size: int, mode: str) -> str:
    """Change the model, where it could take such images, or let them be cropped and converted."""
    settings = []
    if image.width == image.height != size and image.width % 4 == 0:
        settings.append(size_settings(image.width))
    if image.mode != mode and image.mode in MODES.values():
        settings.append(f"model.channels={ {name: n for n, name in MODES.items()}[image.mode] }")
    instead = f"if all images are so, --set {' '.join(settings)}, or " if settings else ""
    return f"{instead}--set data.resize=crop, which crops, scales and converts all images"


def size_settings(size: int) -> str:
    """The settings with which the pixel recipes' U-nets, of three resolutions, train at a size that 4 divides."""
    return f"model.image_size={size} model.attention=[{size // 4}]"


# --- images of any size ------------------------------------------------------------------------------------------


def crop_file(name: str, data: Path | BytesIO, size: int, channels: int = 3, deep: bool = True) -> torch.Tensor:
    """One file of any size and mode → uint8 (channels, size, size), converted and then cropped as ADM does.

    deep: whether images of 16 bits a channel are taken. Raises AssetError by `name` for those that cannot be.
    """
    with open_image(name, data) as image:
        facts = facts_of(image)
        if facts.deep and not deep:
            raise AssetError(f"{name} has 16 bits a channel or more, not 8")
        for problem in problems(facts, size, MODES[channels], CROP).values():
            raise AssetError(f"{name} {problem}")
        load_pixels(name, image)
        return _tensor(centre_crop(converted(image, MODES[channels]), size))


def converted(image: Image.Image, mode: str) -> Image.Image:
    """In mode L or RGB, as Pillow converts: L is the luma of ITU-R 601, and an alpha channel is dropped.

    Of 16 bits the upper 8 are kept.
    """
    if image.mode[0] == "I":  # Pillow would clip at 255
        image = Image.fromarray(np.clip(np.asarray(image) >> 8, 0, 255).astype(np.uint8))
    return image.convert(mode)


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
