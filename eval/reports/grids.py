"""Grids of samples for the report, as PNGs in memory."""

from dataclasses import dataclass

from torch import Tensor

from eval.reports.html import png_of
from eval.sampling.grid import captions, class_labels, columns_of, grid
from meanflow.errors import NumericsError
from meanflow.training.config import WEIGHTS
from meanflow.training.model import Model, device_of, model_of, open_checkpoint, to_uint8
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


def sample_grids(run: RunFolder, steps: tuple[int, ...], count: int, device: str | None, every_ema: bool) -> Grids:
    """`count` samples for each of `steps` (NFE), of the newest checkpoint with the recipe's EMA.

    device: by default CUDA where there is one. With `every_ema` also of each other EMA and of the weights as the
    optimiser left them. Raises AssetError or ConfigError if the checkpoint cannot be used.
    """
    device = device_of(device)
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


def _grid(model: Model, nfe: int, count: int, columns: int, labels: Tensor | None) -> bytes | None:
    try:
        images = model.sample(count, nfe, SEED, labels, batch=BATCH)
    except NumericsError:  # of a run that has diverged the report is worth having too
        return None
    picture = grid(to_uint8(images, model.config.sample.uint8), columns)
    picture.thumbnail((LARGEST, LARGEST))
    return png_of(picture)
