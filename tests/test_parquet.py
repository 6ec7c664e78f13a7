"""Parquet files as `data.path`: columns, classes and splits as the hub writes them, and what is refused."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import encoded, folder_of, load, pixels, png, written
from latent_helpers import from_folder, make

from eval.check_data import main as check_data
from eval.scoring.sources import read_images
from meanflow.data import open_latents, parquet
from meanflow.data.archives import open_source
from meanflow.errors import AssetError, ConfigError, UserError, run_main

needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs the package pyarrow")
NAMES = ["zebra", "ant"]  # not in the order of the alphabet


def features(**kinds) -> dict:
    return {b"huggingface": json.dumps({"info": {"features": kinds}})}


IMAGE, CLASS = {"_type": "Image"}, {"_type": "ClassLabel", "names": NAMES}


def write(path: Path, keys, labels=None, image="image", label="label", metadata=None, group=5, struct=True) -> Path:
    """Rows with the images of `keys`, in row groups of `group`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {image: [{"bytes": png(k), "path": f"{k}.png"} if struct else png(k) for k in keys]}
    if labels is not None:
        columns[label] = labels
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns).replace_schema_metadata(metadata), path, row_group_size=group)
    return path


def images(keys) -> torch.Tensor:
    return torch.from_numpy(np.stack([pixels(key) for key in keys])).permute(0, 3, 1, 2)


@needs_pyarrow
def test_a_data_set_of_the_hub(tmp_path):
    """Several files, splits by name, a ClassLabel with names, and other files beside."""
    metadata = features(img=IMAGE, label=CLASS)
    for part, keys in enumerate(([0, 1, 2], range(3, 200))):
        name = f"plain_text/train-{part:05d}-of-00002.parquet"
        write(tmp_path / name, keys, [k % 2 for k in keys], "img", metadata=metadata, group=70)
    write(tmp_path / "plain_text" / "test-00000-of-00001.parquet", [7, 5], [1, 0], "img", metadata=metadata)
    for name in ("README.md", "banner.png", ".gitattributes", ".git/x.parquet"):
        written(tmp_path / name, b"text")
    train, test = load(tmp_path), load(tmp_path, split="test")
    assert torch.equal(train.images, images(range(200))) and train.class_names == ("zebra", "ant")
    assert train.labels.tolist() == [k % 2 for k in range(200)]
    assert torch.equal(test.images, images([7, 5])) and test.labels.tolist() == [1, 0]


@needs_pyarrow
@pytest.mark.parametrize(
    "names, split, taken",
    [
        (["train-0.parquet", "validation-0.parquet", "test-0.parquet"], "test", [2]),
        (["train-0.parquet", "validation-0.parquet"], "test", [1]),
        (["default/train/0000.parquet", "default/test/0000.parquet"], "train", [0]),
        (["train/0000.parquet", "train/0001.parquet", "valid/0.parquet"], "train", [0, 1]),
        (["a.parquet", "b.parquet"], "train", [0, 1]),
        (["latest.parquet", "train.parquet"], "train", [1]),  # "test" is no word in it
    ],
)
def test_splits(tmp_path, names, split, taken):
    for key, name in enumerate(names):
        write(tmp_path / name, [key])
    data = load(tmp_path, split=split)
    assert torch.equal(data.images, images(taken)) and data.labels is None and data.class_names == ()


@needs_pyarrow
@pytest.mark.parametrize(
    "how, labels, classes",
    [
        ({"labels": [3, 10, 3]}, [0, 1, 0], ("3", "10")),
        ({"labels": ["dog", "cat", "dog"]}, [1, 0, 1], ("cat", "dog")),
        ({"labels": [0.5, 1.5, 0.5]}, None, ()),
        ({"labels": [1, 0, 1], "label": "fine_label", "metadata": features(fine_label=CLASS)}, [1, 0, 1], tuple(NAMES)),
        ({"labels": [1, 0, 1], "label": "other"}, None, ()),
        ({"labels": [-1, -1, -1], "metadata": features(label=CLASS)}, None, ()),  # as test sets have them
        ({"struct": False, "image": "jpeg"}, None, ()),
        ({"labels": [1, 0, 1], "metadata": {b"huggingface": b"{"}}, [1, 0, 1], ("0", "1")),
    ],
)
def test_columns(tmp_path, how, labels, classes):
    path = write(tmp_path / "file.bin", [0, 1, 2], **how)  # a single file, recognised by content
    data = load(path)
    assert torch.equal(data.images, images(range(3))) and data.class_names == classes
    assert data.labels is labels or data.labels.tolist() == labels


@needs_pyarrow
def test_rows_are_read_in_batches_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "BATCH", 4)
    table = parquet.Table("", write(tmp_path / "a.parquet", range(40), group=10))
    order = [*range(40), 39, 0, 25, 26, 13, 12, 29, 30, 31, *np.random.default_rng(0).integers(0, 40, 50).tolist()]
    for row in order:
        assert table.read(row) == png(row) and len(table.batch) <= 4


@needs_pyarrow
def test_it_goes_wherever_images_go(tmp_path, capfd):
    """data.resize, the cache, check_data, and references of an evaluation."""
    path = write(tmp_path / "rows" / "train.parquet", range(3), [0, 1, 0], metadata=features(label=CLASS))
    first, second = (load(path.parent, cache=str(tmp_path / "kept"), resize="crop", size=4) for _ in range(2))
    assert first.known_sha256 == second.known_sha256 and second.images.shape == (3, 3, 4, 4)
    write(path, [1], [0], metadata=features(label=CLASS))
    assert len(load(path.parent, cache=str(tmp_path / "kept"), resize="crop", size=4)) == 1
    assert read_images(path.parent).n == 1
    assert run_main(check_data, [str(path.parent)]) == 0 and "1 images in 2 classes" in capfd.readouterr().out


@needs_pyarrow
def test_latents_of_its_rows_are_those_of_the_files(tmp_path):
    keys = range(20)
    write(tmp_path / "rows" / "train.parquet", keys, [k % 2 for k in keys], metadata=features(label=CLASS))
    folder_of({f"{NAMES[k % 2]}/{k:02d}.png": png(k) for k in keys}, tmp_path / "files")
    found = {}
    for name in ("rows", "files"):
        config = from_folder(tmp_path / name, tmp_path / f"{name} latents", image_size=8)
        for rank in (1, 0):  # of two processes, which read every other shard
            make(config, rank, 2)
        latents = open_latents(Path(config.latents), config)
        values, _ = latents.read(torch.arange(20), torch.zeros(20, dtype=torch.bool))
        found[name] = {latents.class_names[k]: values[latents.labels == k] for k in (0, 1)}
    assert list(found["rows"]) == NAMES and all(torch.equal(found["rows"][n], found["files"][n]) for n in NAMES)


def rewritten(path: Path, **columns) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), path, compression="zstd")


@needs_pyarrow
@pytest.mark.parametrize(
    "damage, error, text",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-20]), AssetError, "train.parquet is damaged"),
        (lambda path: path.write_bytes(b"version https://git-lfs.github.com/spec/v1\n"), AssetError, "git lfs pull"),
        (lambda path: rewritten(path, text=["a", "b"]), AssetError, "no column of images (it has text)"),
        (lambda path: rewritten(path, a=[png()], b=[png()]), AssetError, "several columns of images (a, b)"),
        (lambda path: rewritten(path, image=[b"junk"]), AssetError, "train.parquet/row 0 is not an image"),
        (lambda path: rewritten(path, image=[png(), None]), AssetError, "row 1 has no bytes of an image"),
        (lambda path: rewritten(path, image=[png()] * 2, label=[1, None]), AssetError, "row 1 has no label"),
        (lambda path: rewritten(path, image=[png(), encoded(pixels(0, size=9))]), AssetError, "row 1 is 9x9, not 8x8"),
        (lambda path: write(path, [0], [2], metadata=features(label=CLASS)), AssetError, "beyond its 2 classes"),
        (lambda path: rewritten(path, image=[b"\0" * 2**22]), AssetError, "unpacks to more than 100 times"),
        (lambda path: path.rename(path.with_name("test.parquet")), ConfigError, "named after test only"),
        (lambda path: write(path.parent / "b" / "train.parquet", [1]), ConfigError, "several data sets (., b)"),
        (lambda path: rewritten(path, image=[png()][:0]), AssetError, "no column of images"),
    ],
)
def test_what_is_refused(tmp_path, damage, error, text):
    damage(write(tmp_path / "train.parquet", [0, 1]))
    with pytest.raises(error) as caught:
        load(tmp_path)
    line = str(caught.value)
    assert text in line and "\n" not in line and line.startswith(("data.path ", "data.split ")), line


@needs_pyarrow
def test_a_file_damaged_anywhere_is_one_line(tmp_path):
    path = write(tmp_path / "a.parquet", range(20), [k % 2 for k in range(20)])
    whole, failures = path.read_bytes(), 0
    for at in range(4, len(whole), len(whole) // 60):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            load(path)
        except UserError as caught:
            failures += 1
            assert "\n" not in str(caught)
    assert failures >= 20


def test_without_pyarrow_it_is_one_line(tmp_path, monkeypatch):
    written(tmp_path / "train.parquet", b"PAR1")
    monkeypatch.setattr(parquet.importlib.util, "find_spec", lambda name: None)
    for path in (tmp_path, tmp_path / "train.parquet"):
        with (
            pytest.raises(ConfigError, match="is parquet, which needs the package pyarrow: pip install pyarrow"),
            open_source(str(path)),
        ):
            pass


def test_images_with_a_table_beside_them_are_images(tmp_path):
    for name in ("a/1.png", "a/2.png"):
        written(tmp_path / name, png())
    written(tmp_path / "metadata.parquet", b"PAR1")
    assert len(load(tmp_path)) == 2
