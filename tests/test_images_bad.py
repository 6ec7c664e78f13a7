"""Image folders and archives that cannot be used: one line that names the file and says what to do."""

import io
import re
import stat
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from PIL import Image

from meanflow.data import DataConfig, load_dataset
from meanflow.errors import AssetError, UserError

GOOD_PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)


def encode(array, kind="PNG", mode=None) -> bytes:
    image, buffer = Image.fromarray(array), io.BytesIO()
    (image.convert(mode) if mode else image).save(buffer, kind)
    return buffer.getvalue()


GOOD = encode(GOOD_PIXELS)


def load(path, size=8, channels=3):
    config = DataConfig("images", "digits", root="data", path=str(path), split="train", augment_p=0.0, flip=False)
    return load_dataset(config, size, channels, progress=False)


def refused(path, *texts, **settings):
    """Loading fails with one line that holds all the texts."""
    with pytest.raises(AssetError) as caught:
        load(path, **settings)
    line = str(caught.value)
    assert "\n" not in line and line.startswith("data.path ")
    assert all(text in line for text in texts), line
    assert caught.value.exit_code == 3
    return line


def folder(at, **files):
    for name, data in {"good": GOOD, **files}.items():
        (at / "cat").mkdir(exist_ok=True)
        (at / "cat" / f"{name}.png").write_bytes(data)
    return at


def png_16_bit_colour() -> bytes:
    """8×8, 16 bits a channel, RGB. Pillow cannot write one, so the chunks are laid out here."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    rows = zlib.compress((b"\0" + b"\1\2" * 24) * 8)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


# Images


@pytest.mark.parametrize("name, data", [
    ("empty", b""),
    ("text", b"not an image at all"),
    ("cut", encode(np.random.default_rng(1).integers(0, 256, (8, 8, 3), dtype=np.uint8))[:120]),
    ("header", GOOD[:20]),
    ("checksum", GOOD[:60] + bytes([GOOD[60] ^ 255]) + GOOD[61:]),
])  # fmt: skip
def test_broken_image(tmp_path, name, data):
    refused(folder(tmp_path, **{name: data}), f"cat/{name}.png", "broken")


@pytest.mark.parametrize("mode, data", [
    ("L", encode(GOOD_PIXELS, mode="L")),
    ("RGBA", encode(GOOD_PIXELS, mode="RGBA")),
    ("LA", encode(GOOD_PIXELS, mode="LA")),
    ("P", encode(GOOD_PIXELS, mode="P")),
    ("1", encode(GOOD_PIXELS, mode="1")),
    ("I;16", encode(np.full((8, 8), 3000, dtype=np.uint16))),
    ("CMYK", encode(GOOD_PIXELS, "JPEG", mode="CMYK")),
    ("P", encode(GOOD_PIXELS, "GIF", mode="P")),
])  # fmt: skip
def test_other_modes_where_colour_is_wanted(tmp_path, mode, data):
    refused(folder(tmp_path, odd=data), "cat/odd.png has mode", f"mode {mode}, not RGB", "convert('RGB')")


def test_16_bit_colour_is_not_cut_to_8(tmp_path):
    refused(folder(tmp_path, deep=png_16_bit_colour()), "cat/deep.png has 16 bits a channel")


def test_colour_where_grey_is_wanted(tmp_path):
    refused(folder(tmp_path), "cat/good.png has mode RGB, not L", "convert('L')", channels=1)
    sixteen = tmp_path / "grey"
    sixteen.mkdir()
    (sixteen / "1.png").write_bytes(encode(np.full((8, 8), 3000, dtype=np.uint16)))
    refused(sixteen, "1.png has mode I;16, not L", channels=1)


@pytest.mark.parametrize("height, width", [(8, 9), (9, 8), (16, 16), (1, 1)])
def test_other_sizes(tmp_path, height, width):
    odd = encode(np.zeros((height, width, 3), dtype=np.uint8))
    refused(folder(tmp_path, odd=odd), f"cat/odd.png is {width}x{height}, not 8x8", "Image.open")


def test_the_command_in_the_message_mends_the_folder(tmp_path):
    odd = {"big": encode(np.full((30, 20, 3), 77, dtype=np.uint8)), "grey": encode(GOOD_PIXELS, mode="L")}
    line = refused(folder(tmp_path, **odd), "big.png is 20x30")
    command = re.search(r"find \. .*\+", line).group().replace("python", sys.executable)
    subprocess.run(command, shell=True, cwd=tmp_path, check=True, timeout=60)
    data = load(tmp_path)
    assert data.images.shape == (3, 3, 8, 8) and (data.images[0] == 77).all()


def test_decompression_bomb(tmp_path, recwarn):
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    bomb = GOOD[:16] + header + checksum + GOOD[33:]
    refused(folder(tmp_path, bomb=bomb), "cat/bomb.png")
    warned = bomb.replace(struct.pack(">II", 40_000, 40_000), struct.pack(">II", 10_000, 10_000))
    warned = warned[:29] + struct.pack(">I", zlib.crc32(warned[12:29])) + warned[33:]
    refused(folder(tmp_path, bomb=warned), "cat/bomb.png", "bomb")
    assert not recwarn.list  # Pillow's warning would be a second line


def test_the_first_bad_file_in_order_is_named(tmp_path):
    bad = {f"x{k:03d}": b"junk" for k in range(40)}
    refused(folder(tmp_path, **bad), "cat/x000.png")


# Folders


def test_nothing_there(tmp_path):
    refused(tmp_path / "nowhere", "no such file or folder")


def test_no_images(tmp_path):
    refused(tmp_path, "has no images")
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    refused(tmp_path, "has no images", ".png")


@pytest.mark.parametrize("content", [[], ["notes.txt"], [".hidden.png"]])
def test_class_folder_without_images(tmp_path, content):
    folder(tmp_path)
    (tmp_path / "dog").mkdir()
    for name in content:
        (tmp_path / "dog" / name).write_bytes(GOOD)
    refused(tmp_path, "dog/ is a class folder without images")


def test_split_folder_without_images(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "test" / "cat").mkdir(parents=True)
    (tmp_path / "test" / "cat" / "1.png").write_bytes(GOOD)
    refused(tmp_path, "train/ has no images")


def test_loose_image_beside_class_folders(tmp_path):
    folder(tmp_path)
    (tmp_path / "preview.png").write_bytes(GOOD)
    refused(tmp_path, "preview.png lies beside class folders")


def test_links_in_a_folder_are_followed_but_not_in_circles(tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "data").mkdir()
    folder(tmp_path / "store")
    (tmp_path / "data" / "kitten").symlink_to(tmp_path / "store" / "cat")
    assert load(tmp_path / "data").class_names == ("kitten",)
    (tmp_path / "store" / "cat" / "loop").symlink_to(tmp_path / "data")
    refused(tmp_path / "data", "reached twice through links")


def test_unreadable_link(tmp_path):
    folder(tmp_path)
    (tmp_path / "cat" / "gone.png").symlink_to(tmp_path / "missing.png")
    refused(tmp_path, "cat/gone.png")


# Archives


def tar_of(at, *members, mode="w", kind=tarfile.REGTYPE, link=""):
    with tarfile.open(at / "images.tar", mode) as archive:
        for name in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = (kind, link) if name == members[-1] else (tarfile.REGTYPE, "")
            info.size = len(GOOD) if info.isreg() else 0
            archive.addfile(info, io.BytesIO(GOOD))
    return at / "images.tar"


def zip_of(at, *members):
    with zipfile.ZipFile(at / "images.zip", "w") as archive:
        for name in members:
            archive.writestr(name, GOOD)
    return at / "images.zip"


def test_not_an_archive(tmp_path):
    for data in (b"", b"hello", GOOD, b"\x1f\x8b" + b"junk" * 50, b"\xfd7zXZ\0" + b"junk" * 50):
        (tmp_path / "file").write_bytes(data)
        refused(tmp_path / "file", "not a folder, zip or tar")


@pytest.mark.parametrize("name", ["/etc/x.png", "../x.png", "a/../../x.png", "C:/x.png"])
def test_members_outside_the_archive(tmp_path, name):
    refused(tar_of(tmp_path, "a/1.png", name), name, "points outside the archive")
    refused(zip_of(tmp_path, "a/1.png", name), name, "points outside the archive")


def test_backslashes_are_separators_in_a_zip(tmp_path):
    assert load(zip_of(tmp_path, "a\\1.png", "b\\1.png")).class_names == ("a", "b")
    refused(zip_of(tmp_path, "a\\..\\..\\x.png"), "points outside the archive")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar(tmp_path, kind):
    path = tar_of(tmp_path, "a/1.png", "a/2.png", kind=kind, link="a/1.png")
    refused(path, "a/2.png is a link or a device")


def test_link_in_a_zip(tmp_path):
    path = zip_of(tmp_path, "a/1.png")
    with zipfile.ZipFile(path, "a") as archive:
        info = zipfile.ZipInfo("a/2.png")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "1.png")
    refused(path, "a/2.png is a link or a device")


def test_large_members(tmp_path):
    size = 64 * 2**20 + 1
    with zipfile.ZipFile(tmp_path / "big.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/big.png", bytes(size))
    refused(tmp_path / "big.zip", "a/big.png unpacks to 64 MB")
    with tarfile.open(tmp_path / "big.tar", "w") as archive:
        info = tarfile.TarInfo("a/big.png")
        info.size = 10 * 2**40  # a header alone: refused before anything is read
        archive.fileobj.write(info.tobuf())
    refused(tmp_path / "big.tar", "a/big.png unpacks to")


def test_zip_that_lies_about_its_size(tmp_path):
    path = zip_of(tmp_path, "a/1.png")
    data = path.read_bytes()
    path.write_bytes(data.replace(struct.pack("<I", len(GOOD)), struct.pack("<I", 10)))
    refused(path)


def test_member_twice(tmp_path):
    refused(tar_of(tmp_path, "a/1.png", "a/1.png"), "a/1.png is in the archive twice")


def test_encrypted_zip(tmp_path):
    path = zip_of(tmp_path, "a/1.png")
    data = bytearray(path.read_bytes())
    data[data.index(b"PK\1\2") + 8] |= 1
    data[6] |= 1
    path.write_bytes(data)
    refused(path, "encrypted")


def damage(whole: bytes, path):
    """Every way to cut an archive short fails in one line, or leaves all images (a cut behind them)."""
    failures = 0
    for length in range(1, len(whole), max(1, len(whole) // 60)):
        path.write_bytes(whole[:length])
        try:
            assert len(load(path)) == 3
        except UserError as error:
            failures += 1
            assert "\n" not in str(error) and str(path) in str(error)
    return failures


@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
def test_tar_cut_short(tmp_path, mode):
    path = tar_of(tmp_path, "a/1.png", "a/2.png", "b/1.png", mode=mode)
    whole = path.read_bytes()
    assert len(load(path)) == 3
    assert damage(whole, path) >= 15
    path.write_bytes(whole[: len(whole) // 3])
    refused(path)


def test_tar_cut_between_two_members_is_noticed(tmp_path):
    path = tar_of(tmp_path, "a/1.png", "b/1.png")
    with tarfile.open(path) as archive:
        border = archive.getmembers()[1].offset
    path.write_bytes(path.read_bytes()[:border])
    refused(path, "damaged or cut short")


def test_tar_with_a_damaged_header_in_the_middle(tmp_path):
    path = tar_of(tmp_path, "a/1.png", "b/1.png")
    with tarfile.open(path) as archive:
        border = archive.getmembers()[1].offset
    data = bytearray(path.read_bytes())
    data[border + 150] ^= 255
    path.write_bytes(data)
    refused(path, "damaged or cut short")


def test_zip_cut_short(tmp_path):
    path = zip_of(tmp_path, "a/1.png", "a/2.png", "b/1.png")
    assert damage(path.read_bytes(), path) >= 58


@pytest.mark.parametrize("name", [b"\xc7\xff", b"\x00\x00"])
def test_zip_whose_member_has_another_name_than_its_directory_says(tmp_path, name):
    """Flagged as UTF-8 in the member's own header, which it is not: zipfile raises a UnicodeDecodeError."""
    path = zip_of(tmp_path, "a/1.png")
    data = bytearray(path.read_bytes())
    data[6:8] = (int.from_bytes(data[6:8], "little") | 0x800).to_bytes(2, "little")
    data[30:32] = name
    start = data.index(b"PK\1\2")
    data[start + 8 : start + 10] = (0x800).to_bytes(2, "little")
    path.write_bytes(data)
    refused(path, "damaged or cut short")


def test_zip_with_damaged_content(tmp_path):
    path = zip_of(tmp_path, "a/1.png")
    data = bytearray(path.read_bytes())
    data[80] ^= 255
    path.write_bytes(data)
    refused(path, "damaged or cut short")
