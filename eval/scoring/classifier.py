"""`python -m eval.scoring.classifier RUN`: do samples show the class that was asked for? A plain classifier judges.

It is a support vector machine (scikit-learn, RBF kernel, default settings) fitted to the pixels of the run's own
training images. That suits small images such as digits; beside the share of agreement stands how well the
classifier does on real images that it was not fitted to.
"""

import argparse
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import Tensor

from eval.scoring.files import write_json
from eval.scoring.subjects import Sampling, draw_labels
from meanflow.data import DataConfig, Dataset, LatentsConfig, load_dataset
from meanflow.data.dataset import digits
from meanflow.errors import UserError, run_main
from meanflow.training.model import Model, generate, load, to_uint8
from meanflow.training.run_folder import RunFolder

FOLDS = 5
BATCH = 500
MAX_PIXELS = 1024  # numbers in an image: beyond, pixels say little about classes


@dataclass(frozen=True)
class Agreement:
    """`agreement`: share of samples classified as asked for; `real`: of real images, cross-validated. Both 0 … 1."""

    agreement: float
    real: float
    samples: int
    steps: int
    ema: str
    seed: int


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.scoring.classifier", description=__doc__)
    parser.add_argument("run", type=Path, help="run folder of a class-conditional run")
    parser.add_argument("--n", type=int, default=5000, help="samples (5000)")
    parser.add_argument("--steps", type=int, default=1, help="network evaluations a sample, NFE (1)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    parser.add_argument("--seed", type=int, default=0, help="of labels and noise (0)")
    args = parser.parse_args(argv)
    if args.n < 1 or args.steps < 1:
        raise UserError("--n and --steps must be ≥ 1")
    model = load(args.run, args.ema, "cpu")
    found = agreement(model, args.n, args.steps, args.seed)
    if args.run.is_dir():
        write_json(agreement_file(RunFolder(args.run), model, args.steps), asdict(found))
    print(
        f"{found.agreement:.1%} of {found.samples:,} samples (NFE {found.steps}, EMA {found.ema}) are classified as "
        f"asked for; the classifier is right on {found.real:.1%} of real images (cross-validated)"
    )
    return 0


def agreement_file(run: RunFolder, model: Model, steps: int) -> Path:
    return run.path / f"agreement-step{model.meta['step']:08d}-ema{model.ema}-nfe{steps}.json"


def agreement(model: Model, n: int, steps: int, seed: int = 0) -> Agreement:
    """Judge n samples with uniformly random labels. Raises UserError for a run without classes or with large images."""
    config = model.config
    if not config.model.classes:
        raise UserError(f"{model.path}: is unconditional, so no class was asked for")
    if np.prod(config.image_shape) > MAX_PIXELS:
        raise UserError(f"{model.path}: a classifier of pixels says nothing about images of {config.image_shape}")
    classifier, real = _judge(config.data, config.model.image_size, config.model.channels)
    labels = draw_labels(Sampling(n, seed, "random", "round"), config.model.classes)
    right = 0
    for start in range(0, n, BATCH):
        asked = labels[start : start + BATCH]
        images = to_uint8(generate(model, start, start + len(asked), steps, seed, asked)).cpu()
        right += int((classifier.predict(_features(images)) == asked.numpy()).sum())
    return Agreement(right / n, real, n, steps, model.ema, seed)


def fitted_classifier(real: Dataset):
    """(a classifier fitted to all images, its cross-validated accuracy)."""
    from sklearn.model_selection import cross_val_score  # here: scikit-learn takes a second to import
    from sklearn.svm import SVC

    features, labels = _features(real.images), real.labels.numpy()
    accuracy = cross_val_score(SVC(), features, labels, cv=FOLDS).mean()
    return SVC().fit(features, labels), float(accuracy)


@lru_cache(maxsize=1)  # the runs of a table have the same images
def _judge(data: DataConfig | LatentsConfig, size: int, channels: int):
    if isinstance(data, DataConfig):
        return fitted_classifier(load_dataset(data, size, channels))
    if data.source == "digits":
        return fitted_classifier(digits(data.split))
    raise UserError("of latents of image files the images are not kept, so no classifier can be fitted")


def _features(images: Tensor) -> np.ndarray:
    return images.flatten(1).numpy() / 255.0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
