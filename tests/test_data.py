"""Data sets, their layouts, and the order in which images are seen. All images are made here."""

import dataclasses
import io
import pickle
import random
import tarfile
import urllib.error
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import calculate_md5

from meanflow.data import DataConfig, batch_indices, epoch_order, load_dataset
from meanflow.errors import AssetError, ConfigError

SIZE = 8


def config(**changes) -> DataConfig:
    return dataclasses.replace(DataConfig(source="digits"), **changes)


def pixels(key: int, mode: str = "RGB", size: int = SIZE) -> np.ndarray:
    shape = (size, size, 3) if mode == "RGB" else (size, size)
    return np.random.default_rng(key).integers(0, 256, shape, dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def as_folder(files: dict[str, bytes], at: Path) -> str:
    for name, data in files.items():
        (at / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (at / "images" / name).write_bytes(data)
    return str(at / "images")


def as_zip(files: dict[str, bytes], at: Path) -> str:
    with zipfile.ZipFile(at / "images.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return str(at / "images.bin")


def as_tar(files: dict[str, bytes], at: Path, mode: str = "w", prefix: str = "") -> str:
    with tarfile.open(at / "images.bin", mode) as archive:  # told by content: the suffix says nothing
        for name, data in files.items():
            info = tarfile.TarInfo(prefix + name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return str(at / "images.bin")


PACKERS: dict[str, Callable[[dict[str, bytes], Path], str]] = {
    "folder": as_folder,
    "zip": as_zip,
    "tar": as_tar,
    "tar.gz": lambda files, at: as_tar(files, at, "w:gz"),
    "tar.xz": lambda files, at: as_tar(files, at, "w:xz"),
    "tar of .": lambda files, at: as_tar(files, at, prefix="./"),
}


@pytest.fixture(params=list(PACKERS))
def pack(request, tmp_path) -> Callable[[dict[str, bytes]], str]:
    return lambda files: PACKERS[request.param](files, tmp_path)


def load(path: str, size: int = SIZE, channels: int = 3, **changes):
    return load_dataset(config(path=path, **changes), size, channels, progress=False)


def assert_images(dataset, keys, mode="RGB"):
    arrays = np.stack([pixels(key, mode) for key in keys])
    want = torch.from_numpy(arrays.reshape(len(keys), SIZE, SIZE, -1)).permute(0, 3, 1, 2)
    assert dataset.images.dtype == torch.uint8 and dataset.images.is_contiguous()
    assert torch.equal(dataset.images, want)


# The configuration


@pytest.mark.parametrize("field, value", [
    ("source", "imagenet"), ("root", ""), ("path", ""), ("split", "val"),
    ("augment_p", -0.1), ("augment_p", 1.2), ("augment_p", float("nan")), ("flip", 1), ("flip_unlabelled", 1),
    ("anisotropy", "edm"),
])  # fmt: skip
def test_config_names_the_bad_field(field, value):
    with pytest.raises(ValueError, match=f"^{field} "):
        config(**{field: value})


def test_config_defaults_and_label_width():
    # What a run folder that lacks the newer settings continues with.
    assert (DataConfig().anisotropy, DataConfig().flip_unlabelled) == ("appendix", False)
    assert config().augment_labels == config(flip_unlabelled=True).augment_labels == 0
    assert config(flip=True).augment_labels == config(augment_p=0.1).augment_labels == 6


# Built-in sources


def test_digits():
    from sklearn.datasets import load_digits

    data, bunch = load_dataset(config(), 8, 1), load_digits()
    assert data.images.shape == (1797, 1, 8, 8) and len(data) == 1797
    assert data.images.dtype == torch.uint8 and data.images.max() == 255
    assert data.images[0, 0].tolist() == [[int(v * 255 / 16 + 0.5) for v in row] for row in bunch.images[0]]
    assert data.labels.dtype == torch.int64 and data.labels.tolist() == bunch.target.tolist()
    assert data.class_names == tuple("0123456789")


@pytest.mark.parametrize("changes, size, channels, text", [
    (dict(split="test"), 8, 1, "digits only has 'train'"),
    ({}, 32, 1, "digits is 8x8"),
    ({}, 8, 3, "with 1 channel"),
    (dict(source="cifar10"), 8, 3, "cifar10 is 32x32"),
    (dict(source="cifar10"), 32, 4, "not 4"),
])  # fmt: skip
def test_settings_that_do_not_fit_the_source(changes, size, channels, text):
    with pytest.raises(ConfigError, match=text):
        load_dataset(config(**changes), size, channels)


@pytest.fixture
def small_cifar(tmp_path, monkeypatch) -> tuple[Path, dict]:
    """Where an archive of 24 images lies that torchvision takes for the real one; the batches in it."""
    batches = {f"data_batch_{k}": 4 for k in range(1, 6)} | {"test_batch": 4}
    content = {"batches.meta": {"label_names": [f"class {k}" for k in range(10)]}}
    rng = np.random.default_rng(0)
    for name, count in batches.items():
        data = rng.integers(0, 256, (count, 3072), dtype=np.uint8)
        content[name] = {"data": data, "labels": rng.integers(0, 10, count).tolist()}
    files = {name: pickle.dumps(value) for name, value in content.items()}
    md5 = {}
    for name, data in files.items():
        (tmp_path / "part").write_bytes(data)
        md5[name] = calculate_md5(str(tmp_path / "part"))
    root = tmp_path / "root"
    root.mkdir()
    archive = root / CIFAR10.filename
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(CIFAR10, "tgz_md5", calculate_md5(str(archive)))
    monkeypatch.setattr(CIFAR10, "train_list", [[n, md5[n]] for n in batches if n != "test_batch"])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5["test_batch"]]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5["batches.meta"]})
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    return root, content


def no_network(*args, **kwargs):
    raise urllib.error.URLError("Name or service not known")


def test_cifar10(small_cifar):
    root, content = small_cifar
    train = load_dataset(config(source="cifar10", root=str(root)), 32, 3)
    rows = np.concatenate([content[f"data_batch_{k}"]["data"] for k in range(1, 6)])
    assert train.images.shape == (20, 3, 32, 32) and train.images.dtype == torch.uint8
    assert torch.equal(train.images.reshape(20, -1), torch.from_numpy(rows))
    assert train.labels.tolist() == [x for k in range(1, 6) for x in content[f"data_batch_{k}"]["labels"]]
    assert train.class_names[3] == "class 3"
    test = load_dataset(config(source="cifar10", root=str(root), split="test"), 32, 3)
    assert len(test) == 4 and test.labels.tolist() == content["test_batch"]["labels"]


def test_cifar10_damaged_archive(small_cifar):
    root, _ = small_cifar
    archive = root / CIFAR10.filename
    archive.write_bytes(archive.read_bytes()[:-100])
    with pytest.raises(AssetError, match=f"{CIFAR10.filename} is damaged.*delete it and run again"):
        load_dataset(config(source="cifar10", root=str(root)), 32, 3)


def test_cifar10_without_network(tmp_path, monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", no_network)
    with pytest.raises(AssetError, match=r"Name or service not known.*put it at .*cifar-10-python.tar.gz"):
        load_dataset(config(source="cifar10", root=str(tmp_path)), 32, 3)
    assert not list(tmp_path.iterdir())


class Response(io.BytesIO):
    """What urlopen returns, cut short or of wrong content."""

    url, length = None, 5000

    def __init__(self, data: bytes, error: BaseException | None):
        super().__init__(data)
        self.error = error

    def read(self, *size):
        data = super().read(*size)
        if not data and self.error:
            raise self.error
        return data


@pytest.mark.parametrize("error, raised, text", [
    (None, AssetError, "arrived damaged"),
    (ConnectionResetError("reset by peer"), AssetError, "cannot be downloaded"),
    (TimeoutError("timed out"), AssetError, "timed out"),
    (KeyboardInterrupt("stopped"), KeyboardInterrupt, "stopped"),
])  # fmt: skip
def test_cifar10_download_that_fails_leaves_no_half_archive(tmp_path, monkeypatch, error, raised, text):
    monkeypatch.setattr("urllib.request.urlopen", lambda *a, **k: Response(b"x" * 100, error))
    with pytest.raises(raised, match=text):
        load_dataset(config(source="cifar10", root=str(tmp_path)), 32, 3)
    assert not (tmp_path / CIFAR10.filename).exists()


def test_cifar10_with_nowhere_to_store(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(AssetError, match="cannot be stored"):
        load_dataset(config(source="cifar10", root=str(tmp_path / "file")), 32, 3)


# The user's own images


def shuffled(files: dict[str, bytes]) -> dict[str, bytes]:
    names = list(files)
    random.Random(0).shuffle(names)
    return {name: files[name] for name in names}


def test_class_folders(pack):
    names = ["ant/1.png", "ant/10.png", "ant/2.PNG", "bee/deep/1.png", "bee/x.png", "cow/1.png"]
    files = {name: png(pixels(key)) for key, name in enumerate(names)}
    rest = {"README.txt": b"hello", "ant/.hidden.png": b"", ".git/a.png": b"", "bee/notes.md": b""}
    data = load(pack(shuffled(files | rest)))
    assert_images(data, range(6))  # sorted by path, whatever the order in the archive
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert data.class_names == ("ant", "bee", "cow")


def test_split_folders(pack):
    names = ["test/a/1.png", "test/b/1.png", "train/a/1.png", "train/b/1.png", "train/b/2.png"]
    path = pack({name: png(pixels(key)) for key, name in enumerate(names)})
    train, test = load(path), load(path, split="test")
    assert_images(train, [2, 3, 4])
    assert_images(test, [0, 1])
    assert train.labels.tolist() == [0, 1, 1] and test.class_names == train.class_names == ("a", "b")


def test_val_stands_in_for_test_and_flat_splits_are_no_classes(tmp_path):
    path = as_folder({"train/1.png": png(pixels(1)), "val/2.png": png(pixels(2))}, tmp_path)
    train, test = load(path), load(path, split="test")
    assert_images(train, [1])
    assert_images(test, [2])
    assert train.labels is None and train.class_names == ()


def test_missing_split(tmp_path):
    plain = as_folder({"a/1.png": png(pixels(1))}, tmp_path / "plain")
    with pytest.raises(ConfigError, match="has no test/ or val/ folder"):
        load(plain, split="test")
    only_train = as_folder({"train/a/1.png": png(pixels(1))}, tmp_path / "train")
    with pytest.raises(ConfigError, match="only has train"):
        load(only_train, split="test")
    assert len(load(only_train)) == 1


def test_flat_folder(pack):
    data = load(pack({"b.png": png(pixels(1)), "a.png": png(pixels(0))}))
    assert_images(data, [0, 1])
    assert data.labels is None and data.class_names == ()


def test_a_folder_around_everything_is_stepped_into(pack):
    names = ["pets/cat/1.png", "pets/dog/1.png"]
    data = load(pack({name: png(pixels(key)) for key, name in enumerate(names)}))
    assert data.class_names == ("cat", "dog") and data.labels.tolist() == [0, 1]


def test_one_class_is_a_class(tmp_path):
    data = load(as_folder({"cat/1.png": png(pixels(1))}, tmp_path))
    assert data.class_names == ("cat",) and data.labels.tolist() == [0]


def test_wrapped_splits(tmp_path):
    names = ["v1/pets/test/cat/1.png", "v1/pets/train/cat/1.png"]
    data = load(as_tar({name: png(pixels(key)) for key, name in enumerate(names)}, tmp_path))
    assert_images(data, [1])


def test_grey_images(pack):
    data = load(pack({"a/1.png": png(pixels(5, "L"))}), channels=1)
    assert_images(data, [5], "L")


def test_jpeg_and_other_formats(tmp_path):
    files, kinds = {}, {".jpg": "JPEG", ".jpeg": "JPEG", ".bmp": "BMP", ".webp": "WEBP", ".tif": "TIFF"}
    for suffix, kind in kinds.items():
        buffer = io.BytesIO()
        Image.fromarray(pixels(0)).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}))
        files[f"a/1{suffix}"] = buffer.getvalue()
    data = load(as_folder(files, tmp_path))
    want = np.array(Image.open(io.BytesIO(files["a/1.jpg"])))
    assert torch.equal(data.images[2], torch.from_numpy(want).permute(2, 0, 1))
    for row in (0, 3, 4):  # the lossless ones: .bmp, .tif, .webp
        assert torch.equal(data.images[row], torch.from_numpy(pixels(0)).permute(2, 0, 1))


def test_many_images_pass_the_read_ahead_window(tmp_path):
    files = {f"{k % 3}/{k:05d}.png": png(pixels(k, size=4)) for k in range(1100)}
    data = load(as_zip(shuffled(files), tmp_path), size=4)
    for row, name in enumerate(sorted(files)):
        key = int(name[2:7])
        assert torch.equal(data.images[row], torch.from_numpy(pixels(key, size=4)).permute(2, 0, 1))
        assert data.labels[row] == key % 3


def test_progress_only_where_it_is_slow(tmp_path, capsys, monkeypatch):
    path = as_folder({f"{k}.png": png(pixels(k)) for k in range(4)}, tmp_path)
    load_dataset(config(path=path), SIZE, 3, progress=True)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr("meanflow.data.images.SHOW_PROGRESS_ABOVE", 3)
    load_dataset(config(path=path), SIZE, 3, progress=True)
    assert "reading images" in capsys.readouterr().err
    load_dataset(config(path=path), SIZE, 3, progress=False)
    assert capsys.readouterr().err == ""


def test_nothing_is_extracted(tmp_path):
    path = as_tar({"a/1.png": png(pixels(0))}, tmp_path, "w:gz")
    before = sorted(tmp_path.rglob("*"))
    load(path)
    assert sorted(tmp_path.rglob("*")) == before


# The order


def test_epochs_are_different_permutations():
    first, second = epoch_order(100, 0, 0), epoch_order(100, 0, 1)
    assert first.dtype == torch.int64 and sorted(first.tolist()) == list(range(100))
    assert sorted(second.tolist()) == list(range(100)) and not torch.equal(first, second)
    assert not torch.equal(first, epoch_order(100, 1, 0))
    first.zero_()  # the caller's to change
    assert sorted(epoch_order(100, 0, 0).tolist()) == list(range(100))


@pytest.mark.parametrize("n, start, count", [
    (10, 0, 10), (10, 0, 4), (10, 7, 6), (10, 19, 1), (10, 20, 10), (7, 3, 40), (1, 5, 3), (10, 4, 0),
    (10, 10, 0),
])  # fmt: skip
def test_batches_are_ranges_of_the_stream(n, start, count):
    stream = torch.cat([epoch_order(n, 3, epoch) for epoch in range((start + count) // n + 1)])
    assert torch.equal(batch_indices(n, 3, start, count), stream[start : start + count])


def test_order_does_not_depend_on_batch_size_or_on_where_one_begins():
    whole = batch_indices(50, 1, 0, 300)
    assert torch.equal(torch.cat([batch_indices(50, 1, k, 12) for k in range(0, 300, 12)]), whole)
    assert torch.equal(batch_indices(50, 1, 131, 20), whole[131:151])
    batch_indices(50, 1, 0, 5).zero_()
    assert torch.equal(batch_indices(50, 1, 0, 5), whole[:5])


def test_order_rejects_nonsense():
    for arguments in ((0, 0, 0, 1), (5, 0, -1, 1), (5, 0, 0, -1)):
        with pytest.raises(ValueError, match="batch_indices needs"):
            batch_indices(*arguments)
