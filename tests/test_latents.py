"""Reading prepared latents, and everything that can be wrong with their files."""

import hashlib
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from latent_helpers import DIGITS, contents, digits, from_folder, make, save_tiny_vae
from running import write_images

from eval import latents_throughput
from eval.benchmark.latents import write_random_latents
from meanflow.data import open_latents
from meanflow.data.latents import verify
from meanflow.errors import AssetError, ConfigError


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """1,797 digits in four shards."""
    folder = tmp_path_factory.mktemp("prepared") / "latents"
    make(digits(folder), shard_images=512)
    return folder


@pytest.fixture
def made(prepared, tmp_path):
    """A copy of these latents, to be damaged, and their settings."""
    shutil.copytree(prepared, tmp_path / "latents")
    return tmp_path / "latents", digits(tmp_path / "latents")


def refused(made, *texts, error=AssetError, shape=None, check=open_latents):
    folder, config = made
    with pytest.raises(error) as caught:
        verify(folder) if check is verify else open_latents(folder, config, shape)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(folder)) and all(text in line for text in texts), line


# --- reading -----------------------------------------------------------------------------------------------------


def test_random_access_is_a_plain_lookup(prepared):
    latents = open_latents(prepared, digits(prepared))
    counts = (512, 512, 512, 261)
    raw = b"".join((prepared / f"shard-{k:05d}.bin").read_bytes()[: n * 512] for k, n in enumerate(counts))
    records = np.frombuffer(raw, dtype="<f2").reshape(1797, 2, 2, 4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.tensor([0, 511, 512, 1796, 512]), torch.randint(0, 1797, (200,), generator=generator)])
    mirror = torch.rand(205, generator=generator) < 0.5
    mean, std = latents.read(numbers, mirror)
    assert mean.dtype == std.dtype == torch.float16 and mean.shape == std.shape == (205, 4, 4, 4)
    assert mean.is_contiguous() and std.is_contiguous()
    expected = records[numbers.numpy(), mirror.long().numpy()]
    assert (mean.numpy() == expected[:, 0]).all() and (std.numpy() == expected[:, 1]).all()
    assert len(np.unique(expected[:, 0])) > 10


def test_reading_copies_and_holds_no_file_open(prepared):
    before, open_files = contents(prepared), len(os.listdir("/proc/self/fd"))
    latents, one, as_it_is = open_latents(prepared, digits(prepared)), torch.tensor([5]), torch.tensor([False])
    assert len(os.listdir("/proc/self/fd")) == open_files
    latents.read(one, as_it_is)[0].zero_()
    assert latents.read(one, as_it_is)[0].abs().sum() > 0 and contents(prepared) == before


def test_numbers_out_of_range(prepared):
    latents = open_latents(prepared, digits(prepared))
    for number in (-1, 1797):
        with pytest.raises(IndexError, match="0 … 1796"):
            latents.read(torch.tensor([0, number]), torch.tensor([False, False]))
    assert latents.read(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))[0].shape == (0, 4, 4, 4)


def test_the_content_has_one_checksum(prepared, tmp_path):
    first = open_latents(prepared, digits(prepared))
    images = write_images(tmp_path / "images", 22, size=16)
    configs = digits(tmp_path / "again"), from_folder(images, tmp_path / "other")
    for config in configs:
        make(config, shard_images=512)
    again, other = (open_latents(Path(config.latents), config) for config in configs)
    assert again.sha256 == first.sha256 != other.sha256


# --- settings that are not those of the recipe -------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, texts",
    [
        ({"source": "folder"}, ["source digits", "data.source is folder"]),
        ({"split": "test"}, ["split train", "data.split is test", "set data.split=train"]),
        ({"image_size": 16}, ["image_size 8", "data.image_size is 16"]),
        ({"vae": "stabilityai/sd-vae-ft-mse"}, ["vae space-to-depth", "data.vae is stabilityai/sd-vae-ft-mse"]),
    ],
)
def test_latents_of_other_settings(prepared, change, texts):
    refused((prepared, digits(prepared, **change)), *texts, error=ConfigError)
    others = digits(prepared, flip=False, decode_precision="bf16", decode_batch=1)  # that do not matter to latents
    assert len(open_latents(prepared, others)) == 1797


def test_another_shape_than_the_networks(prepared):
    made = prepared, digits(prepared)
    assert open_latents(*made, shape=(4, 4, 4)).shape == (4, 4, 4)
    texts = "its latents are 4x4x4, but the model is set to 4x32x32", "set model.channels=4 model.image_size=4"
    refused(made, *texts, shape=(4, 32, 32), error=ConfigError)


def test_a_vae_is_recognised_by_its_weights(tmp_path):
    pytest.importorskip("diffusers")
    vae, copy, other = (save_tiny_vae(tmp_path / name, seed) for name, seed in (("a", 0), ("b", 0), ("c", 1)))
    config = from_folder(write_images(tmp_path / "images", 4, size=16), tmp_path / "latents", vae=str(vae))
    make(config)
    folder = tmp_path / "latents"
    assert len(open_latents(folder, replace(config, vae=str(copy)))) == 4
    refused((folder, replace(config, vae=str(other))), f"vae {vae}", f"{other} (of other weights)", error=ConfigError)
    refused((folder, replace(config, vae="some/name")), "data.vae is some/name", error=ConfigError)
    save_tiny_vae(vae, 1)  # the same name, other weights
    refused((folder, config), "of other weights", error=ConfigError)


# --- the manifest and the labels ---------------------------------------------------------------------------------


def edit(made, **changes):
    path = made[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_manifest(made, tmp_path):
    for folder in (tmp_path / "nowhere", tmp_path / ("long" * 80)):
        refused((folder, made[1]), "has no latents", "set data.images")
    (made[0] / "manifest.json").unlink()
    refused(made, "are unfinished: the command that began them continues them")
    (made[0] / "plan.json").unlink()
    refused(made, "has no latents")


TAMPERED = {
    "count": [1796, "many"],
    "shards": [None, [], [{"count": 1797}], [{"file": "../shard-00000.bin", "count": 1797, "bytes": 1, "sha256": ""}]],
    "shape": [None, [4, 4], ["4", "4", "4"]],
    "codec": [None, {}],
    **{"dtype": ["float32"], "files": ["1797"], "shard_images": [0], "classes": [10], "skipped": [[1]]},
    "labels_sha256": [None],
}


@pytest.mark.parametrize("name, value", [(name, value) for name, values in TAMPERED.items() for value in values])
def test_a_manifest_that_was_tampered_with(made, name, value):
    edit(made, **{name: value})
    refused(made, "damaged")


def test_a_manifest_of_another_version_or_scale(made):
    edit(made, scale=0.18125)  # a seal would tell too, but less
    refused(made, "scale 0.18125", "are of 1.0", error=ConfigError)
    edit(made, format=7)
    refused(made, "manifest.json: has latents of format 7, this version reads 1", error=ConfigError)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"format": 1}', "\0" * 99, "[" * 20_000])
def test_a_damaged_manifest(made, text):
    (made[0] / "manifest.json").write_text(text)
    refused(made, "manifest.json: is damaged")


def test_labels(made):
    path = made[0] / "labels.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[:-4])
    refused(made, "labels.bin: is damaged or foreign")
    path.unlink()
    refused(made, "labels.bin: cannot be read")
    for label in (10, -1):
        raw = np.frombuffer(whole, dtype="<i4").copy()
        raw[3] = label
        path.write_bytes(raw.tobytes())
        edit(made, labels_sha256=hashlib.sha256(raw.tobytes()).hexdigest())
        refused(made, "labels beyond its 10 classes")


# --- shards ------------------------------------------------------------------------------------------------------


def test_a_truncated_missing_or_longer_shard(made):
    shard = made[0] / "shard-00001.bin"
    whole = shard.read_bytes()
    for damaged, text in (
        (whole[:-1], "is truncated (262,"),
        (b"", "is truncated (0 of"),
        (whole + b"x", "is longer than it was written"),
    ):
        shard.write_bytes(damaged)
        refused(made, f"shard-00001.bin: {text}")
    shard.unlink()
    refused(made, "shard-00001.bin: is missing")
    shard.mkdir()
    refused(made, "shard-00001.bin: cannot be read")


def test_a_foreign_shard(made, tmp_path):
    first, second = made[0] / "shard-00000.bin", made[0] / "shard-00001.bin"
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())  # the right preparation and size, another place
    refused(made, "shard-00000.bin: is foreign")
    images = write_images(tmp_path / "images", 512, classes=1, size=8)
    make(from_folder(images, tmp_path / "other", image_size=8), shard_images=512)
    foreign = (tmp_path / "other" / "shard-00000.bin").read_bytes()
    first.write_bytes(foreign[-len(whole) :])  # of the right size
    refused(made, "shard-00000.bin: is foreign")
    first.write_bytes(whole)
    (made[0] / "shard-00004.bin").write_bytes(whole)
    refused(made, "shard-00004.bin: is foreign: manifest.json does not list it")


def test_verify_finds_a_flipped_bit(made):
    assert len(verify(made[0])) == 1797
    for name in ("shard-00002.bin", "shard-00003.bin"):
        data = bytearray((made[0] / name).read_bytes())
        data[1000] ^= 1
        (made[0] / name).write_bytes(data)
    assert len(open_latents(*made)) == 1797  # opening does not read everything
    refused(made, "shard-00002.bin and 1 more: damaged (wrong checksum)", check=verify)


# --- the settings themselves, and the benchmark ------------------------------------------------------------------


@pytest.mark.parametrize(
    "field, value",
    [
        *(("source", "cifar10"), ("split", "val"), ("decode_precision", "fp16")),
        *(("images", ""), ("latents", ""), ("vae", ""), ("image_size", 0), ("decode_batch", 0)),
        ("images", "somewhere"),  # with digits
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(DIGITS, **{field: value})


def test_the_benchmark(capsys, prepared):
    assert latents_throughput.main(["--n", "40", "--batch", "8", "--rounds", "3"]) == 0
    assert "40 latents of 4x32x32" in (out := capsys.readouterr().out) and "median of 3 rounds" in out
    assert latents_throughput.main([str(prepared), "--rounds", "1"]) == 0
    assert "1,797 latents of 4x4x4" in capsys.readouterr().out


def test_the_benchmark_without_room(tmp_path):
    with pytest.raises(AssetError, match="set a smaller --n"):
        write_random_latents(tmp_path, 10**9)
