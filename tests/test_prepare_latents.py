"""Images → latents: what is stored, interruptions and several processes, and images that cannot be used."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from image_helpers import folder_of, png
from latent_helpers import contents, digits, from_folder, make, save_tiny_vae
from PIL import Image
from running import until, write_images
from sklearn.datasets import load_digits

from meanflow.data import open_latents
from meanflow.data.codec import SpaceToDepth, open_codec
from meanflow.data.images import centre_crop
from meanflow.data.prepare_latents import _hold
from meanflow.errors import AssetError, ConfigError, NumericsError

CODEC = open_codec("space-to-depth", "cpu", "fp32", 1)


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), count=22, size=16)


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory) -> dict[str, bytes]:
    """The files of these images' latents, made in one go by one process."""
    folder = tmp_path_factory.mktemp("whole") / "latents"
    make(from_folder(images, folder))
    return contents(folder)


@pytest.fixture
def command(launch, tmp_path):
    """`command(images, out, …)` starts the command in a process of its own."""

    def command(images, out, *others, **how):
        out = out if out.startswith("~") else tmp_path / out
        options = ("--images", images, "--out", out, "--vae", "space-to-depth", "--size", 16, "--shard", 4)
        return launch("eval.prepare_latents", *options, *others, **how)

    return command


def refused(config, *texts, error=AssetError, **how):
    with pytest.raises(error) as caught:
        make(config, **how)
    line = str(caught.value)
    assert "\n" not in line and all(text in line for text in texts), line


def every(n: int, value: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """All n latents, of the mirror images or not, for `Latents.read`."""
    return torch.arange(n), torch.full((n,), value)


def to_pixels(mean: torch.Tensor) -> torch.Tensor:
    return CODEC.decode(mean).add(1).mul(127.5).round()


# --- what is stored ----------------------------------------------------------------------------------------------


def test_latents_are_the_vaes_own(tmp_path):
    pytest.importorskip("diffusers")
    vae = save_tiny_vae(tmp_path / "vae")
    for k, size in enumerate([(16, 16), (20, 40), (50, 33), (16, 18), (7, 9), (64, 64)]):
        path = tmp_path / "images" / f"class{k % 3}" / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(k).integers(0, 256, (*size, 3), dtype=np.uint8)).save(path)
    config = from_folder(tmp_path / "images", tmp_path / "latents", vae=str(vae))
    assert make(config) == [f"{tmp_path / 'latents'}: 6 latents of 4x8x8 in 3 classes, 0.00 GB"]

    latents = open_latents(tmp_path / "latents", config, (4, 8, 8))
    files = sorted((tmp_path / "images").rglob("*.png"))
    assert latents.labels.tolist() == [int(path.parent.name[-1]) for path in files] == [0, 0, 1, 1, 2, 2]
    assert latents.class_names == ("class0", "class1", "class2") and latents.scale == 0.18215
    crops = torch.stack([torch.from_numpy(np.array(centre_crop(Image.open(path), 16))) for path in files])
    codec = open_codec(str(vae), "cpu", "fp32", 1)
    for mirrored in (False, True):
        mean, std = codec.encode((crops.flip(2) if mirrored else crops).permute(0, 3, 1, 2))
        found = latents.read(*every(6, mirrored))
        torch.testing.assert_close(found[0].float(), mean, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(found[1].float(), std, atol=2e-3, rtol=2e-3)
        assert std.min() > 0


def test_digits(tmp_path):
    make(digits(tmp_path), shard_images=500)
    latents, bunch = open_latents(tmp_path, digits(tmp_path), (4, 4, 4)), load_digits()
    assert len(latents) == 1797 and latents.labels.tolist() == bunch.target.tolist() and len(latents.class_names) == 10
    numbers = torch.tensor([0, 499, 500, 1796])
    for mirrored in (False, True):
        mean, std = latents.read(numbers, torch.full((4,), mirrored))
        expected = torch.from_numpy(bunch.images[numbers] * (255 / 16)).float().round()
        assert torch.equal(to_pixels(mean)[:, 0], expected.flip(-1) if mirrored else expected) and (std == 0).all()


@pytest.mark.parametrize("kind", ["zip", "gztar"])
def test_an_archive_gives_the_folders_latents(images, tmp_path, kind):
    sources = images, shutil.make_archive(str(tmp_path / "archive"), kind, images)
    folder, packed = (from_folder(source, tmp_path / f"of{k}") for k, source in enumerate(sources))
    make(folder)
    make(packed)
    both = [open_latents(Path(config.latents), config) for config in (folder, packed)]
    assert sorted(both[0].labels) == sorted(both[1].labels)
    means = [latents.read(*every(22))[0] for latents in both]
    assert torch.equal(*(mean.flatten(1).sum(1).sort().values for mean in means))  # in the archive's order


# --- interruptions and several processes -------------------------------------------------------------------------


def test_killed_and_continued_is_the_same(command, tmp_path):
    many = write_images(tmp_path / "many", count=100, size=16)
    assert command(many, "whole", "--batch", 3).wait().code == 0
    folder = tmp_path / "killed"

    def shards():
        return {p.name: p.stat().st_mtime_ns for p in folder.glob("shard-*.bin") if p.with_suffix(".json").exists()}

    for number, enough in ((signal.SIGKILL, 0), (signal.SIGKILL, 3), (signal.SIGINT, 8)):
        before = shards()
        started = command(many, "killed", "--batch", 3)
        until(lambda enough=enough: (folder / "plan.json").exists() and len(shards()) >= enough)
        started.send(number)
        assert started.wait().code == (130 if number == signal.SIGINT else -number) and "Traceback" not in started.err
        after = shards()
        assert not (folder / "manifest.json").exists() and len(after) < 25
        assert before.items() <= after.items()  # what was done has not been done again
    before = shards()
    last = command(many, "killed", "--batch", 3).wait()
    assert last.code == 0 and "100 latents of 12x8x8 in 2 classes" in last.out
    assert before.items() <= shards().items()
    assert contents(folder) == contents(tmp_path / "whole")


def test_several_processes_give_the_same_as_one(images, whole, command, tmp_path):
    two = from_folder(images, tmp_path / "two")
    assert "the process that finishes last writes the manifest" in make(two, 1, 2)[0]
    assert not (tmp_path / "two" / "manifest.json").exists()
    for name in ("shard-00000.bin.0.tmp", "shard-00003.bin.3.tmp"):  # left by a process that was killed
        (tmp_path / "two" / name).write_bytes(b"half")
    assert "22 latents" in make(two, 0, 1)[0]  # the rest, by another number of processes
    assert contents(tmp_path / "two") == whole
    ranks = [command(images, "three", environment={"RANK": str(k), "WORLD_SIZE": "3"}) for k in range(3)]
    assert [rank.wait().code for rank in ranks] == [0, 0, 0], [rank.err for rank in ranks]
    assert contents(tmp_path / "three") == whole


def test_a_disk_that_fills_keeps_what_was_done(images, whole, tmp_path, monkeypatch):
    config, synced, calls = from_folder(images, tmp_path / "out"), os.fsync, []

    def fsync(file):
        calls.append(file)
        if len(calls) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        synced(file)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        refused(config, "shard-00002.bin: cannot be written (No space left on device)", "run the same command again")
    assert {"shard-00000.bin", "shard-00001.bin"} < set(contents(tmp_path / "out"))
    make(config)
    assert contents(tmp_path / "out") == whole


def test_a_shard_made_again_and_interrupted_is_unfinished(images, whole, tmp_path, monkeypatch):
    config = from_folder(images, tmp_path / "out")
    make(config)
    (tmp_path / "out" / "shard-00002.bin").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(SpaceToDepth, "encode", lambda self, images: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            make(config)
    with pytest.raises(AssetError, match="are unfinished"):
        open_latents(tmp_path / "out", config)
    make(config)
    assert contents(tmp_path / "out") == whole


@pytest.mark.parametrize("damage", [None, lambda own, other: own[:-1], lambda own, other: other])
def test_a_damaged_shard_is_made_again(images, whole, tmp_path, damage):
    config, shard = from_folder(images, tmp_path), tmp_path / "shard-00002.bin"
    make(config)
    shard.unlink()
    if damage:
        shard.write_bytes(damage(whole[shard.name], whole["shard-00001.bin"]))
    make(config)
    assert contents(tmp_path) == whole


def test_nothing_is_done_when_all_is_there(images, tmp_path):
    """The shards, the labels and the manifest are enough."""
    config = from_folder(images, tmp_path)
    make(config)
    for path in tmp_path.glob("*.json"):
        if path.name != "manifest.json":
            path.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert make(config) == [] and make(replace(config, images=None)) == [] and len(open_latents(tmp_path, config)) == 22
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}


def test_warnings_and_errors_before_any_work(images, tmp_path, monkeypatch):
    config = from_folder(images, tmp_path)
    with _hold(tmp_path, 0):
        refused(config, "another process prepares latents here")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    assert "0.0 GB are needed" in make(config)[0]


# --- other settings than before ----------------------------------------------------------------------------------


def test_continuing_with_other_settings_is_refused(images, tmp_path):
    out = tmp_path / "out"
    make(from_folder(images, out), 0, 2)
    refused(from_folder(images, out, image_size=8), "image_size 16, now image_size 8", error=ConfigError)
    fewer = write_images(tmp_path / "fewer", count=21, size=16)
    refused(from_folder(fewer, out), "files 22, now files 21", error=ConfigError)
    (fewer / "class1" / "another.png").write_bytes((fewer / "class1" / "1.png").read_bytes())
    refused(from_folder(fewer, out), "another list of images", str(fewer), error=ConfigError)
    refused(digits(out), "was begun with", error=ConfigError)
    moved = write_images(tmp_path / "moved", count=22, size=16)
    assert "22 latents" in make(from_folder(moved, out), 1, 2)[0]
    refused(from_folder(fewer, out), "another list of images", error=ConfigError)


def test_continuing_with_another_vae_is_refused(images, tmp_path):
    pytest.importorskip("diffusers")
    first, second = (save_tiny_vae(tmp_path / f"vae{seed}", seed) for seed in (0, 1))
    make(from_folder(images, tmp_path / "out", vae=str(first)), 0, 2)
    refused(from_folder(images, tmp_path / "out", vae=str(second)), "codec", str(first), str(second), error=ConfigError)
    refused(from_folder(images, tmp_path / "out"), "codec", "space-to-depth", error=ConfigError)
    copy = save_tiny_vae(tmp_path / "copy", 0)
    assert make(from_folder(images, tmp_path / "out", vae=str(copy)), 1, 2)


def test_a_plan_of_another_version_or_damaged(images, tmp_path):
    config = from_folder(images, tmp_path)
    make(config, 0, 2)
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps(json.loads(plan.read_text()) | {"format": 2}))
    refused(config, "plan.json: has latents of format 2, this version reads 1", error=ConfigError)
    plan.write_text(plan.read_text()[:-20])
    refused(config, "plan.json: is damaged")


# --- images that cannot be used ----------------------------------------------------------------------------------


def test_broken_images_are_named_or_left_out_counted_and_listed(tmp_path):
    folder = write_images(tmp_path / "images", count=10, size=16)
    whole = (folder / "class1" / "3.png").read_bytes()
    folder_of({"class0/4.png": b"not an image", "class1/3.png": whole[: len(whole) // 2]}, folder)
    Image.fromarray(np.full((16, 16), 3000, dtype=np.uint16)).save(folder / "class1" / "5.png")
    config = from_folder(folder, tmp_path / "out")
    texts = "data.images", "class0/4.png is not an image", "replace it", "bash run.sh prepare_latents --skip-broken"
    refused(config, *texts)
    assert "shard-00000.bin" not in contents(tmp_path / "out")

    line = make(config, skip_broken=True)[0]
    assert "7 latents" in line and "3 images left out" in line and "class0/4.png" in line
    latents = open_latents(tmp_path / "out", config)
    assert len(latents) == 7 and latents.labels.tolist() == [0] * 4 + [1] * 3
    listed = json.loads((tmp_path / "out" / "manifest.json").read_text())["skipped"]
    assert [file for file, _ in listed] == ["class0/4.png", "class1/3.png", "class1/5.png"]
    assert "broken" in listed[1][1] and "16 bits" in listed[2][1]
    kept = ["class0/0", "class0/2", "class0/6", "class0/8", "class1/1", "class1/7", "class1/9"]
    pixels = np.stack([np.array(Image.open(folder / f"{name}.png")) for name in kept])
    assert (to_pixels(latents.read(*every(7))[0]).permute(0, 2, 3, 1).numpy() == pixels).all()


def test_a_whole_shard_may_be_left_out_but_not_all(tmp_path):
    folder = write_images(tmp_path / "images", count=6, size=16, classes=1)
    for k in range(4):
        (folder / "class0" / f"{k}.png").write_bytes(b"")
    config = from_folder(folder, tmp_path / "out")
    make(config, skip_broken=True)
    latents = open_latents(tmp_path / "out", config)
    assert len(latents) == 2 and latents.read(*every(2))[0].abs().sum() > 0
    for k in range(4, 6):
        (folder / "class0" / f"{k}.png").write_bytes(b"")
    refused(from_folder(folder, tmp_path / "none"), "none of its 6 images can be read", skip_broken=True)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK"])
def test_other_modes_become_rgb(images, tmp_path, mode, recwarn):
    (tmp_path / "images" / "a").mkdir(parents=True)
    source = Image.open(images / "class0" / "0.png").convert(mode)
    source.save(tmp_path / "images" / "a" / ("1.jpg" if mode == "CMYK" else "1.png"))
    make(from_folder(tmp_path / "images", tmp_path / "out"))
    assert not recwarn.list


def test_other_images_that_do_not_do(tmp_path):
    folder_of({"flat/1.png": png(), "loose/a/1.png": png(), "loose/2.png": png(), "a/a/1.txt": b""}, tmp_path)
    Image.new("RGB", (1, 60_000)).save(tmp_path / "a" / "a" / "strip.png")
    refused(from_folder(tmp_path / "a", tmp_path / "strip", image_size=256), "strip.png is 1x60000, too narrow")
    for name, text in (
        ("nowhere", "no such file"),
        ("flat", "no class folders"),
        ("loose", "lies beside class folders"),
    ):
        refused(from_folder(tmp_path / name, tmp_path / "out"), f"data.images {tmp_path / name}", text)
    refused(replace(digits(tmp_path / "out"), source="folder"), "has no latents", "data.images")
    refused(digits(tmp_path / "out", image_size=16), "data.image_size 8, not 16", error=ConfigError)
    refused(digits(tmp_path / "out", split="test"), "data.split", error=ConfigError)
    assert not (tmp_path / "out").exists()


def test_latents_that_float16_cannot_hold(tmp_path, monkeypatch):
    monkeypatch.setattr(SpaceToDepth, "encode", lambda self, images: [torch.full((len(images), 4, 4, 4), 1e6)] * 2)
    refused(digits(tmp_path), "not finite in float16", error=NumericsError)
    assert not list(tmp_path.glob("*.tmp"))


# --- the command -------------------------------------------------------------------------------------------------


def test_the_command(images, whole, command, launch, tmp_path):
    (tmp_path / "pets").symlink_to(images)
    home = {"environment": {"HOME": str(tmp_path)}}
    assert command("~/pets", "~/out", **home).wait().code == 0
    assert contents(tmp_path / "out") == whole
    assert "all latents are there already" in command(images, "out").wait().out
    verified = launch("eval.prepare_latents", "--verify", tmp_path / "out").wait()
    assert verified.code == 0 and "22 latents, intact" in verified.out


@pytest.mark.parametrize(
    "options, code, text",
    [
        (("--images", "x"), 2, "--images, --out and --vae are needed"),
        (("--images", "x", "--out", "y", "--shard", 0), 2, "argument --shard: give a whole number of 1 or more"),
        pytest.param(
            ("--images", "x", "--out", "y", "--device", "cuda"),
            *(2, "PyTorch sees no GPU here"),
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one"),
        ),
        (("--verify", "nowhere"), 3, "nowhere: has no latents"),
    ],
)
def test_the_command_misused(launch, options, code, text):
    started = launch("eval.prepare_latents", *options).wait()
    assert started.code == code and text in started.err and "Traceback" not in started.err


@pytest.mark.parametrize("out", ["/proc/out", "/dev/null", "/dev/null/out", "/" + "long" * 99])
def test_folders_that_cannot_be_written(images, command, out):
    started = command(images, out).wait()
    assert started.code == 3 and started.error.endswith("run the same command again"), started.err


def test_a_disk_that_is_full_from_the_start(images, command):
    started = command(images, "out", largest_file=20_000).wait()
    assert started.code == 3 and "Traceback" not in started.err
    assert started.err.count("error: ") == 1 and "cannot be written (File too large)" in started.err
