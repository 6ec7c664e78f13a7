"""What to train on: a pixel recipe's `data` section, its images in memory, and the order in which they are seen."""

import http.client
import os
import socket
import time
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch

from meanflow.data.augment import ANISOTROPIES, AUGMENT_LABELS
from meanflow.data.cache import Cache, Decoded, open_cache, sha256_pixels
from meanflow.data.images import MODES, RESIZES, load_images
from meanflow.errors import AssetError, ConfigError
from meanflow.random import generator

SOURCES = ("cifar10", "digits")
SPLITS = ("train", "test")
NETWORK_TIMEOUT_S = 60
AUTO = "auto"
SLOW_S = 1.0  # of computing: auto keeps images whose decoding takes longer


@dataclass(frozen=True)
class DataConfig:
    """Where the images come from and how they are augmented.

    Raises ValueError, naming the field, when one is out of range.
    """

    kind: Literal["images"] = "images"
    source: str = "cifar10"  # cifar10, or digits: scikit-learn's 8×8 handwritten digits
    root: str = "data"  # folder where downloads live
    path: str | None = None  # your own images instead of `source`: a folder, zip, tar or parquet files (docs/data.md)
    resize: str | None = None  # crop: take images of `path` of any size and mode, as ADM; null: only those that fit
    cache: str | None = AUTO  # folder for the decoded images of `path`; auto: cache/ in `root`, if it saves a second
    split: str = "train"  # which part of the images, train or test
    augment_p: float = 0.0  # probability of each of scaling, anisotropy and translation, 0 … 1 (EDM: 0.12)
    anisotropy: str = "appendix"  # as EDM's appendix F.2 has it, or "official": as the official release (augment.py)
    flip: bool = False  # mirror every image on a fair coin, one of the labels that the network is given
    flip_unlabelled: bool = False  # mirror every image on another fair coin first, which the network is not told

    def __post_init__(self):
        if self.source not in SOURCES:
            raise ValueError(f"source must be one of {', '.join(SOURCES)}, not {self.source!r}")
        if not self.root:
            raise ValueError("root must name the folder for downloads, not be empty")
        if self.path is not None and not self.path:
            raise ValueError("path must name a folder, zip or tar of images, or parquet, or be null")
        if self.resize not in (None, *RESIZES):
            raise ValueError(f"resize must be null or {' or '.join(RESIZES)}, not {self.resize!r}")
        if self.cache is not None and not self.cache:
            raise ValueError("cache must name a folder, or be auto or null")
        if self.split not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, not {self.split!r}")
        if not 0 <= self.augment_p <= 1:
            raise ValueError(f"augment_p must lie in 0 … 1, not {self.augment_p}")
        if self.anisotropy not in ANISOTROPIES:
            raise ValueError(f"anisotropy must be one of {', '.join(ANISOTROPIES)}, not {self.anisotropy!r}")

    @property
    def augment_labels(self) -> int:
        """Width of the label vector that tells the network how an image was augmented: 6, or 0 if never."""
        return AUGMENT_LABELS if self.augment_p > 0 or self.flip else 0


@dataclass(frozen=True, eq=False)
class Dataset:
    """N images of one size, in memory."""

    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, or None where there are no classes
    class_names: tuple[str, ...]  # by label; empty where there are no classes
    known_sha256: str | None = None

    @property
    def sha256(self) -> str:
        """Of the pixels; computed unless it is known."""
        return self.known_sha256 or sha256_pixels(self.images)

    def __len__(self) -> int:
        return len(self.images)


def load_dataset(config: DataConfig, image_size: int, channels: int, progress: bool = True) -> Dataset:
    """Load the configured images into memory (on the CPU), downloading CIFAR-10 if it is not there.

    With several processes let one load first, since two downloads at a time would clash. `config.path` takes precedence
    over `config.source`; its images are decoded once and kept, see cache.py. image_size, channels (1: grey, 3: RGB):
    what the network expects. progress: show a bar.

    Raises ConfigError where size, channels or split do not fit the source, and AssetError for missing, damaged or
    unsuitable files, no network or no disk space.
    """
    if channels not in MODES:
        raise ConfigError(f"images have 1 (grey) or 3 (RGB) channels, not {channels}")
    if config.path is not None:
        return _own_images(config, image_size, channels, progress)
    if config.source == "digits":
        _check_shape("digits", 8, 1, image_size, channels)
        return digits(config.split)
    _check_shape("cifar10", 32, 3, image_size, channels)
    return _cifar10(Path(os.path.expanduser(config.root)), config.split)


def _own_images(config: DataConfig, image_size: int, channels: int, progress: bool) -> Dataset:
    cache = cache_of(config, image_size, channels)
    if cache is not None and (found := cache.read()):
        return Dataset(*found)
    start = time.process_time()  # of all threads: a busy machine or a slow disk makes no difference
    decoded = load_images(config.path, config.split, image_size, channels, progress, config.resize)
    if cache is None or (config.cache == AUTO and time.process_time() - start < SLOW_S):
        return Dataset(*decoded)
    kept = Decoded(*decoded, sha256_pixels(decoded[0]))
    cache.write(kept)
    return Dataset(*kept)


def cache_of(config: DataConfig, image_size: int, channels: int) -> Cache | None:
    """The cache of `config.path`, which may be empty yet; None where there is to be none."""
    if config.path is None or config.cache is None:
        return None
    folder = Path(config.root) / "cache" if config.cache == AUTO else Path(config.cache)
    return open_cache(folder.expanduser(), config.path, config.split, image_size, channels, config.resize)


def _check_shape(source: str, size: int, channels: int, model_size: int, model_channels: int):
    if (size, channels) != (model_size, model_channels):
        raise ConfigError(
            f"data.source {source} is {size}x{size} with {channels} channel(s), but the model is set to "
            f"{model_size}x{model_size} with {model_channels}: set model.image_size={size} model.channels={channels}"
        )


def digits(split: str) -> Dataset:
    """1,797 handwritten digits that scikit-learn ships: 8×8, grey. Raises ConfigError for another split than train."""
    if split != "train":
        raise ConfigError(f"data.split is {split!r}, but digits only has 'train', which is all of it")
    from sklearn.datasets import load_digits  # here, since importing scikit-learn takes a second or two

    bunch = load_digits()
    images = torch.from_numpy(bunch.images).mul(255 / 16).round().to(torch.uint8)[:, None]
    return Dataset(images, torch.from_numpy(bunch.target).long(), tuple(str(d) for d in range(10)))


def _cifar10(root: Path, split: str) -> Dataset:
    from torchvision.datasets import CIFAR10  # here, for the same reason
    from torchvision.datasets.utils import check_integrity

    archive = root / CIFAR10.filename
    partial = not archive.exists()  # what this call downloads, it removes on failure
    if not partial and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise AssetError(f"{archive} is damaged or incomplete (wrong checksum): delete it and run again")
    try:
        with _download_errors_named(archive, CIFAR10.url):
            data = CIFAR10(str(root), train=split == "train", download=True)
    except BaseException:  # Ctrl-C too: half an archive would be refused by the next run
        if partial and archive.exists() and not check_integrity(str(archive), CIFAR10.tgz_md5):
            archive.unlink()
        raise
    images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Dataset(images, torch.tensor(data.targets), tuple(data.classes))


@contextmanager
def _download_errors_named(archive: Path, url: str) -> Iterator[None]:
    """Turn torchvision's failures into one line; give up on a silent network after a minute."""
    by_hand = f"download {url} elsewhere and put it at {archive}, then run again"
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(NETWORK_TIMEOUT_S)
    try:
        yield
    except (urllib.error.URLError, ConnectionError, TimeoutError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", None) or error
        raise AssetError(f"CIFAR-10 cannot be downloaded ({reason}): {by_hand}") from error
    except RuntimeError as error:  # wrong checksum, of the download or of the unpacked files
        raise AssetError(f"CIFAR-10 arrived damaged ({error}): run again, or {by_hand}") from error
    except OSError as error:
        reason = error.strerror or error
        raise AssetError(f"CIFAR-10 cannot be stored in {archive.parent}: {reason}") from error
    finally:
        socket.setdefaulttimeout(before)


# --- the order of training ---------------------------------------------------------------------------------------
# An endless stream of epoch permutations, addressed by position: position p is image p mod n of epoch p // n. A batch
# is a range of positions, so the order is a function of (n, seed) alone: it depends neither on how many processes
# share the batch, nor on where a run was resumed.


@lru_cache(maxsize=2)  # a batch that crosses an epoch's border needs two
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def batch_indices(n: int, seed: int, start: int, count: int) -> torch.Tensor:
    """Image numbers at positions start … start + count − 1 of the stream of n images, int64 (count,), on the CPU."""
    if n < 1 or start < 0 or count < 0:
        raise ValueError(f"batch_indices needs n ≥ 1, start ≥ 0, count ≥ 0, not {n}, {start}, {count}")
    end = start + count
    parts = [torch.empty(0, dtype=torch.int64)]
    for epoch in range(start // n, -(-end // n)):
        first = epoch * n
        parts.append(_permutation(n, seed, epoch)[max(start - first, 0) : min(end - first, n)])
    return torch.cat(parts)
