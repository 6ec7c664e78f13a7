"""Where samples come from: whatever can give "images start … stop", the same at each call."""

from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scoring.files import NpzFile, sha256_images
from meanflow.data.archives import open_source
from meanflow.data.images import MODES, arrange, load_images
from meanflow.errors import AssetError, UserError


class Source(Protocol):
    """`n` images of `shape` (C, H, W). Image k is a function of k alone: not of the batch, the process or the
    call.

    `images(start, stop)` gives uint8 (stop − start, C, H, W) and raises NumericsError where a sample is not
    finite. `describe()` is JSON: all that the images depend on, so that an interrupted evaluation continues
    only its own.
    """

    n: int
    shape: tuple[int, int, int]

    def images(self, start: int, stop: int) -> Tensor: ...

    def describe(self) -> dict: ...


class ImagesSource:
    """Images that exist: uint8 (N, C, H, W) in memory. Raises UserError for other types and for no images."""

    def __init__(self, images: Tensor, origin: str):
        if images.dtype != torch.uint8:
            kind = str(images.dtype).removeprefix("torch.")
            raise UserError(f"{origin}: images are {kind}; save them as uint8 in 0 … 255")
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise UserError(
                f"{origin}: an array of shape {tuple(images.shape)} is not grey or RGB images: "
                "save (N, H, W, 3) or (N, H, W, 1)"
            )
        if not len(images):
            raise UserError(f"{origin}: zero images")
        self._images = images
        self.origin = origin
        self.n = len(images)
        self.shape = tuple(images.shape[1:])
        self.digest = sha256_images(images)

    def images(self, start: int, stop: int) -> Tensor:
        return self._images[start:stop]

    def describe(self) -> dict:
        return {"kind": "images", "origin": self.origin, "n": self.n, "sha256": self.digest}

    def first(self, n: int) -> "ImagesSource":
        """The first `n` of them. Raises UserError if there are fewer."""
        if n > self.n:
            raise UserError(f"{self.origin} holds {self.n} images and --n asks for {n}: lower --n or add images")
        return self if n == self.n else ImagesSource(self._images[:n], self.origin)


def read_images(path: Path) -> ImagesSource:
    """Images from a folder, zip or tar of image files, or from an npz whose `arr_0` is uint8 (N, H, W, C).

    Raises AssetError or UserError, naming the file, for what cannot be read or mixes sizes.
    """
    if not path.exists():
        raise AssetError(f"{path}: no such file or folder")
    if path.suffix == ".npz":
        file = NpzFile(path)
        if "arr_0" not in file:
            raise UserError(f"{path} holds {', '.join(file.names) or 'nothing'} but no images (arr_0)")
        return images_from_array(file["arr_0"], str(path))
    try:
        size, channels = _first_image(path)
        images, _, _ = load_images(str(path), "train", size, channels, progress=True)
    except UserError as error:  # they speak of a recipe's setting, and this is none
        raise type(error)(str(error).replace(f"data.path {path}", str(path))) from None
    return ImagesSource(images, str(path))


def _first_image(path: Path) -> tuple[int, int]:
    """(size, channels) of the first image, which all the others must share."""
    with open_source(str(path)) as source:
        parts = arrange(source, "train").images[0]
        name = source.name(parts)
        try:
            with Image.open(source.read(parts)) as image:
                (width, height), mode = image.size, image.mode
        except OSError as error:
            raise AssetError(f"{name} is not an image or is broken ({error})") from None
    channels = {mode: channels for channels, mode in MODES.items()}.get(mode)
    if channels is None or width != height:
        raise AssetError(f"{name} is {width}×{height} with mode {mode}: images must be square, RGB or L (grey)")
    return width, channels


def images_from_array(array: np.ndarray, origin: str) -> ImagesSource:
    """An ImagesSource of a numpy array (N, H, W, C) or grey (N, H, W). Raises UserError for anything else."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise UserError(f"{origin}: an array of shape {array.shape} is not images: save (N, H, W, 3)")
    return ImagesSource(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), origin)
