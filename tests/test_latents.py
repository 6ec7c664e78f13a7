"""Reading prepared latents, and everything that can be wrong with their files."""

import hashlib
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from latent_helpers import DIGITS, contents, digits, from_folder, make, save_tiny_vae
from running import write_images

from eval import latents_throughput
from meanflow.data import LatentsConfig, open_latents
from meanflow.data.latents import verify
from meanflow.errors import AssetError, ConfigError


@pytest.fixture
def made(tmp_path):
    """A finished preparation of 1,797 digits in four shards, and its settings."""
    config = digits(tmp_path / "latents")
    make(config, shard_images=512)
    return tmp_path / "latents", config


def refused(made, *texts, error=AssetError, shape=None, check=open_latents):
    folder, config = made
    with pytest.raises(error) as caught:
        verify(folder) if check is verify else open_latents(folder, config, shape)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(str(folder)) and all(text in line for text in texts), line


# Reading


def test_random_access_is_a_plain_lookup(made):
    latents = open_latents(*made)
    raw = b"".join((made[0] / f"shard-{k:05d}.bin").read_bytes()[: n * 512] for k, n in enumerate((512, 512, 512, 261)))
    records = np.frombuffer(raw, dtype="<f2").reshape(1797, 2, 2, 4, 4, 4)
    generator = torch.Generator().manual_seed(0)
    numbers = torch.cat([torch.tensor([0, 511, 512, 1796, 512]), torch.randint(0, 1797, (200,), generator=generator)])
    mirror = torch.rand(205, generator=generator) < 0.5
    mean, std = latents.read(numbers, mirror)
    assert mean.dtype == std.dtype == torch.float16 and mean.shape == std.shape == (205, 4, 4, 4)
    assert mean.is_contiguous() and std.is_contiguous()
    wanted = records[numbers.numpy(), mirror.long().numpy()]
    assert (mean.numpy() == wanted[:, 0]).all() and (std.numpy() == wanted[:, 1]).all()
    assert len(np.unique(wanted[:, 0])) > 10


def test_what_is_read_is_a_copy(made):
    latents, one, as_it_is = open_latents(*made), torch.tensor([5]), torch.tensor([False])
    before = contents(made[0])
    first = latents.read(one, as_it_is)[0]
    first.zero_()
    assert latents.read(one, as_it_is)[0].abs().sum() > 0 and contents(made[0]) == before


def test_no_file_is_held_open(made):
    before = len(os.listdir("/proc/self/fd"))
    latents = open_latents(*made)
    assert len(os.listdir("/proc/self/fd")) == before and len(latents) == 1797


def test_numbers_out_of_range(made):
    latents = open_latents(*made)
    for number in (-1, 1797):
        with pytest.raises(IndexError, match="0 … 1796"):
            latents.read(torch.tensor([0, number]), torch.tensor([False, False]))
    assert latents.read(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.bool))[0].shape == (0, 4, 4, 4)


def test_the_content_has_one_checksum(made, tmp_path):
    first = open_latents(*made)
    make(digits(tmp_path / "again"), shard_images=512)
    assert open_latents(tmp_path / "again", digits(tmp_path / "again")).sha256 == first.sha256
    other = from_folder(write_images(tmp_path / "images", 22, size=16), tmp_path / "other")
    make(other)
    assert open_latents(tmp_path / "other", other).sha256 != first.sha256


# Settings that are not those of the recipe


@pytest.mark.parametrize(
    "change, texts",
    [
        ({"source": "folder"}, ["source digits", "data.source is folder"]),
        ({"split": "test"}, ["split train", "data.split is test", "set data.split=train"]),
        ({"image_size": 16}, ["image_size 8", "data.image_size is 16"]),
        ({"vae": "stabilityai/sd-vae-ft-mse"}, ["vae space-to-depth", "data.vae is stabilityai/sd-vae-ft-mse"]),
    ],
)
def test_latents_of_other_settings(made, change, texts):
    refused((made[0], replace(made[1], **change)), *texts, error=ConfigError)


def test_settings_that_do_not_matter_to_latents(made):
    for change in ({"flip": False}, {"decode_precision": "bf16"}, {"decode_batch": 1}):
        assert len(open_latents(made[0], replace(made[1], **change))) == 1797


def test_another_shape_than_the_networks(made):
    assert open_latents(*made, shape=(4, 4, 4)).shape == (4, 4, 4)
    refused(made, "its latents are 4x4x4, but the model is set to 4x32x32", shape=(4, 32, 32), error=ConfigError)


def test_the_vae_is_told_by_its_weights(tmp_path):
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


# The manifest and the labels


def edit(made, **changes):
    path = made[0] / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_no_manifest(made, tmp_path):
    refused((tmp_path / "nowhere", made[1]), "has no latents", "set data.images")
    (made[0] / "manifest.json").unlink()
    refused(made, "are unfinished: the command that began them continues them")
    (made[0] / "plan.json").unlink()
    refused(made, "has no latents")


def test_a_manifest_of_another_version(made):
    edit(made, format=7)
    refused(made, "manifest.json: has latents of format 7, this version reads 1", error=ConfigError)


def test_another_scale(made):
    edit(made, scale=0.18125)  # a seal would tell too, but the scale is the better word
    refused(made, "scale 0.18125", "are of 1.0", error=ConfigError)


@pytest.mark.parametrize(
    "changes",
    [
        {"count": 1796},
        {"count": "many"},
        {"shards": []},
        {"shards": [{"file": "../shard-00000.bin", "count": 1797, "bytes": 1, "sha256": ""}]},
        {"shards": [{"count": 1797}]},
        {"shards": None},
        {"shape": [4, 4]},
        {"shape": ["4", "4", "4"]},
        {"shape": None},
        {"dtype": "float32"},
        {"files": "1797"},
        {"shard_images": 0},
        {"codec": None},
        {"codec": {}},
        {"classes": 10},
        {"skipped": [1]},
        {"labels_sha256": None},
    ],
)
def test_a_manifest_that_was_tampered_with(made, changes):
    edit(made, **changes)
    refused(made, "damaged")


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


# Shards


def test_a_truncated_missing_or_longer_shard(made):
    shard = made[0] / "shard-00001.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    refused(made, "shard-00001.bin: is truncated (262,")
    shard.write_bytes(b"")
    refused(made, "shard-00001.bin: is truncated (0 of")
    shard.write_bytes(whole + b"x")
    refused(made, "shard-00001.bin: is longer than it was written")
    shard.unlink()
    refused(made, "shard-00001.bin: is missing")
    shard.mkdir()
    refused(made, "shard-00001.bin: cannot be read")


def test_a_foreign_shard(made, tmp_path):
    first, second = made[0] / "shard-00000.bin", made[0] / "shard-00001.bin"
    whole = first.read_bytes()
    first.write_bytes(second.read_bytes())  # the right preparation and size, another place
    refused(made, "shard-00000.bin: is foreign")
    other = write_images(tmp_path / "images", 512, classes=1, size=8)
    config = from_folder(other, tmp_path / "other", image_size=8)
    make(config, shard_images=512)
    foreign = (tmp_path / "other" / "shard-00000.bin").read_bytes()
    first.write_bytes(foreign[-len(whole) :])  # of the right size
    refused(made, "shard-00000.bin: is foreign")
    first.write_bytes(whole)
    (made[0] / "shard-00004.bin").write_bytes(whole)
    refused(made, "shard-00004.bin: is foreign: manifest.json does not list it")


def test_verify_finds_a_flipped_bit(made, capsys):
    assert len(verify(made[0])) == 1797
    for name in ("shard-00002.bin", "shard-00003.bin"):
        data = bytearray((made[0] / name).read_bytes())
        data[1000] ^= 1
        (made[0] / name).write_bytes(data)
    assert len(open_latents(*made)) == 1797  # opening does not read all
    refused(made, "shard-00002.bin and 1 more: damaged (wrong checksum)", check=verify)


# The settings themselves


@pytest.mark.parametrize(
    "field, value",
    [
        ("kind", "images"),
        ("source", "cifar10"),
        ("images", ""),
        ("images", "somewhere"),  # with digits
        ("latents", ""),
        ("split", "val"),
        ("vae", ""),
        ("image_size", 0),
        ("flip", 1),
        ("decode_precision", "fp16"),
        ("decode_batch", 0),
    ],
)
def test_settings_out_of_range(field, value):
    with pytest.raises(ValueError, match=f"^{field} must"):
        replace(DIGITS, **{field: value})


def test_there_are_no_defaults():
    with pytest.raises(TypeError):
        LatentsConfig("latents")


# How fast


def test_the_benchmark(capsys, tmp_path):
    assert latents_throughput.main(["--n", "40", "--batch", "8", "--rounds", "3"]) == 0
    assert "40 latents of 4x32x32" in (out := capsys.readouterr().out) and "median of 3 rounds" in out
    make(digits(tmp_path))
    assert latents_throughput.main([str(tmp_path), "--rounds", "1"]) == 0
    assert "1,797 latents of 4x4x4" in capsys.readouterr().out


def test_the_benchmark_without_room(tmp_path):
    with pytest.raises(AssetError, match="give a smaller --n"):
        latents_throughput.write_random_latents(tmp_path, 10**9)
