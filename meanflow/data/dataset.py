"""Data sets as one uint8 tensor each, small enough to live on the training device."""

import http.client
import socket
import urllib.error
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from meanflow.data.config import DataConfig
from meanflow.data.images import MODES, load_images
from meanflow.errors import AssetError, ConfigError

NETWORK_TIMEOUT_S = 60


@dataclass(frozen=True, eq=False)
class Dataset:
    """N images of one size, in memory."""

    images: torch.Tensor  # (N, C, H, W) uint8
    labels: torch.Tensor | None  # (N,) int64, or None where there are no classes
    class_names: tuple[str, ...]  # by label; empty where there are no classes

    def __len__(self) -> int:
        return len(self.images)


def load_dataset(config: DataConfig, image_size: int, channels: int, progress: bool = True) -> Dataset:
    """Load the configured images into memory (on the CPU), downloading CIFAR-10 if it is not there.

    With several processes, let one load first: the download is not guarded against another one beside it.

    Args:
        config: what to load; `config.path` wins over `config.source`.
        image_size: height and width that the network expects.
        channels: 1 (grey) or 3 (RGB).
        progress: show a bar where reading takes long.

    Raises:
        ConfigError: image_size, channels or split do not fit the source.
        AssetError: missing, damaged or unsuitable files, no network, no disk space.
    """
    if channels not in MODES:
        raise ConfigError(f"images have 1 (grey) or 3 (RGB) channels, not {channels}")
    if config.path is not None:
        return Dataset(*load_images(config.path, config.split, image_size, channels, progress))
    if config.source == "digits":
        _check_shape("digits", 8, 1, image_size, channels)
        return digits(config.split)
    _check_shape("cifar10", 32, 3, image_size, channels)
    return _cifar10(Path(config.root).expanduser(), config.split)


def _check_shape(source: str, size: int, channels: int, wanted_size: int, wanted_channels: int):
    if (size, channels) != (wanted_size, wanted_channels):
        raise ConfigError(
            f"data.source {source} is {size}x{size} with {channels} channel(s), but the model is set to "
            f"{wanted_size}x{wanted_size} with {wanted_channels}: change the model's image size and channels"
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
    from torchvision.datasets import CIFAR10  # here, as above
    from torchvision.datasets.utils import check_integrity

    archive = root / CIFAR10.filename
    partial = not archive.exists()  # if this call downloads it, then this call clears it away on failure
    if not partial and not check_integrity(str(archive), CIFAR10.tgz_md5):
        raise AssetError(f"{archive} is damaged or incomplete (wrong checksum): delete it and run again")
    try:
        with _download_errors_named(archive, CIFAR10.url):
            data = CIFAR10(str(root), train=split == "train", download=True)
    except BaseException:  # Ctrl-C too: half an archive would stop the next run
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
