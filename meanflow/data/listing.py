"""What is to be encoded: a numbered list of images with classes, decoded ahead by threads.

Images of any size are brought to S×S as ADM does: halved by a box filter while the short side is at least 2·S, then
scaled by a bicubic one until it is S, and cropped in the middle.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from meanflow.data.dataset import digits
from meanflow.data.images import decode_ahead, decoders, deeper_than_8_bits, load_pixels, open_image
from meanflow.data.latents import LatentsConfig
from meanflow.data.layout import arrange
from meanflow.data.shards import sha256_json
from meanflow.data.sources import open_source
from meanflow.errors import AssetError, ConfigError

MAX_PIXELS = 2**26  # of an image once its short side is S; only a strip is larger


@dataclass(frozen=True, eq=False)
class Listing:
    """Numbered images, in the order in which their source is read fastest."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    channels: int
    sha256: str  # of the names and the classes; of the pixels where images are not files
    decode: Callable[[Iterable[int]], Iterator[Future]]  # numbers → uint8 (channels, S, S), or AssetError by name


@contextmanager
def open_listing(config: LatentsConfig, ctx: int) -> Iterator[Listing]:
    """The images that `config` names; `processes` of this machine read them at the same time.

    Raises:
        AssetError: nothing there, unreadable, no class folders, or one that is empty.
        ConfigError: no such split, or an image size that the source does not have.
    """
    if config.source == "digits":
        yield _digits(config)
        return
    with open_source(config.images, "data.images") as source, decoders(ctx) as pool:
        classes_of = dict(arrange(source, config.split))
        if None in classes_of.values():
            raise AssetError(f"{source.where}: has images but no class folders, which latents need: one folder a class")
        files = [parts for parts in source.files if parts in classes_of]
        classes = sorted(set(classes_of.values()))
        number = {name: k for k, name in enumerate(classes)}
        names = ["/".join(parts) for parts in files]

        def decode(numbers: Iterable[int]) -> Iterator[Future]:
            wanted = (files[k] for k in numbers)
            ahead = decode_ahead(pool, source, wanted, lambda name, data: crop_file(name, data, config.image_size))
            return (future for _, future in ahead)

        labels = [number[classes_of[parts]] for parts in files]
        yield Listing(names, labels, tuple(classes), 3, sha256_json([names, classes]), decode)


def _digits(config: LatentsConfig) -> Listing:
    data = digits(config.split)
    if config.image_size != data.images.shape[-1]:
        raise ConfigError(f"data.source digits has data.image_size {data.images.shape[-1]}, not {config.image_size}")

    def decode(numbers: Iterable[int]) -> Iterator[Future]:
        for k in numbers:
            future: Future = Future()
            future.set_result(data.images[k])
            yield future

    names = [f"digit {k}" for k in range(len(data))]
    digest = hashlib.sha256(data.images.numpy()).hexdigest()
    return Listing(names, data.labels.tolist(), data.class_names, data.images.shape[1], digest, decode)


def crop_file(name: str, data: Path | BytesIO, size: int) -> torch.Tensor:
    """One file → uint8 (3, size, size), cropped as ADM does. Raises AssetError by `name`."""
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
    """The middle size×size pixels of an image whose short side is brought to `size` (ADM's preprocessing)."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
