"""What is scored: one network under each of several EMAs and step counts, as sources of samples."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from eval.scoring.protocol import Variant
from meanflow.errors import UserError
from meanflow.random import generator
from meanflow.sampling import time_grid
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.model import WEIGHTS, Model, generate, model_of, to_uint8

BALANCED, RANDOM = "balanced", "random"


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: `labels` is "random", "balanced" or a class; `quantise` "round" or "floor"."""

    n: int
    seed: int
    labels: str
    quantise: str


class GeneratedSource:
    """Samples of a network: sample k is a function of (seed, k, steps, weights) whatever the batch or process."""

    def __init__(self, model: Model, weights: str, steps: int, sampling: Sampling):
        self.n, self.shape = sampling.n, model.config.image_shape
        self._model, self._weights, self._steps, self._sampling = model, weights, steps, sampling
        self._labels = draw_labels(sampling, model.config.model.classes)

    def images(self, start: int, stop: int) -> Tensor:
        labels = None if self._labels is None else self._labels[start:stop]
        with torch.no_grad():
            images = generate(self._model, start, stop, self._steps, self._sampling.seed, labels)
            return to_uint8(images, self._sampling.quantise).cpu()

    def describe(self) -> dict:
        return {
            "kind": "generated",
            "weights": self._weights,
            "seed": self._sampling.seed,
            "labels": None if self._labels is None else self._sampling.labels,
            "quantise": self._sampling.quantise,
        }


def draw_labels(sampling: Sampling, classes: int) -> Tensor | None:
    """(N,) int64 in [0, classes): "random" uniformly, "balanced" k mod classes, or one class; None if unconditional.

    Label k is a function of (seed, k). Raises UserError for a class that is not there.
    """
    if sampling.labels not in (RANDOM, BALANCED) and not sampling.labels.isdecimal():
        raise UserError(f"--labels {sampling.labels!r}: use random, balanced or a class number")
    if not classes:
        if sampling.labels != RANDOM:
            raise UserError(f"--labels {sampling.labels}: this network knows no classes")
        return None
    if sampling.labels == RANDOM:
        return torch.randint(classes, (sampling.n,), generator=generator(sampling.seed, "labels"))
    if sampling.labels == BALANCED:
        return torch.arange(sampling.n) % classes
    if int(sampling.labels) >= classes:
        raise UserError(f"--labels {sampling.labels}: this network has the classes 0 … {classes - 1}")
    return torch.full((sampling.n,), int(sampling.labels))


def variants_of(
    path: Path,
    checkpoint: Checkpoint,
    digest: str,
    ema: str | None,
    steps: tuple[int, ...],
    sampling: Sampling,
    device: torch.device,
) -> list[Variant]:
    """A Variant for each EMA × step count of a checkpoint, named like "step00002000-ema0.999-nfe1-n5000".

    `ema`: a decay, "weights" (or "none"), "all" (every EMA kept), or None for the recipe's. `digest` is the
    checkpoint's sha256. Raises UserError for an EMA that is not there.
    """
    names = list(checkpoint.ema) if ema == "all" else [WEIGHTS if ema == "none" else ema]
    out = []
    for name in names:
        model = model_of(path, checkpoint, name, device)
        meta = checkpoint.meta
        subject = {"checkpoint": str(path), "checkpoint_sha256": digest, "step": meta["step"], "images": meta["images"]}
        for count in steps:
            how = {"nfe": count, "time_grid": list(time_grid(count)), "ema": model.ema, "seed": sampling.seed}
            label = f"step{meta['step']:08d}-ema{model.ema}-nfe{count}-n{sampling.n}"
            source = GeneratedSource(model, f"{digest}:{model.ema}", count, sampling)
            out.append(Variant(label, source, how, subject))
    return out
