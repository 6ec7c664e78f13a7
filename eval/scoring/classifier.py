"""Classifier accuracy: do samples show the class that was asked for? A plain classifier judges.

It is a support vector machine (scikit-learn, RBF kernel, default settings) fitted to the pixels of the run's own
training images. That suits small images such as digits; its own accuracy on real images that it was not fitted to says
how far it can be trusted.
"""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from eval.scoring.options import guidance_name
from eval.scoring.sources import Sampling, draw_labels
from meanflow.data import DataConfig, Dataset, LatentsConfig, load_dataset
from meanflow.data.dataset import digits
from meanflow.errors import AssetError, UserError
from meanflow.files import read_json, write_json
from meanflow.guidance import GuidanceInput
from meanflow.training.config import RunConfig
from meanflow.training.model import Model, generate, to_uint8
from meanflow.training.run_folder import RunFolder

FOLDS = 5
BATCH = 500
MAX_PIXELS = 1024  # numbers in an image: beyond, pixels say little about classes


@dataclass(frozen=True)
class ClassifierAccuracy:
    """accuracy: the fraction of samples classified as asked for; real: of real images, cross-validated. Both 0 … 1."""

    accuracy: float
    real: float
    samples: int
    steps: int
    ema: str
    seed: int


def accuracy_file(run: RunFolder, step: int, ema: str, steps: int, guidance: GuidanceInput | None = None) -> Path:
    """Its name, and the key `agreement` in it, are as in the first version of this kit."""
    guided = "" if guidance is None else guidance_name(guidance.omega, guidance.interval)
    return run.path / f"agreement-step{step:08d}-ema{ema}-nfe{steps}{guided}.json"


def write_accuracy(path: Path, found: ClassifierAccuracy) -> None:
    tree = asdict(found)
    write_json(path, {"agreement": tree.pop("accuracy"), **tree})


def read_accuracy(path: Path) -> ClassifierAccuracy | None:
    """None if there is no file. Raises AssetError if it is something else."""
    if not path.exists():
        return None
    tree: Any = read_json(path)
    try:
        return ClassifierAccuracy(tree.pop("agreement"), **tree)
    except (TypeError, KeyError, AttributeError) as error:
        raise AssetError(f"{path}: is not a classifier's result ({error}); move it away") from error


def classifiable(config: RunConfig) -> str | None:
    """Why samples of this run cannot be judged; None if they can."""
    if not config.model.classes:
        return "is unconditional, so no class was asked for"
    if np.prod(config.image_shape) > MAX_PIXELS:
        return f"a classifier of pixels says nothing about images of {config.image_shape}"
    return None


def classifier_accuracy(
    model: Model, n: int, steps: int, seed: int = 0, guidance: GuidanceInput | None = None
) -> ClassifierAccuracy:
    """Judge n samples with uniformly random labels, of this guidance where it is an input of the network.

    Raises UserError for a run without classes or with large images.
    """
    config = model.config
    if reason := classifiable(config):
        raise UserError(f"{model.path}: {reason}")
    classifier, real = _fitted_to(config.data, config.model.image_size, config.model.channels)
    labels = draw_labels(Sampling(n, seed, "random", config.sample.uint8), config.model.classes)
    right, how = 0, {} if guidance is None else {"guidance": guidance}
    for start in range(0, n, BATCH):
        asked = labels[start : start + BATCH]
        images = generate(model, start, start + len(asked), steps, seed, asked, **how)
        images = to_uint8(images, config.sample.uint8).cpu()
        right += int((classifier.predict(_features(images)) == asked.numpy()).sum())
    return ClassifierAccuracy(right / n, real, n, steps, model.ema, seed)


def fitted_classifier(real: Dataset):
    """(a classifier fitted to all images, its cross-validated accuracy)."""
    from sklearn.model_selection import cross_val_score  # here: scikit-learn takes a second to import
    from sklearn.svm import SVC

    features, labels = _features(real.images), real.labels.numpy()
    accuracy = cross_val_score(SVC(), features, labels, cv=FOLDS).mean()
    return SVC().fit(features, labels), float(accuracy)


@lru_cache(maxsize=1)  # the runs of a table have the same images
def _fitted_to(data: DataConfig | LatentsConfig, size: int, channels: int):
    if isinstance(data, DataConfig):
        return fitted_classifier(load_dataset(data, size, channels))
    if data.source == "digits":
        return fitted_classifier(digits(data.split))
    raise UserError("of latents of image files the images are not kept, so no classifier can be fitted")


def _features(images: Tensor) -> np.ndarray:
    return images.flatten(1).numpy() / 255.0
