"""Image folders and archives: what is read, and what is refused in one line that names the file and what to do."""

import os
import random
import shlex
import stat
import struct
import subprocess
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from image_helpers import PACKERS, Files, encoded, folder_of, load, pixels, png, tar_of, written, zip_of
from PIL import Image

from eval.check_data import main as check_data
from meanflow.data import DataConfig, load_dataset
from meanflow.data.check import check_images
from meanflow.data.images import centre_crop, crop_file
from meanflow.errors import AssetError, ConfigError, UserError, run_main

GOOD = png()


@pytest.fixture(params=list(PACKERS))
def pack(request, tmp_path) -> Callable[[Files], Path]:
    return lambda files: PACKERS[request.param](files, tmp_path)


def named(*names: str) -> Files:
    """An image for each name; the k-th has the pixels of key k."""
    return {name: png(key) for key, name in enumerate(names)}


def shuffled(files: Files) -> Files:
    names = list(files)
    random.Random(0).shuffle(names)
    return {name: files[name] for name in names}


def assert_images(dataset, keys, mode="RGB", size=8):
    arrays = np.stack([pixels(key, mode, size) for key in keys])
    expected = torch.from_numpy(arrays.reshape(len(keys), size, size, -1)).permute(0, 3, 1, 2)
    assert dataset.images.dtype == torch.uint8 and dataset.images.is_contiguous()
    assert torch.equal(dataset.images, expected)


def refused(path, *texts, error=AssetError, **settings) -> str:
    """Loading fails with one line that holds all the texts."""
    with pytest.raises(error) as caught:
        load(path, **settings)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(("data.path ", "data.split "))
    assert all(text in line for text in texts), line
    return line


# --- what is read ------------------------------------------------------------------------------------------------


def test_class_folders(pack):
    files = named("ant/1.png", "ant/10.png", "ant/2.PNG", "bee/deep/1.png", "bee/x.png", "cow/1.png")
    others = {"README.txt": b"hello", "ant/.hidden.png": b"", ".git/a.png": b"", "bee/notes.md": b""}
    data = load(pack(shuffled(files | others)))
    assert_images(data, range(6))  # sorted by path, whatever the order in the archive
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2] and data.class_names == ("ant", "bee", "cow")


def test_split_folders(pack):
    path = pack(named("test/a/1.png", "test/b/1.png", "train/a/1.png", "train/b/1.png", "train/b/2.png"))
    train, test = load(path), load(path, split="test")
    assert_images(train, [2, 3, 4])
    assert_images(test, [0, 1])
    assert train.labels.tolist() == [0, 1, 1] and test.class_names == train.class_names == ("a", "b")


@pytest.mark.parametrize(
    "names, split, keys, classes",
    [
        (["a.png", "b.png"], "train", [0, 1], None),  # flat
        (["train/1.png", "val/2.png"], "train", [0], None),
        (["train/1.png", "val/2.png"], "test", [1], None),
        (["cat/1.png"], "train", [0], ("cat",)),  # one class is a class
        (["pets/cat/1.png", "pets/dog/1.png"], "train", [0, 1], ("cat", "dog")),  # stepped into
        (["v1/pets/test/cat/1.png", "v1/pets/train/cat/1.png"], "train", [1], ("cat",)),
        (["train/a/1.png"], "train", [0], ("a",)),
    ],
)
def test_other_layouts(pack, names, split, keys, classes):
    data = load(pack(named(*names)), split=split)
    assert_images(data, keys)
    assert data.class_names == (classes or ())
    assert data.labels is None if classes is None else data.labels.tolist() == list(range(len(keys)))[: len(keys)]


def test_grey_images(pack):
    assert_images(load(pack({"a/1.png": png(5, mode="L")}), channels=1), [5], "L")


def test_jpeg_and_other_formats(tmp_path):
    kinds = {".bmp": "BMP", ".jpeg": "JPEG", ".jpg": "JPEG", ".tif": "TIFF", ".webp": "WEBP"}
    lossless = {"WEBP": {"lossless": True}}
    files = {f"a/1{s}": encoded(pixels(0), kind, **lossless.get(kind, {})) for s, kind in kinds.items()}
    data = load(folder_of(files, tmp_path))
    plain = np.array(Image.open(tmp_path / "a" / "1.jpg"))
    assert torch.equal(data.images[2], torch.from_numpy(plain).permute(2, 0, 1))
    assert torch.equal(data.images[[0, 3, 4]], torch.from_numpy(pixels(0)).permute(2, 0, 1).expand(3, -1, -1, -1))


def test_many_images_pass_the_read_ahead_window(tmp_path):
    files = {f"{k % 3}/{k:05d}.png": png(k, size=4) for k in range(1100)}
    data = load(written(tmp_path / "a.zip", zip_of(shuffled(files))), size=4)
    keys = [int(name[2:7]) for name in sorted(files)]
    assert_images(data, keys, size=4)
    assert data.labels.tolist() == [key % 3 for key in keys]


def test_progress_only_where_it_is_slow(tmp_path, capsys, monkeypatch):
    config = DataConfig(path=str(folder_of(named("1.png", "2.png", "3.png", "4.png"), tmp_path)))
    for above, progress, shown in ((5000, True, False), (3, True, True), (3, False, False)):
        monkeypatch.setattr("meanflow.data.images.SHOW_PROGRESS_ABOVE", above)
        load_dataset(config, 8, 3, progress=progress)
        assert ("reading images" in capsys.readouterr().err) == shown


def test_nothing_is_extracted(tmp_path):
    path = written(tmp_path / "a.tar", tar_of(named("a/1.png"), "w:gz"))
    before = sorted(tmp_path.rglob("*"))
    load(path)
    assert sorted(tmp_path.rglob("*")) == before


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    folder_of(named("cat/1.png"), tmp_path / "pets")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert len(load("~/pets")) == 1
    refused("~nobody-of-this-name/pets", "no such file or folder")


# --- images that cannot be used ----------------------------------------------------------------------------------


def png_header(width: int, height: int, bits: int = 8) -> bytes:
    """Of RGB, as it stands at bytes 12 … 33 of a PNG."""
    content = b"IHDR" + struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return content + struct.pack(">I", zlib.crc32(content))


def png_16_bit_colour() -> bytes:
    """8×8, 16 bits a channel, RGB, which Pillow cannot write."""
    rows = b"IDAT" + zlib.compress((b"\0" + b"\1\2" * 24) * 8)
    length, checksum = struct.pack(">I", len(rows) - 4), struct.pack(">I", zlib.crc32(rows))
    return GOOD[:12] + png_header(8, 8, 16) + length + rows + checksum + GOOD[-12:]


def sized(width: int, height: int) -> bytes:
    return encoded(np.zeros((height, width, 3), dtype=np.uint8))


GREY16 = encoded(np.full((8, 8), 3000, dtype=np.uint16))


@pytest.mark.parametrize(
    "data, channels, texts",
    [
        *((data, 3, ["broken"]) for data in (b"", b"not an image", png(1)[:120], GOOD[:20])),
        (GOOD[:60] + bytes([GOOD[60] ^ 255]) + GOOD[61:], 3, ["broken"]),
        (GOOD[:12] + png_header(40_000, 40_000) + GOOD[33:], 3, ["bomb"]),
        (GOOD[:12] + png_header(10_000, 10_000) + GOOD[33:], 3, ["bomb"]),
        *(
            (encoded(pixels(0), kind, mode), 3, [f"has mode {mode}, not RGB: ", "--set data.resize=crop"])
            for kind, mode in [
                *(("PNG", mode) for mode in ("L", "RGBA", "LA", "P", "1")),
                *(("JPEG", "CMYK"), ("GIF", "P")),
            ]
        ),
        (GREY16, 3, ["has mode I;16, not RGB"]),
        (GREY16, 1, ["has mode I;16, not L"]),
        (png_16_bit_colour(), 3, ["has 16 bits a channel"]),
        (GOOD, 1, ["has mode RGB, not L", "--set model.channels=3, or --set data.resize=crop"]),
        *((sized(w, h), 3, [f"is {w}x{h}, not 8x8: --set data.resize=crop"]) for w, h in ((9, 8), (8, 9), (1, 1))),
        (sized(64, 64), 3, ["is 64x64, not 8x8", "--set model.image_size=64 model.attention=[16], or"]),
    ],
)
def test_an_image_that_cannot_be_used(tmp_path, recwarn, data, channels, texts):
    good = png(mode="RGB" if channels == 3 else "L")
    path = folder_of({"cat/a.png": good, "cat/odd.png": data, "cat/z.png": b"a later one"}, tmp_path)
    line = refused(path, "cat/odd.png", *texts, channels=channels)
    assert line.startswith(f"data.path {tmp_path}: ")
    assert not recwarn.list  # Pillow's warning would be a second line


# --- folders -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files, split, error, text",
    [
        (None, "train", AssetError, "no such file or folder"),
        ({}, "train", AssetError, "has no images"),
        ({"cat/notes.txt": b""}, "train", AssetError, "has no images (looked for .bmp"),
        ({"cat/1.png": GOOD, "dog/": b""}, "train", AssetError, "dog/ is a class folder without images"),
        ({"cat/1.png": GOOD, "dog/notes.txt": b""}, "train", AssetError, "dog/ is a class folder without images"),
        ({"cat/1.png": GOOD, "dog/.hidden.png": GOOD}, "train", AssetError, "dog/ is a class folder without images"),
        ({"train/": b"", "test/cat/1.png": GOOD}, "train", AssetError, "train/ has no images"),
        ({"cat/1.png": GOOD, "preview.png": GOOD}, "train", AssetError, "preview.png lies beside class folders"),
        ({"config.yaml": b"", "metrics.jsonl": b"", "curves.png": GOOD}, "train", AssetError, "is a run folder"),
        ({"config.yaml": b"", "checkpoints/": b"", "curves.png": GOOD}, "train", AssetError, "is a run folder"),
        ({"a/1.png": GOOD}, "test", ConfigError, "has no test/ or val/ folder"),
        ({"train/a/1.png": GOOD}, "test", ConfigError, "only has train"),
    ],
)
def test_folders_that_are_refused(tmp_path, files, split, error, text):
    for name, data in (files or {}).items():
        if name.endswith("/"):
            (tmp_path / "images" / name).mkdir(parents=True)
        else:
            written(tmp_path / "images" / name, data)
    if files == {}:
        (tmp_path / "images").mkdir()
    refused(tmp_path / "images", text, error=error, split=split)


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path):
    folder_of({"store/cat/1.png": GOOD, "data/note.txt": b""}, tmp_path)
    (tmp_path / "data" / "kitten").symlink_to(tmp_path / "store" / "cat")
    assert load(tmp_path / "data").class_names == ("kitten",)
    (tmp_path / "store" / "cat" / "gone.png").symlink_to(tmp_path / "missing.png")
    refused(tmp_path / "data", "kitten/gone.png")
    (tmp_path / "store" / "cat" / "loop").symlink_to(tmp_path / "data")
    refused(tmp_path / "data", "reached twice through links")


# --- archives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [b"", b"hello", GOOD, b"\x1f\x8b" + b"junk" * 50, b"\xfd7zXZ\0" + b"junk" * 50])
def test_not_an_archive(tmp_path, data):
    refused(written(tmp_path / "file", data), "not a folder, zip or tar")


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "C:/x.png"])
def test_members_outside_the_archive(tmp_path, name):
    for data in (tar_of({"a/1.png": GOOD, name: GOOD}), zip_of({"a/1.png": GOOD, name: GOOD})):
        refused(written(tmp_path / "file", data), name, "points outside the archive")


def test_backslashes_are_separators_in_a_zip(tmp_path):
    path = tmp_path / "file"
    assert load(written(path, zip_of({"a\\1.png": GOOD, "b\\1.png": GOOD}))).class_names == ("a", "b")
    refused(written(path, zip_of({"a\\..\\..\\x.png": GOOD})), "points outside the archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar(tmp_path, kind):
    path = written(tmp_path / "a.tar", tar_of({"a/1.png": GOOD}))
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a/2.png")
        info.type, info.linkname = kind, "a/1.png"
        archive.addfile(info)
    refused(path, "a/2.png is a link or a device")


def patched(data: bytes, *edits: tuple[int, bytes]) -> bytes:
    data = bytearray(data)
    for at, new in edits:
        data[at : at + len(new)] = new
    return bytes(data)


def stored_zip(**info) -> bytes:
    """One image, its bytes as they are; `info` sets fields of its entry."""
    member = zipfile.ZipInfo("a/1.png")
    for name, value in info.items():
        setattr(member, name, value)
    return zip_of({member: GOOD}, zipfile.ZIP_STORED)


STORED = stored_zip()
DIRECTORY = STORED.index(b"PK\1\2")
UTF8 = (0x800).to_bytes(2, "little")


@pytest.mark.parametrize(
    "data, text",
    [
        (stored_zip(external_attr=(stat.S_IFLNK | 0o777) << 16), "a/1.png is a link or a device"),
        (patched(STORED, (6, b"\1"), (DIRECTORY + 8, b"\1")), "encrypted"),
        (STORED.replace(struct.pack("<I", len(GOOD)), struct.pack("<I", 10)), ""),  # lies about its size
        (patched(STORED, (80, b"\xff")), "damaged or cut short"),
        # Names that are flagged as UTF-8 in the member's own header and are not: zipfile's UnicodeDecodeError.
        *((patched(STORED, (6, UTF8), (30, n), (DIRECTORY + 8, UTF8)), "damaged") for n in (b"\xc7\xff", b"\0\0")),
        (zip_of({"a/big.png": bytes(64 * 2**20 + 1)}), "a/big.png unpacks to 64 MB"),
    ],
)
def test_zips_that_are_refused(tmp_path, data, text):
    refused(written(tmp_path / "a.zip", data), text)


def tar_header(name: str, size: int) -> bytes:
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf()


PAIR = tar_of({"a/1.png": GOOD, "b/1.png": GOOD})
BORDER = PAIR.index(b"b/1.png")


@pytest.mark.parametrize(
    "data, text",
    [
        (tar_of({"a/1.png": GOOD}).rstrip(b"\0").ljust(1024, b"\0") + PAIR, "a/1.png is in the archive twice"),
        (tar_header("a/big.png", 10 * 2**40), "a/big.png unpacks to"),  # refused before anything is read
        (PAIR[:BORDER], "damaged or cut short"),  # exactly between two members
        (patched(PAIR, (BORDER + 150, b"\xff")), "damaged or cut short"),
    ],
)
def test_tars_that_are_refused(tmp_path, data, text):
    refused(written(tmp_path / "a.tar", data), text)


@pytest.mark.parametrize(
    "pack, least",
    [(zip_of, 58), *((lambda files, mode=mode: tar_of(files, mode), 15) for mode in ("w", "w:gz", "w:xz", "w:bz2"))],
)
def test_an_archive_cut_short_anywhere(tmp_path, pack, least):
    """One line, or all images where the cut is behind them."""
    whole, failures = pack({"a/1.png": GOOD, "a/2.png": GOOD, "b/1.png": GOOD}), 0
    path = written(tmp_path / "file", whole)
    assert len(load(path)) == 3
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        try:
            assert len(load(path)) == 3
        except UserError as error:
            failures += 1
            assert "\n" not in str(error) and str(path) in str(error)
    assert failures >= least
    refused(written(path, whole[: len(whole) // 3]))


# --- all faults at once ------------------------------------------------------------------------------------------


FAULTY = {
    **named(*(f"cat/{k}.png" for k in range(8)), "dog/1.png"),
    **{f"dog/broken{k}.jpg": b"junk" for k in range(5)},
    **{"dog/cut.png": GOOD[:60], "dog/wide.png": sized(30, 20), "dog/also.png": sized(16, 16)},
    "dog/both.jpg": encoded(np.full((9, 9), 9, dtype=np.uint8), "JPEG"),
    **{"cat/grey.png": png(mode="L"), "cat/deep.png": GREY16, "cat/deeper.png": png_16_bit_colour()},
    **{"preview.png": GOOD, "empty/README.txt": b"nothing here", "cat/notes.md": b""},
}
FAULTS = {
    "unreadable": ("6 images cannot be read", [*(f"dog/broken{k}.jpg" for k in range(5)), "dog/cut.png"]),
    "size": (
        "3 images not 8x8 (found 8x8: 13, 16x16: 1, 30x20: 1, 9x9: 1)",
        ["dog/also.png", "dog/both.jpg", "dog/wide.png"],
    ),
    "mode": ("3 images not RGB", ["cat/deep.png", "cat/grey.png", "dog/both.jpg"]),
    "depth": ("1 image with 16 bits a channel", ["cat/deeper.png"]),
    "loose": ("1 image beside class folders", ["preview.png"]),
    "empty": ("1 class folder without images", ["empty"]),
}


def checked(capfd, *arguments) -> tuple[int, str, str]:
    code = run_main(check_data, [str(argument) for argument in arguments])
    return code, *capfd.readouterr()


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_all_faults_at_once(tmp_path, capfd, kind):
    path = PACKERS[kind](shuffled(FAULTY), tmp_path)
    code, out, err = checked(capfd, path)
    assert code == 3 and err == "" and out.startswith(f"{path}: 21 images in 2 classes\n")
    assert [block.splitlines()[0] for block in out.split("\n\n")[1:7]] == [title for title, _ in FAULTS.values()]
    assert "    dog/broken0.jpg is not an image or is broken (no known image format)\n" in out
    assert "dog/broken4.jpg" not in out and "… and 3 more (--list unreadable)" in out
    assert "other files, which are ignored: .md: 1, .txt: 1" in out
    assert out.count("train with --set data.resize=crop") == 1 and out.count("\n  as above\n") == 2
    settings = "model.image_size=8 model.attention=[2] model.channels=3 model.classes=2 data.resize=crop"
    assert out.endswith(f"to train on them once that is repaired: --set data.path={path} {settings}\n")
    for kind, (_, names) in FAULTS.items():
        assert checked(capfd, path, "--list", kind)[1].splitlines() == names


def test_the_printed_commands_repair_the_folder(tmp_path, capfd):
    """Run as they are printed, but for `bash run.sh`, which is this process. The rest is what data.resize is for."""
    path = folder_of(FAULTY, tmp_path / "my pets")
    for group in check_images(str(path)).groups:
        if not group.repair.startswith("train with"):
            asked, _, command = group.repair.rpartition("away: ")[2].partition(" | ")
            names = checked(capfd, *shlex.split(asked)[3:])[1]
            subprocess.run(command, shell=True, cwd=path, input=names, text=True, check=True, timeout=60)
    code, out, _ = checked(capfd, path)
    assert code == 3 and "\nto train on them: --set" in out
    code, out, _ = checked(capfd, path, "--resize", "crop")
    assert code == 0 and out.count("\n\n") == 2  # the note and the settings
    assert sum(file.is_file() for file in (tmp_path / "removed").rglob("*")) == 8  # 6 unreadable, 1 loose, a README
    files = sorted(file for file in path.rglob("*.*") if file.suffix != ".md")
    rows = {file.stem: image for file, image in zip(files, load(path, resize="crop").images, strict=True)}
    assert (rows["deep"] == 3000 // 256).all() and (rows["both"] == 9).all() and (rows["wide"] == 0).all()
    assert torch.equal(rows["3"], torch.from_numpy(pixels(3)).permute(2, 0, 1))  # what was right is left alone


@pytest.mark.parametrize(
    "files, options, code, texts",
    [
        (named("cat/1.png", "dog/1.png", "dog/2.png"), [], 0, ["3 images in 2 classes", "to train on them: --set"]),
        (named("1.png", "2.png"), [], 0, ["in 0 classes", "model.classes=0"]),
        (named("cat/1.png"), ["--size", 16], 3, ["1 image not 16x16", "model.image_size=16"]),
        (named("cat/1.png"), ["--channels", 1], 3, ["not grey", "channels=1 model.classes=1 data.resize=crop"]),
        ({f"a/{k}.png": png(mode="L", size=32) for k in range(2)}, [], 0, ["model.image_size=32 model.channels=1"]),
        ({"a/1.png": sized(30, 20), "a/2.png": sized(20, 30)}, [], 3, ["2 images not 64x64"]),
        ({"a/1.png": sized(50, 50)}, [], 0, ["note: the recipes' U-nets need a size that 4 divides", "--size 48"]),
        (named("train/a/1.png", "val/b/1.png"), ["--split", "test"], 0, ["1 images in 1 classes"]),
        (named("a/1.png"), ["--split", "test"], 2, ["error: data.split is 'test', but"]),
        ({"config.yaml": b"", "metrics.jsonl": b"", "curves.png": GOOD}, [], 3, ["error: ", "is a run folder"]),
    ],
)
def test_what_a_check_says(tmp_path, capfd, files, options, code, texts):
    found, out, err = checked(capfd, folder_of(files, tmp_path), *options)
    assert found == code and all(text in out + err for text in texts), out + err


def test_names_that_cannot_be_printed(tmp_path, capfd):
    folder_of({"cat/1.png": GOOD}, tmp_path)
    with open(os.fsencode(tmp_path) + b"/cat/\xff\x1b.png", "wb") as file:
        file.write(b"junk")
    code, out, _ = checked(capfd, tmp_path)
    assert code == 3 and "cat/\ufffd\ufffd.png is not an image" in out
    run_main(check_data, [str(tmp_path), "--list", "unreadable"])
    assert "\x1b.png" in capfd.readouterr().out  # as it is, for xargs


# --- ADM's centre crop, against a computation that does without Pillow ---------------------------------------------


def resampled(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """The first axis brought to `length` by the textbook's filter, widened where it shrinks, rounded to 8 bits."""
    scale = len(pixels) / length
    widened = max(scale, 1.0)
    result = np.empty((length, *pixels.shape[1:]))
    for k in range(length):
        centre = (k + 0.5) * scale
        first, last = max(int(centre - support * widened + 0.5), 0), int(centre + support * widened + 0.5)
        taps = np.arange(first, min(last, len(pixels)))
        weights = kernel((taps + 0.5 - centre) / widened)
        result[k] = np.tensordot(weights / weights.sum(), pixels[taps].astype(float), 1)
    return np.clip(np.floor(result + 0.5), 0, 255)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def plain_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop of (H, W, 3), written from its description."""

    def resize(pixels, height, width, *kernel):
        across = resampled(pixels.swapaxes(0, 1), width, *kernel).swapaxes(0, 1)
        return resampled(across, height, *kernel)

    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    height, width = (round(n * size / min(pixels.shape[:2])) for n in pixels.shape[:2])
    pixels = resize(pixels, height, width, cubic, 2.0)
    top, left = (height - size) // 2, (width - size) // 2
    return pixels[top : top + size, left : left + size]


SHAPES = [(17, 31), (31, 20), (33, 47), (80, 64), (131, 67), (9, 12), (16, 40), (16, 16)]


@pytest.mark.parametrize("height, width", SHAPES)
def test_the_crop_against_a_plain_computation(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.array(centre_crop(Image.fromarray(pixels), 16)).astype(float)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - plain_crop(pixels, 16)).max() <= 1  # Pillow computes with fixed point
    if height == width == 16:
        assert (found == pixels).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_a_hundred_images_of_mixed_sizes_and_modes(tmp_path, channels):
    """`data.resize=crop`: each is converted, then cropped; the first ten have the size already."""
    numbers, modes = np.random.default_rng(1), ("RGB", "L", "RGBA", "CMYK", "P", "LA", "1")
    for k in range(100):
        height, width = (16, 16) if k < 10 else numbers.integers(9, 90, 2)
        array = numbers.integers(0, 256, (height, width, 3), dtype=np.uint8)
        kind, mode = ("JPEG", "RGB") if k % 3 else ("TIFF", modes[k // 3 % len(modes)])
        written(tmp_path / f"{k % 2}" / f"{k:03d}.{kind.lower()}", encoded(array, kind, mode))
    data = load(tmp_path, size=16, channels=channels, resize="crop")
    assert data.images.shape == (100, channels, 16, 16) and data.images.is_contiguous()
    for path, found in zip(sorted(tmp_path.rglob("*.*")), data.images, strict=True):
        with Image.open(path) as image:
            whole = image.convert("L" if channels == 1 else "RGB").convert("RGB")
        found = found.permute(1, 2, 0).numpy()
        assert (found == np.array(centre_crop(whole, 16))[:, :, :channels]).all(), path
        difference = np.abs(found - plain_crop(np.array(whole), 16)[:, :, :channels])
        assert difference.mean() < (1.5 if whole.size != (16, 16) else 1e-9), path


def test_what_becomes_of_other_modes(tmp_path):
    """Of 16 bits the upper 8, of colours the luma, of transparent pixels the colour; rows stay as they are stored."""
    colour = np.full((8, 8, 3), (200, 100, 0), dtype=np.uint8)
    turned = Image.Exif()
    turned[0x0112] = 6
    striped = np.repeat(np.arange(0, 64, 8, dtype=np.uint8)[:, None], 8, 1)
    files = {
        "0.png": GREY16,
        "1.png": png_16_bit_colour(),
        "2.png": encoded(colour),
        "3.png": encoded(np.dstack([colour, np.zeros((8, 8), np.uint8)])),
        "4.png": encoded(striped, exif=turned),
    }
    path = folder_of(files, tmp_path)
    grey = load(path, channels=1, resize="crop").images[:, 0]
    assert torch.equal(grey[4], torch.from_numpy(striped))
    assert [int(image[0, 0]) for image in grey[:4]] == [3000 // 256, 1, 118, 118]  # 0.299 · 200 + 0.587 · 100
    rgb = load(path, resize="crop").images
    assert [image[:, 0, 0].tolist() for image in rgb[:4]] == [[11] * 3, [1] * 3, [200, 100, 0], [200, 100, 0]]


@pytest.mark.parametrize(
    "data, text",
    [
        (sized(3000, 1), "odd.png is 3000x1, too narrow a strip to be cropped to 600x600"),
        (encoded(np.ones((8, 8), dtype=np.float32), "TIFF"), "odd.png has mode F, which cannot be converted"),
        (GOOD[:60], "odd.png is broken"),
    ],
)
def test_images_that_cannot_be_cropped(tmp_path, capfd, data, text):
    path = folder_of({"cat/odd.png": data}, tmp_path)
    refused(path, text, size=600, resize="crop")
    code, out, _ = checked(capfd, path, "--size", 600, "--resize", "crop")
    assert code == 3 and text.partition(" ")[2] in out and "once that is repaired" in out


def test_latents_are_cropped_by_the_same_function(tmp_path):
    path = written(tmp_path / "1.png", sized(30, 50))
    assert torch.equal(crop_file("", path, 16), load(tmp_path, size=16, resize="crop").images[0])
