"""From a run or checkpoint to a network that samples: sample k depends on (seed, k) alone."""

import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meanflow.data import LatentsConfig
from meanflow.data.codec import Codec, open_codec
from meanflow.errors import NumericsError, UserError
from meanflow.guidance import GuidanceInput
from meanflow.logs import log
from meanflow.random import derive_seed
from meanflow.sampling import sample
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.config import RunConfig, config_from_tree, load_config
from meanflow.training.official import read_official
from meanflow.training.run_folder import RunFolder, find_checkpoint
from meanflow.training.state import build_network, copy_strictly


@dataclass(frozen=True)
class Model:
    """A network ready to sample, and where it came from. `ema` is a decay, or "weights"."""

    network: nn.Module
    config: RunConfig
    path: Path
    ema: str
    meta: dict[str, Any]
    codec: Codec | None  # what decodes latents; None where the network makes images itself

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def sample(
        self,
        n: int,
        steps: int = 1,
        seed: int = 0,
        classes: int | list[int] | Tensor | None = None,
        grid: tuple[float, ...] | None = None,
        batch: int = 256,
        guidance: float | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Tensor:
        """n samples as float32 images (n, C, H, W), about [−1, 1], on the CPU.

        steps: network evaluations a sample; grid: the times themselves, from 1 to 0, in their place. classes: one for
        all, or one for each; by default each class in turn. batch: samples at once, which changes nothing but memory.
        guidance, interval: where they are an input of the network, see `guided`. Raises UserError for classes that the
        network does not know and for guidance that it does not take, ValueError for steps or a grid that is none.
        """
        chosen_guidance = self.guided(guidance, interval)
        labels = self.class_labels(n, classes)
        parts = []
        for start in range(0, n, batch):
            stop = min(start + batch, n)
            chosen = None if labels is None else labels[start:stop]
            parts.append(generate(self, start, stop, steps, seed, chosen, grid, chosen_guidance).cpu())
        return torch.cat(parts) if parts else torch.empty(0, *self.config.image_shape)

    def guided(
        self, guidance: float | None = None, interval: tuple[float, float] | None = None
    ) -> GuidanceInput | None:
        """Guidance of samples: the scale ω and the interval of t in which it holds, each by default the recipe's.

        None where it is no input of the network. Raises UserError if it is given all the same, and for a scale below 1.
        Above the scales of training it is a matter of extrapolation, which the published settings make use of: a
        warning says so.
        """
        trained, default = self.config.objective.omega_range, self.config.sample
        if trained is None:
            if guidance is not None or interval is not None:
                raise UserError(
                    f"{self.path}: guidance is no input of this network: it was fixed in training, or there is none"
                )
            return None
        if guidance is not None and guidance > trained[1]:
            log.warning(f"guidance {guidance:g} is above {trained[1]:g}, the largest scale in training")
        omega = default.guidance if guidance is None else guidance
        try:
            return GuidanceInput(1.0 if omega is None else omega, interval or default.interval or (0.0, 1.0))
        except ValueError as error:
            raise UserError(f"{self.path}: {error}") from None

    def class_labels(self, n: int, classes: int | list[int] | Tensor | None = None) -> Tensor | None:
        """(n,) int64, None if unconditional. Raises UserError for classes that are not there, or too many or few."""
        known = self.config.model.classes
        if not known:
            if classes is not None:
                raise UserError(f"{self.path}: is unconditional, it knows no classes")
            return None
        if classes is None:
            return torch.arange(n) % known
        labels = torch.as_tensor(classes)
        labels = labels.expand(n) if labels.ndim == 0 else labels
        if labels.shape != (n,) or labels.is_floating_point():
            raise UserError(f"classes must be one whole number or {n} of them")
        if n and not (int(labels.min()) >= 0 and int(labels.max()) < known):
            wrong = next(label for label in labels.tolist() if not 0 <= label < known)
            raise UserError(f"{self.path}: classes must be in 0 … {known - 1}, not {wrong}")
        return labels.long()


def load(what: str | Path, ema: float | str | None = None, device: str | torch.device | None = None) -> Model:
    """The network of a run, in evaluation mode.

    what: a run folder, a checkpoint file (ours, or an official one), a shared folder, or where no such path is here the
    name of a shared model on the Hugging Face hub, owner/name. ema: one of the decays kept, "weights", or None for the
    recipe's. device: by default CUDA where there is one. Raises AssetError if there is no intact checkpoint, UserError
    for an average that it does not keep.
    """
    path, checkpoint = open_checkpoint(Path(os.path.expanduser(what)))
    return model_of(path, checkpoint, None if ema is None else str(ema), device_of(device))


def device_of(device: str | torch.device | None) -> torch.device:
    """By default CUDA where there is one. Raises UserError for CUDA where there is none."""
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: PyTorch sees no GPU here")
    return device


def open_checkpoint(what: Path) -> tuple[Path, Checkpoint]:
    """The checkpoint `what` (a file of ours, an official file or folder), or the newest intact one of the run `what`.

    `what` may also be a shared folder or the name of a shared model on the hub: its weights' file, in a checkpoint's
    form. Raises AssetError if there is none or it is damaged.
    """
    run = RunFolder(what)
    official = None if run.config_file.exists() or run.checkpoints.exists() else read_official(what)
    if official is not None:
        return what, official
    path, checkpoint, complaints = find_checkpoint(what)
    for complaint in complaints:
        log.warning(f"{complaint}; using {path.name}")
    return path, checkpoint


def config_of(path: Path, checkpoint: Checkpoint) -> RunConfig:
    """The settings of the run that the checkpoint at `path` belongs to: those in its folder now, if it lies in one.

    They may differ from those stored in the checkpoint in how the run is sampled and scored, and where its data are.
    """
    run = RunFolder(path.absolute().parent.parent)
    if path.absolute().parent == run.checkpoints and run.config_file.is_file():
        return load_config(run.config_file)
    return config_from_tree(checkpoint.meta["config"], str(path))


def model_of(path: Path, checkpoint: Checkpoint, ema: str | None, device: torch.device) -> Model:
    """One network of an opened checkpoint; see `load`."""
    config = config_of(path, checkpoint)
    ema, tensors = chosen_weights(path, checkpoint, config, ema)
    network = build_network(config, device)
    copy_strictly(dict(network.named_parameters()), tensors, str(path))
    if "v" in config.model.branches:
        network.drop_v_head()  # samples need u alone
    return Model(network.eval(), config, path, ema, checkpoint.meta, codec_of(config, device))


def chosen_weights(
    path: Path, checkpoint: Checkpoint, config: RunConfig, ema: str | None
) -> tuple[str, dict[str, Tensor]]:
    """The average `ema` of a checkpoint, by default the recipe's, or its "weights"; and their tensors by name.

    Raises UserError for an average that it does not keep.
    """
    ema = checkpoint.meta.get("ema", repr(config.ema.eval)) if ema is None else ema  # a shared one says which
    if ema not in checkpoint.kept:
        *others, last = checkpoint.kept
        raise UserError(
            f"{path}: has no EMA {ema}; it keeps {' and '.join([', '.join(others)] * bool(others) + [last])}"
        )
    return ema, checkpoint.kept[ema]


def codec_of(config: RunConfig, device: torch.device) -> Codec | None:
    """What decodes the run's samples. Raises AssetError, saying how to get it, if the VAE is not here."""
    data = config.data
    if not isinstance(data, LatentsConfig):
        return None
    return _codec(data.vae, device, data.decode_precision, data.decode_batch)


_codec = lru_cache(maxsize=1)(open_codec)  # shared by the networks of one checkpoint


def noise(seed: int, start: int, stop: int, shape: tuple[int, ...], step: int = 0) -> Tensor:
    """z_1 of samples start … stop − 1, (stop − start, *shape), each from its own generator on the CPU.

    step: 0, or the number of the sampling step after which new noise is added.
    """
    base = derive_seed(
        seed, "sample", *[step] * (step > 0)
    )  # consecutive seeds, since PyTorch keeps 32 bits and hashes would collide
    seeds = [(base + k) % 2**32 for k in range(start, stop)]
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds])


def generate(
    model: Model,
    start: int,
    stop: int,
    steps: int,
    seed: int,
    labels: Tensor | None = None,
    grid: tuple[float, ...] | None = None,
    guidance: GuidanceInput | None = None,
) -> Tensor:
    """Samples start … stop − 1 as float32 images (B, C, H, W), about [−1, 1], on the model's device.

    labels (B,) int64: the classes asked for, None for unconditional. guidance: where it is an input of the network;
    None: the recipe's. Raises NumericsError if a sample is not finite.
    """

    def draw(step: int) -> Tensor:
        z = noise(seed, start, stop, model.config.z_shape, step)
        return z.to(model.device).contiguous(memory_format=torch.channels_last)

    cond = {} if labels is None else {"class_labels": labels.to(model.device)}
    guidance = model.guided() if guidance is None else guidance
    if guidance is not None:
        cond |= guidance.inputs(stop - start, model.device)
    sampler = model.config.objective.sampler
    images = sample(model.network, draw(0), steps, grid, sampler=sampler, noise=draw, **cond)
    if model.codec is not None:
        images = model.codec.decode(images)
    if not torch.isfinite(images).all():
        raise NumericsError(f"{model.path}: EMA {model.ema} gives samples that are not finite; is the run diverged?")
    return images


def to_uint8(images: Tensor, rule: str) -> Tensor:
    """[−1, 1] → 0 … 255: "round" truncates 127.5·x + 128, "floor" takes ⌊255·(x + 1)/2⌋ (see sample.uint8)."""
    scaled = images * 127.5 + 128 if rule == "round" else (images + 1) * 127.5
    return scaled.clamp(0, 255).to(torch.uint8)
