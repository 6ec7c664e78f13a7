"""The built-in data sets, and the order in which images are seen. Folders and archives: test_images.py."""

import dataclasses
import io
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import tar_of, written
from sklearn.datasets import load_digits
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from meanflow.data import DataConfig, batch_indices, load_dataset
from meanflow.errors import AssetError, ConfigError


def config(**changes) -> DataConfig:
    return dataclasses.replace(DataConfig(source="digits"), **changes)


def cifar10(root: Path, **changes):
    return load_dataset(config(source="cifar10", root=str(root), **changes), 32, 3)


# --- settings ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        *(("source", "imagenet"), ("root", ""), ("path", ""), ("split", "val"), ("anisotropy", "edm")),
        *(("augment_p", value) for value in (-0.1, 1.2, float("nan"))),
    ],
)
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        config(**{field: value})


def test_config_defaults_and_label_width():
    # What a run folder that lacks the newer settings continues with.
    assert (DataConfig().anisotropy, DataConfig().flip_unlabelled) == ("appendix", False)
    assert config().augment_labels == config(flip_unlabelled=True).augment_labels == 0
    assert config(flip=True).augment_labels == config(augment_p=0.1).augment_labels == 6


@pytest.mark.parametrize(
    "changes, size, channels, text",
    [
        ({"split": "test"}, 8, 1, "digits only has 'train'"),
        ({}, 32, 1, "digits is 8x8"),
        ({}, 8, 3, "with 1 channel.*set model.image_size=8 model.channels=1"),
        ({"source": "cifar10"}, 8, 3, "cifar10 is 32x32"),
        ({"source": "cifar10"}, 32, 4, "not 4"),
    ],
)
def test_settings_that_do_not_fit_the_source(changes, size, channels, text):
    with pytest.raises(ConfigError, match=text):
        load_dataset(config(**changes), size, channels)


# --- built-in sources --------------------------------------------------------------------------------------------


def test_digits():
    data, bunch = load_dataset(config(), 8, 1), load_digits()
    assert data.images.shape == (1797, 1, 8, 8) and len(data) == 1797
    assert data.images.dtype == torch.uint8 and data.images.max() == 255
    assert data.images[0, 0].tolist() == [[int(v * 255 / 16 + 0.5) for v in row] for row in bunch.images[0]]
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == bunch.target.tolist()
    assert data.class_names == tuple("0123456789")


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Name or service not known")


@pytest.fixture
def small_cifar(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """An archive of 24 images that torchvision takes for the real one, in ~/root; the batches in it."""
    batches = {f"data_batch_{k}": 4 for k in range(1, 6)} | {"test_batch": 4}
    content = {"batches.meta": {"label_names": [f"class {k}" for k in range(10)]}}
    rng = np.random.default_rng(0)
    for name, count in batches.items():
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content[name] = {"data": data, "labels": rng.integers(0, 10, count).tolist()}
    files = {name: pickle.dumps(value) for name, value in content.items()}
    md5 = {name: calculate_md5(str(written(tmp_path / "part", data))) for name, data in files.items()}
    packed = tar_of({f"{CIFAR10.base_folder}/{name}": data for name, data in files.items()}, "w:gz")
    archive = written(tmp_path / "root" / CIFAR10.filename, packed)
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(str(archive)))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5[n]] for n in batches if n != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setenv("HOME", str(tmp_path))
    return archive, content


def test_cifar10(small_cifar):
    content = small_cifar[1]
    train, test = cifar10(Path("~/root")), cifar10(Path("~/root"), split="test")
    rows = np.concatenate([content[f"data_batch_{k}"]["data"] for k in range(1, 6)])
    assert train.images.shape == (20, 3, 32, 32) and train.images.dtype == torch.uint8
    assert torch.equal(train.images.reshape(20, -1), torch.from_numpy(rows))
    assert train.labels.tolist() == [x for k in range(1, 6) for x in content[f"data_batch_{k}"]["labels"]]
    assert train.class_names[3] == "class 3"
    assert len(test) == 4 and test.labels.tolist() == content["test_batch"]["labels"]


def test_cifar10_damaged_archive(small_cifar):
    archive = small_cifar[0]
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(AssetError, match=f"{CIFAR10.filename} is damaged.*delete it and run again"):
        cifar10(archive.parent)


class Response(io.BytesIO):
    """What urlopen returns, cut short or of wrong content."""

    url, length = None, 5000

    def __init__(self, error: BaseException | None):
        super().__init__(b"x" * 100)
        self.error = error

    def read(self, *size):
        data = super().read(*size)
        if not data and self.error:
            raise self.error
        return data


@pytest.mark.parametrize(
    "opened, raised, text",
    [
        (no_network, AssetError, r"Name or service not known.*put it at .*cifar-10-python.tar.gz"),
        (None, AssetError, "arrived damaged"),
        (ConnectionResetError("reset by peer"), AssetError, "cannot be downloaded"),
        (TimeoutError("timed out"), AssetError, "timed out"),
        (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
    ],
)
def test_a_download_that_fails_leaves_no_half_archive(tmp_path, monkeypatch, opened, raised, text):
    urlopen = opened if opened is no_network else lambda *args, **how: Response(opened)
    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    with pytest.raises(raised, match=text):
        cifar10(tmp_path)
    assert not list(tmp_path.iterdir())


def test_nowhere_to_store_a_download(tmp_path):
    with pytest.raises(AssetError, match="cannot be stored"):
        cifar10(written(tmp_path / "file", b"in the way"))


# --- the order ---------------------------------------------------------------------------------------------------


def test_epochs_are_different_permutations():
    first, second = batch_indices(100, 0, 0, 200).split(100)
    assert first.dtype == torch.int64 and sorted(first.tolist()) == list(range(100))
    assert sorted(second.tolist()) == list(range(100)) and not torch.equal(first, second)
    assert not torch.equal(first, batch_indices(100, 1, 0, 100))


@pytest.mark.parametrize(
    "n, start, count",
    [
        *((10, 0, 10), (10, 0, 4), (10, 7, 6), (10, 19, 1), (10, 20, 10), (7, 3, 40), (1, 5, 3)),
        *((10, 4, 0), (10, 10, 0), (50, 131, 20)),
    ],
)
def test_batches_are_ranges_of_the_stream(n, start, count):
    stream = batch_indices(n, 3, 0, start + count)
    assert torch.equal(batch_indices(n, 3, start, count), stream[start : start + count])
    batch_indices(n, 3, start, count).zero_()
    assert torch.equal(batch_indices(n, 3, start, count), stream[start : start + count])


@pytest.mark.parametrize("arguments", [(0, 0, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)])
def test_order_rejects_nonsense(arguments):
    with pytest.raises(ValueError, match="batch_indices needs"):
        batch_indices(*arguments)
