"""Samples as one picture: tiled, enlarged where they are small, a row for each class with its name."""

import math
import re
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from meanflow.errors import AssetError, write_errors_named
from meanflow.training.config import RunConfig
from meanflow.training.model import Model, load, to_uint8
from meanflow.training.run_folder import RunFolder

SMOOTH_BELOW = 16  # pixels a side: smaller images are enlarged smoothly, since they are hard to recognise as squares
WIDTH = 800  # about, in pixels
CAPTION = 18  # height of the letters


def columns_of(n: int, columns: int | None) -> int:
    """Columns of a grid of n images: as asked, else about as many as rows."""
    return min(columns or math.ceil(math.sqrt(n)), n)


def row_labels(n: int, columns: int, classes: int) -> Tensor:
    """The class of each image where every row has one: (n,) int64. Few rows have classes from all over their range."""
    rows = -(-n // columns)
    row = torch.arange(n) // columns
    return row % classes if rows >= classes else row * classes // rows


def class_names(names: list[str]) -> list[str]:
    """Readable names: of ImageNet's 1000 classes in place of their WordNet numbers; others are unchanged."""
    if len(names) != 1000 or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from torchvision.models import ResNet50_Weights

    return ResNet50_Weights.DEFAULT.meta["categories"]  # in the order of the sorted numbers


def grid(images: Tensor, columns: int, captions: list[str] | None = None, gap: int = 2) -> Image.Image:
    """Tile uint8 (N, C, H, W) on white, enlarged by a whole factor to about 800 pixels; `captions` left of the rows."""
    n, channels, height, width = images.shape
    rows = -(-n // columns)
    scale = max(1, min(8, WIDTH // (columns * width)))
    mode = "bicubic" if max(height, width) < SMOOTH_BELOW else "nearest"
    images = F.interpolate(images.float(), scale_factor=scale, mode=mode).round().clamp(0, 255).to(torch.uint8)
    height, width = height * scale + gap, width * scale + gap
    canvas = torch.full((channels, rows * height + gap, columns * width + gap), 255, dtype=torch.uint8)
    for k, image in enumerate(images):
        y, x = gap + k // columns * height, gap + k % columns * width
        canvas[:, y : y + height - gap, x : x + width - gap] = image
    picture = pil(canvas)
    return picture if captions is None else _captioned(picture, captions, height)


def _captioned(picture: Image.Image, captions: list[str], row_height: int) -> Image.Image:
    font = ImageFont.load_default(CAPTION)
    margin = 12 + math.ceil(max(font.getlength(caption) for caption in captions))
    out = Image.new(picture.mode, (picture.width + margin, picture.height), "white")
    out.paste(picture, (margin, 0))
    draw = ImageDraw.Draw(out)
    for row, caption in enumerate(captions):
        middle = (margin - 8, row * row_height + row_height // 2)
        draw.text(middle, caption, fill=0 if picture.mode == "L" else "black", font=font, anchor="rm")
    return out


def pil(image: Tensor) -> Image.Image:
    """uint8 (C, H, W), grey or RGB."""
    array = image.permute(1, 2, 0).numpy()
    return Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)


def class_labels(model: Model, n: int, label: int | None, columns: int | None = None) -> Tensor | None:
    """(n,) int64: `label`, or each class in turn, or in a grid of `columns` a class for each row.

    None if unconditional. Raises UserError for a class that is not there.
    """
    classes = model.config.model.classes
    if classes and label is None and columns is not None:
        return row_labels(n, columns, classes)
    return model.class_labels(n, label)


def captions(model: Model, labels: Tensor | None, columns: int) -> list[str] | None:
    """The caption of each row of a grid: the name of its class, where the run knows it and the row has just one."""
    if labels is None or not model.meta["data"]["classes"]:
        return None
    names, rows = class_names(model.meta["data"]["classes"]), labels.split(columns)
    return [names[row[0]] if (row == row[0]).all() else "" for row in rows]


def write(
    images: Tensor,
    out: Path,
    columns: int | None = None,
    captions: list[str] | None = None,
    labels: Tensor | None = None,
) -> None:
    """uint8 (N, C, H, W) to a grid PNG, an npz (`arr_0`, N×H×W×C) or a folder of numbered PNGs.

    labels (N,): the classes asked for, `labels` in the npz and part of the PNGs' names. Raises AssetError if the disk
    refuses.
    """
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".png":
            grid(images, columns_of(len(images), columns), captions).save(out)
        elif out.suffix == ".npz":
            classes = {} if labels is None else {"labels": labels.numpy()}
            np.savez_compressed(out, arr_0=images.permute(0, 2, 3, 1).numpy(), **classes)
        else:
            out.mkdir(exist_ok=True)
            for k, image in enumerate(images):
                name = f"{k:06d}" if labels is None else f"{k:06d}_class{labels[k]}"
                pil(image).save(out / f"{name}.png")
    except OSError as error:
        raise AssetError(f"{out}: cannot be written ({error.strerror or error})") from error


def write_grid(run: RunFolder, config: RunConfig, device: torch.device) -> None:
    """The grid that the recipe asks for, as RUN/samples.png. Raises AssetError if the disk refuses."""
    with write_errors_named(run.path / "samples.png"):
        recipe_grid(load(run.path, device=device), config).save(run.path / "samples.png")


def recipe_grid(model: Model, config: RunConfig) -> Image.Image:
    """The grid of samples that a recipe asks for."""
    count, columns = config.sample.count, columns_of(config.sample.count, config.sample.columns)
    labels = class_labels(model, count, None, columns)
    images = model.sample(count, config.sample.steps, config.sample.seed, labels)
    return grid(to_uint8(images, config.sample.uint8), columns, captions(model, labels, columns))
