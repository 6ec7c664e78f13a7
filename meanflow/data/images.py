"""Image files → one uint8 tensor. Nothing is resized or converted in silence: other images are errors."""

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meanflow.data.layout import arrange
from meanflow.data.sources import Parts, Source, open_source
from meanflow.errors import AssetError
from meanflow.logs import progress_bar

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SHOW_PROGRESS_ABOVE = 5000  # fewer are read in a second or two
IN_FLIGHT, IN_FLIGHT_BYTES = 512, 64 * 2**20  # files of an archive read ahead of the decoders


def load_images(
    path: str, split: str, image_size: int, channels: int, progress: bool
) -> tuple[torch.Tensor, torch.Tensor | None, tuple[str, ...]]:
    """Read a folder, zip or tar in ImageFolder layout (see layout.py).

    Returns:
        images, uint8 (N, C, S, S), sorted by path; labels, int64 (N,), None for a flat folder; class names.

    Raises:
        AssetError: an unreadable source, or an image that is broken or of another size or mode, by name.
        ConfigError: the source does not have the split.
    """
    with open_source(path) as source, decoders() as pool:
        entries = arrange(source, split)
        classes = sorted({name for _, name in entries if name is not None})
        rows = {parts: row for row, (parts, _) in enumerate(entries)}
        images = torch.empty(len(entries), channels, image_size, image_size, dtype=torch.uint8)
        show = progress and len(entries) > SHOW_PROGRESS_ABOVE
        with progress_bar(total=len(entries), desc="reading images", unit="img", disable=not show) as bar:
            # In the archive's own order: going back in a compressed tar means unpacking it again.
            wanted = (parts for parts in source.files if parts in rows)
            for parts, future in decode_ahead(pool, source, wanted, lambda *job: _decode(*job, image_size, channels)):
                images[rows[parts]] = future.result()
                bar.update()
    if not classes:
        return images, None, ()
    numbers = {name: number for number, name in enumerate(classes)}
    return images, torch.tensor([numbers[name] for _, name in entries]), tuple(classes)


@contextmanager
def decoders(ctx: int = 1) -> Iterator[ThreadPoolExecutor]:
    """Threads that decode images, with Pillow's guard against decompression bombs an error.

    Args:
        processes: how many processes of this machine decode at the same time.
    """
    workers = max(1, min(8, (os.cpu_count() or 1) // ctx))
    with warnings.catch_warnings(), ThreadPoolExecutor(workers) as pool:
        warnings.simplefilter("ignore", UserWarning)  # odd metadata, of which Pillow speaks but copes
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            yield pool
        except BaseException:  # Ctrl-C too: what waits in line is not decoded any more
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def decode_ahead(
    pool: ThreadPoolExecutor,
    source: Source,
    wanted: Iterable[Parts],
    decode: Callable[[str, Path | BytesIO], torch.Tensor],
) -> Iterator[tuple[Parts, Future]]:
    """`decode(name, data)` of the wanted files in their order, up to IN_FLIGHT of them ahead of the consumer.

    Fewer if they are large: what an archive's files unpack to is in memory until they are decoded.
    """
    pending: deque = deque()
    held = 0
    for parts in wanted:
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


def deeper_than_8_bits(image: Image.Image) -> bool:
    """Whether a channel has 16 bits or more. Pillow opens 16-bit colour as RGB, and cuts it to 8."""
    return ";16" in repr(image.tile) or image.mode[0] in "IF"


def _decode(name: str, data: Path | BytesIO, image_size: int, channels: int) -> torch.Tensor:
    """One file → uint8 (C, S, S). `name` is for messages."""
    mode, problem = MODES[channels], ""
    with open_image(name, data) as image:
        if image.size != (image_size, image_size):
            problem = f"is {image.size[0]}x{image.size[1]}, not {image_size}x{image_size}"
        elif image.mode != mode:
            problem = f"has mode {image.mode}, not {mode}"
        elif deeper_than_8_bits(image):
            problem = "has 16 bits a channel, not 8"
        if problem:
            raise AssetError(f"{name} {problem}; {_mend(name, image_size, mode)}")
        load_pixels(name, image)
        pixels = torch.from_numpy(np.array(image))  # (S, S) or (S, S, 3)
    return pixels.view(image_size, image_size, channels).permute(2, 0, 1)


def _reason(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "no known image format"  # Pillow's own text names a memory address
    return str(error) or type(error).__name__


def _mend(name: str, size: int, mode: str) -> str:
    """A command that brings all images of a folder to the wanted size and mode."""
    fit = f"o.fit(o.exif_transpose(Image.open(p)).convert('{mode}'), ({size}, {size})).save(p, quality=95)"
    script = f"import sys; from PIL import Image, ImageOps as o; [{fit} for p in sys.argv[1:]]"
    suffix = Path(name).suffix
    return f"""in a copy of the folder run: find . -name '*{suffix}' -exec python -c "{script}" {{}} +"""
