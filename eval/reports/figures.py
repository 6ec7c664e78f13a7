"""The report's pictures as PNGs in memory: curves, grids of samples, and files that are there already."""

import io
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from eval.plot import plot
from eval.sample import captions, class_labels
from eval.sampling.grid import columns_of, grid
from meanflow.errors import AssetError, NumericsError
from meanflow.training.model import WEIGHTS, Model, generate, model_of, open_checkpoint, to_uint8
from meanflow.training.run_folder import RunFolder

SEED = 0
BATCH = 64  # samples at once
LARGEST = 900  # pixels a side of a grid: of large images more would make a page of tens of MB


@dataclass(frozen=True)
class Grids:
    """Samples of the checkpoint of `step`: {weights: a PNG for each NFE, None where samples are not finite}.

    All are of the same noise. `classes` are the rows' names, if the run knows classes; `recipe` is its own EMA.
    """

    step: int
    recipe: str
    rows: dict[str, list[bytes | None]]
    classes: list[str]


def curves(runs: list[RunFolder]) -> bytes:
    """The figure of `python -m eval.plot`. Raises AssetError if there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curves.png"
        plot(runs, out)
        return out.read_bytes()


def has_checkpoint(run: RunFolder) -> bool:
    return any(run.checkpoints.glob("*.pt"))


def sample_grids(run: RunFolder, steps: list[int], count: int, every_ema: bool, device: torch.device) -> Grids:
    """`count` samples for each of `steps` (NFE), of the newest checkpoint with the recipe's EMA.

    With `every_ema` also of each other EMA and of the weights as the optimiser left them. Raises AssetError or
    ConfigError if the checkpoint cannot be used.
    """
    path, checkpoint = open_checkpoint(run.path)
    recipe = model_of(path, checkpoint, None, device)
    columns = columns_of(count, None)
    others = [ema for ema in [*checkpoint.ema, WEIGHTS] if ema != recipe.ema] if every_ema else []
    labels = class_labels(recipe, count, None, columns)
    rows = {}
    for ema in [recipe.ema, *others]:
        model = recipe if ema == recipe.ema else model_of(path, checkpoint, ema, device)
        rows[ema] = [_grid(model, nfe, count, columns, labels) for nfe in steps]
    return Grids(checkpoint.meta["step"], recipe.ema, rows, captions(recipe, labels, columns) or [])


def _grid(model: Model, steps: int, count: int, columns: int, labels: torch.Tensor | None) -> bytes | None:
    images = []
    try:
        for start in range(0, count, BATCH):
            stop = min(start + BATCH, count)
            asked = None if labels is None else labels[start:stop]
            images.append(to_uint8(generate(model, start, stop, steps, SEED, asked)).cpu())
    except NumericsError:  # of a run that has diverged the report is worth having too
        return None
    picture = grid(torch.cat(images), columns)
    picture.thumbnail((LARGEST, LARGEST))
    return _png(picture)


def read_picture(path: Path) -> bytes | None:
    """A picture file as a PNG; None if there is none. Raises AssetError if it is damaged."""
    if not path.exists():
        return None
    try:
        with Image.open(path) as picture:
            return _png(picture)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise AssetError(f"{path}: cannot be read as a picture ({error})") from error


def _png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, format="PNG", optimize=True)
    return out.getvalue()
