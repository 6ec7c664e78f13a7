"""What is evaluated: image files, or samples of a network under each of several EMAs and time grids."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.scoring.files import read_npz, sha256_images
from eval.scoring.options import guidance_name, steps_name
from meanflow.data import LatentsConfig
from meanflow.data.archives import open_source
from meanflow.data.images import MODES, arrange, load_images
from meanflow.errors import AssetError, UserError
from meanflow.guidance import GuidanceInput
from meanflow.random import generator
from meanflow.sampling import time_grid
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.costs import forward_multiply_adds
from meanflow.training.model import Model, generate, model_of, to_uint8

BALANCED, RANDOM = "balanced", "random"
DECODER_FLOPS = 1.24e12 / 256**2  # of Stable Diffusion's VAE, for each pixel of an image


class Source(Protocol):
    """`n` images of `shape` (C, H, W). Image k is a function of k alone: not of the batch, the process or the call.

    `images(start, stop)` gives uint8 (stop − start, C, H, W) and raises NumericsError where a sample is not finite.
    `describe()` is JSON: all that the images depend on, so that an interrupted evaluation continues only its own.
    `flops` is about what one image costs.
    """

    n: int
    shape: tuple[int, int, int]
    flops: float

    def images(self, start: int, stop: int) -> Tensor: ...

    def describe(self) -> dict: ...


@dataclass(frozen=True)
class EvalTarget:
    """One thing to score: `source` under a `name` that files can have.

    `how` (NFE, time grid, EMA, …) is part of the protocol. `about` says what was scored without changing the numbers
    (run folder, step, images seen).
    """

    name: str
    source: Source
    how: dict
    about: dict


# --- images that exist -------------------------------------------------------------------------------------------


class ImagesSource:
    """Images in memory: uint8 (N, C, H, W). Raises UserError for other types and for no images."""

    flops = 0.0

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
    if path.suffix == ".npz":
        file = read_npz(path)
        if "arr_0" not in file:
            raise UserError(f"{path} holds {', '.join(file) or 'nothing'} but no images (arr_0)")
        return images_from_array(file["arr_0"], str(path))
    try:
        size, channels = _first_image(path)
        images, _, _ = load_images(str(path), "train", size, channels, progress=True)
    except UserError as error:  # they speak of a recipe's setting, and this is none
        raise type(error)(str(error).replace(f"data.path {path}", str(path))) from None
    return ImagesSource(images, str(path))


def _first_image(path: Path) -> tuple[int, int]:
    """(size, channels) of the first image, which all the others must have too."""
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
    """Images of a numpy array (N, H, W, C) or grey (N, H, W). Raises UserError for anything else."""
    if array.ndim == 3:
        array = array[..., None]
    if array.ndim != 4:
        raise UserError(f"{origin}: an array of shape {array.shape} is not images: save (N, H, W, 3)")
    return ImagesSource(torch.from_numpy(array).permute(0, 3, 1, 2).contiguous(), origin)


# --- samples of a network ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn: `labels` is "random", "balanced" or a class; `quantise` is "round" or "floor"."""

    n: int
    seed: int
    labels: str
    quantise: str


class GeneratedSource:
    """Samples of a network: sample k is a function of (seed, k, times, weights), not of the batch or process.

    weights: what identifies them, for `describe`. times: the time grid, descending from 1 to 0. guidance: where it is
    an input of the network; None: the recipe's.
    """

    def __init__(
        self,
        model: Model,
        weights: str,
        times: tuple[float, ...],
        sampling: Sampling,
        guidance: GuidanceInput | None = None,
    ):
        self.n, self.shape = sampling.n, model.config.image_shape
        self.flops = sample_flops(model.config, len(times) - 1)
        self._model, self._weights, self._times, self._sampling = model, weights, times, sampling
        self._guidance = guidance
        self._labels = draw_labels(sampling, model.config.model.classes)

    def images(self, start: int, stop: int) -> Tensor:
        labels = None if self._labels is None else self._labels[start:stop]
        how = len(self._times) - 1, self._sampling.seed, labels, self._times, self._guidance
        samples = generate(self._model, start, stop, *how)
        return to_uint8(samples, self._sampling.quantise).cpu()

    def describe(self) -> dict:
        return {
            "kind": "generated",
            "weights": self._weights,
            "seed": self._sampling.seed,
            "labels": None if self._labels is None else self._sampling.labels,
            "quantise": self._sampling.quantise,
        }


def sample_flops(config: RunConfig, steps: int) -> float:
    """Floating-point operations of a sample, about."""
    decoding = isinstance(config.data, LatentsConfig) and config.data.source != "digits"
    return 2.0 * steps * forward_multiply_adds(config) + decoding * DECODER_FLOPS * config.image_shape[1] ** 2


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


def targets_of(
    path: Path,
    checkpoint: Checkpoint,
    digest: str,
    ema: str | None,
    steps: tuple[int, ...],
    sampling: Sampling,
    device: torch.device,
    grids: tuple[tuple[float, ...], ...] = (),
    guidances: tuple[float | None, ...] = (None,),
    intervals: tuple[tuple[float, float] | None, ...] = (None,),
) -> list[EvalTarget]:
    """Samples of a checkpoint for each EMA × time grid × guidance, named like "step00002000-ema0.999-nfe1-n5000".

    ema: a decay, "weights", "all" (every EMA kept), or None for the recipe's. digest: the checkpoint's
    sha256. grids: time grids besides the even ones of `steps`. guidances, intervals: every scale in every interval;
    None: the recipe's. Raises UserError for an EMA that is not there, and guidance that the network does not take.
    """
    names = list(checkpoint.ema) if ema == "all" else [ema]
    times = {steps_name(count): time_grid(count) for count in steps} | {steps_name(0, grid): grid for grid in grids}
    out = []
    for name in names:
        model = model_of(path, checkpoint, name, device)
        meta = checkpoint.meta
        about = {"checkpoint": str(path), "checkpoint_sha256": digest, "step": meta["step"], "images": meta["images"]}
        guided = [model.guided(omega, interval) for interval in intervals for omega in guidances]
        for (label, grid), guidance in itertools.product(times.items(), dict.fromkeys(guided)):
            how = {"nfe": len(grid) - 1, "time_grid": list(grid), "ema": model.ema, "seed": sampling.seed}
            label = f"step{meta['step']:08d}-ema{model.ema}-{label}-n{sampling.n}"
            label += "" if sampling.labels == RANDOM else f"-labels-{sampling.labels}"
            if guidance is not None:
                label += guidance_name(guidance.omega, guidance.interval)
                how |= {"guidance": guidance.omega, "interval": list(guidance.interval)}
            source = GeneratedSource(model, f"{digest}:{model.ema}", grid, sampling, guidance)
            out.append(EvalTarget(label, source, how, about))
    return out
