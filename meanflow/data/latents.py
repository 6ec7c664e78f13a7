"""Prepared latents: the `data` section of a latent recipe, and fast random access to what it names."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from meanflow.data.codec import SPACE_TO_DEPTH, local_weights, scale_of
from meanflow.data.dataset import SPLITS
from meanflow.data.shards import LABELS, MANIFEST, Manifest, Plan, fault, read_manifest
from meanflow.errors import AssetError, ConfigError
from meanflow.files import sha256_file, sha256_json
from meanflow.logs import progress_bar

SOURCES = ("folder", "digits")
PRECISIONS = ("fp32", "bf16")


@dataclass(frozen=True)
class LatentsConfig:
    """Which images become latents, where these are kept, and how samples become images again.

    Raises ValueError, naming the field, when one is out of range.
    """

    kind: Literal["latents"]
    latents: str  # folder that holds the latents, or will
    vae: str  # a name on the Hugging Face hub, a folder in diffusers' layout, or "space-to-depth" (no weights)
    image_size: int  # pixels a side of the images that are encoded
    source: str = "folder"  # class folders of images at `images`; or "digits": scikit-learn's 8×8
    images: str | None = None  # folder, zip or tar of class folders to prepare from; null: all is prepared
    split: str = "train"  # "train" or "test"
    flip: bool = False  # take the mirror image's latent on a fair coin; the official release does not
    decode_precision: str = "fp32"  # "fp32" or "bf16", of the VAE's decoder at sampling
    decode_batch: int = 32  # images decoded at once

    def __post_init__(self):
        for name, choices in (("source", SOURCES), ("split", SPLITS), ("decode_precision", PRECISIONS)):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.images is not None and not self.images:
            raise ValueError("images must name a folder, zip or tar of class folders, or be null")
        if self.source == "digits" and self.images is not None:
            raise ValueError("images must be null with source digits")
        for name in ("latents", "vae"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("image_size", "decode_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    @property
    def image_channels(self) -> int:
        """Of the images: 1 (grey) or 3 (RGB)."""
        return 1 if self.source == "digits" else 3


class Latents:
    """N memory-mapped latents; a process reads from the page cache, which all processes of a machine share.

    shape: (C, h, w). labels: int64 (N,), in 0 … len(class_names) − 1. scale: what mean + std·noise is multiplied by.
    codec: name and sha256 of what encoded them. sha256: of all content.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        """Raises AssetError for labels that are missing or do not belong to the manifest."""
        plan = manifest.plan
        self.shape, self.scale, self.codec = plan.shape, plan.scale, dict(plan.codec)
        self.class_names, self.image_size = plan.classes, plan.image_size
        self.labels = _read_labels(folder / LABELS, manifest)
        contents = [[shard.sha256 for shard in manifest.shards], manifest.labels_sha256]
        self.sha256 = sha256_json([plan.identity(), contents])
        counts = [shard.count for shard in manifest.shards]
        self._starts = np.cumsum([0, *counts[:-1]])
        self._shards = [_map(folder / shard.file, shard.count, plan.shape) for shard in manifest.shards]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, indices: Tensor, mirror: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the latents of some images, unscaled: float16 (n, C, h, w), on the CPU.

        indices (n,) int64, 0 … N − 1, and mirror (n,) bool (take the mirror image's latent), both on the CPU. Raises
        IndexError for an index out of range.
        """
        numbers = indices.numpy()
        if len(numbers) and not 0 <= numbers.min() <= numbers.max() < len(self):
            raise IndexError(f"latents are numbered 0 … {len(self) - 1}")
        shards = np.searchsorted(self._starts, numbers, side="right") - 1  # of empty shards, the one behind
        rows = numbers - self._starts[shards]
        mean, std = (np.empty((len(numbers), *self.shape), dtype=np.float16) for _ in range(2))
        places = zip(shards.tolist(), rows.tolist(), mirror.long().tolist(), strict=True)
        for k, (shard, row, side) in enumerate(places):
            mean[k], std[k] = self._shards[shard][row, side]
        return torch.from_numpy(mean), torch.from_numpy(std)


def open_latents(folder: Path, config: LatentsConfig, shape: tuple[int, int, int] | None = None) -> Latents:
    """Open prepared latents. Sizes and the manifest are checked; `verify` checks contents.

    shape: (C, h, w) that the network expects; None: any. Raises AssetError for a manifest or shard that is missing,
    damaged or foreign, and ConfigError for latents made with other settings than `config` or of another version.
    """
    folder = Path(os.path.expanduser(folder))
    manifest = read_manifest(folder)
    refuse_other(manifest.plan, config, folder)
    if shape is not None and tuple(shape) != manifest.plan.shape:
        raise ConfigError(
            f"{folder}: its latents are {_by(manifest.plan.shape)}, but the model is set to {_by(shape)}: set "
            f"model.channels={manifest.plan.shape[0]} model.image_size={manifest.plan.shape[1]}"
        )
    refuse_faults(folder, manifest)
    return Latents(folder, manifest)


def refuse_other(plan: Plan, config: LatentsConfig, folder: Path) -> None:
    """Raises ConfigError, naming what differs, if latents were made with other settings than `config`."""
    pairs = {
        "source": (plan.source, config.source),
        "split": (plan.split, config.split),
        "image_size": (plan.image_size, config.image_size),
        "vae": (plan.codec["name"], _same_vae(plan, config.vae)),
    }
    for name, (made, asked) in pairs.items():
        if made != asked:
            raise ConfigError(
                f"{folder}: its latents were made with {name} {made}, but data.{name} is {asked}: set "
                f"data.{name}={made}, or prepare others in another data.latents"
            )
    if plan.scale != scale_of(config.vae):
        raise ConfigError(
            f"{folder}: its latents are of the scale {plan.scale}, but those of data.vae {config.vae} are of "
            f"{scale_of(config.vae)}: prepare them again in another data.latents"
        )


def _same_vae(plan: Plan, vae: str) -> str | None:
    """The plan's own name for its VAE if `vae` has the same weights (a local folder's are compared), else `vae`."""
    weights = None if vae == SPACE_TO_DEPTH else local_weights(vae)
    if weights is None or plan.codec["sha256"] is None:
        return vae
    if sha256_file(weights) == plan.codec["sha256"]:
        return plan.codec["name"]
    return f"{vae} (of other weights)"


def find_fault(folder: Path, manifest: Manifest) -> str | None:
    """A line about the first shard that is truncated, missing or foreign by its size and seal; None if all are fine."""
    for index, shard in enumerate(manifest.shards):
        if problem := fault(folder / shard.file, shard.count, shard.bytes, manifest.plan, index):
            return f"{folder / shard.file}: {problem}; preparing again, with data.images set, makes this shard again"
    return None


def refuse_faults(folder: Path, manifest: Manifest) -> None:
    """Raises AssetError naming a shard that is truncated, missing or foreign."""
    if line := find_fault(folder, manifest):
        raise AssetError(line)
    listed = {shard.file for shard in manifest.shards}
    if others := sorted(path for path in folder.glob("shard-*.bin") if path.name not in listed):
        raise AssetError(f"{others[0]}: is foreign: {MANIFEST} does not list it; move it away")


def verify(folder: Path) -> Latents:
    """Verify every checksum of prepared latents, made with any settings. Reads all of them.

    Raises AssetError naming what is damaged.
    """
    manifest = read_manifest(folder)
    refuse_faults(folder, manifest)
    latents = Latents(folder, manifest)
    shards = progress_bar(manifest.shards, desc="verifying", unit="shard")
    bad = [shard.file for shard in shards if sha256_file(folder / shard.file) != shard.sha256]
    if bad:
        more = f" and {len(bad) - 1} more" if len(bad) > 1 else ""
        raise AssetError(f"{folder / bad[0]}{more}: damaged (wrong checksum): delete and prepare again")
    return latents


def _read_labels(path: Path, manifest: Manifest) -> Tensor:
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise AssetError(f"{path}: cannot be read ({error.strerror or error}): prepare again") from error
    if hashlib.sha256(raw).hexdigest() != manifest.labels_sha256 or len(raw) != 4 * manifest.count:
        raise AssetError(f"{path}: is damaged or foreign: delete {MANIFEST} and prepare again, which keeps the shards")
    labels = torch.from_numpy(np.frombuffer(raw, dtype="<i4").astype(np.int64))
    if labels.min() < 0 or labels.max() >= len(manifest.plan.classes):
        raise AssetError(f"{path}: has labels beyond its {len(manifest.plan.classes)} classes: prepare again")
    return labels


def _map(path: Path, count: int, shape: tuple[int, ...]) -> np.ndarray:
    """A shard's records, (n, 2, 2, C, h, w). Unlike numpy's own memory map it holds no file open: there are many."""
    size = (count, 2, 2, *shape)
    if not count:  # all of its images were left out
        return np.empty(size, dtype=np.float16)
    values = torch.from_file(str(path), shared=False, size=int(np.prod(size)), dtype=torch.float16)
    return values.numpy().reshape(size)


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))
