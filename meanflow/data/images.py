"""Image files → one uint8 tensor. Nothing is resized or converted in silence: other images are errors."""

import os
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from meanflow.data.layout import arrange
from meanflow.data.sources import open_source
from meanflow.errors import AssetError
from meanflow.progress import progress_bar

MODES = {1: "L", 3: "RGB"}  # channels → Pillow's mode
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
SHOW_PROGRESS_ABOVE = 5000  # fewer are read in a second or two
IN_FLIGHT = 512  # files read ahead of the decoders


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
    with open_source(path) as source, warnings.catch_warnings(), ThreadPoolExecutor(_workers()) as pool:
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        entries = arrange(source, split)
        classes = sorted({name for _, name in entries if name is not None})
        rows = {parts: row for row, (parts, _) in enumerate(entries)}
        images = torch.empty(len(entries), channels, image_size, image_size, dtype=torch.uint8)
        pending: deque = deque()
        show = progress and len(entries) > SHOW_PROGRESS_ABOVE
        with progress_bar(total=len(entries), desc="reading images", unit="img", disable=not show) as bar:
            # In the archive's own order: going back in a compressed tar means unpacking it again.
            for parts in source.files:
                if parts in rows:
                    job = (source.name(parts), source.read(parts), image_size, channels)
                    pending.append((rows[parts], pool.submit(_decode, *job)))
                while pending and len(pending) >= IN_FLIGHT:
                    _store(images, pending, bar)
            while pending:
                _store(images, pending, bar)
    if not classes:
        return images, None, ()
    numbers = {name: number for number, name in enumerate(classes)}
    return images, torch.tensor([numbers[name] for _, name in entries]), tuple(classes)


def _workers() -> int:
    return min(8, os.cpu_count() or 1)


def _store(images: torch.Tensor, pending: deque, bar: Any):
    row, future = pending.popleft()
    images[row] = future.result()
    bar.update()


def _decode(name: str, data: Path | BytesIO, image_size: int, channels: int) -> torch.Tensor:
    """One file → uint8 (C, S, S). `name` is for messages."""
    mode, problem = MODES[channels], ""
    try:
        image = Image.open(data, formats=FORMATS)
    except Exception as error:  # a damaged file raises nearly anything in Pillow's parsers
        raise AssetError(f"{name} is not an image or is broken ({_reason(error)})") from error
    with image:
        if image.size != (image_size, image_size):
            problem = f"is {image.size[0]}x{image.size[1]}, not {image_size}x{image_size}"
        elif image.mode != mode:
            problem = f"has mode {image.mode}, not {mode}"
        elif ";16" in repr(image.tile):  # Pillow opens 16-bit colour as RGB and cuts it to 8 bits
            problem = "has 16 bits a channel, not 8"
        if problem:
            raise AssetError(f"{name} {problem}; {_mend(name, image_size, mode)}")
        try:
            image.load()
        except Exception as error:  # as above
            raise AssetError(f"{name} is broken ({_reason(error)})") from error
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
