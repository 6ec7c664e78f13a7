"""Image archives from anywhere: they are read, and checked, or refused in one line."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from image_helpers import load, png, tar_of, zip_of
from mutations import NUMBERS, mutated, refused, written

from meanflow.data.check import check_images
from meanflow.errors import AssetError

BLOCK = tarfile.BLOCKSIZE
NAMES = [b"../", b"/", b"..", b"C:/", b"\\", b"\0", b"\xff", b"a" * 300, b"\n", b"./", b"__MACOSX/", "é".encode()]
FILES = {"class0/0.png": png(0), "class0/2.png": png(2), "class1/1.png": png(1)}
LONG = {f"{'long' * 40}/{name}": content for name, content in FILES.items()}


def use(folder, name: str, data: bytes) -> None:
    path = written(folder / name, data)
    refused(lambda: load(path))
    refused(lambda: check_images(str(path)))


@given(data=st.data())
def test_a_mutated_tar(tmp_path_factory, data):
    wholes = [tar_of(FILES), tar_of(LONG), tar_of(LONG, form=tarfile.PAX_FORMAT)]
    use(tmp_path_factory.getbasetemp(), "a.tar", data.draw(mutated(wholes, NAMES)))


@given(data=st.data())
def test_a_mutated_tar_header_whose_checksum_is_right(tmp_path_factory, data):
    whole = bytearray(tar_of(LONG))
    start = data.draw(st.sampled_from(range(0, len(whole), BLOCK)))
    whole[start : start + BLOCK] = data.draw(mutated([bytes(whole[start : start + BLOCK])], NAMES))[:BLOCK].ljust(BLOCK)
    kind = data.draw(st.sampled_from(b"0" * 20 + b"\x00123456789KLNSVXgx"))
    if kind != ord("0"):
        whole[start + 156] = kind
    summed = sum(whole[start : start + 148]) + 8 * 32 + sum(whole[start + 156 : start + BLOCK])
    whole[start + 148 : start + 156] = b"%06o\0 " % summed
    use(tmp_path_factory.getbasetemp(), "b.tar", bytes(whole))


@given(data=st.data())
def test_a_mutated_compressed_tar(tmp_path_factory, data):
    """Damaged within, or as a file."""
    pack = data.draw(st.sampled_from([gzip.compress, bz2.compress, lzma.compress]))
    whole = tar_of(FILES)
    within = data.draw(st.booleans())
    packed = pack(data.draw(mutated([whole], NAMES))) if within else data.draw(mutated([pack(whole)]))
    use(tmp_path_factory.getbasetemp(), "c.tar", packed)


@given(data=st.data())
def test_a_mutated_zip(tmp_path_factory, data):
    methods = [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA]
    use(tmp_path_factory.getbasetemp(), "d.zip", data.draw(mutated([zip_of(FILES, m) for m in methods], NAMES)))


@given(data=st.data())
def test_a_zip_whose_directory_says_other_things(tmp_path_factory, data):
    """Every checksum is right, so that the facts of its members are believed."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in FILES.items():
            info = zipfile.ZipInfo(name)
            archive.writestr(info, content)
            kind = data.draw(st.sampled_from(["none", "name", "mode", "flags", "method", "size", "extra"]))
            if kind == "name":
                info.filename = data.draw(mutated([name.encode()], NAMES)).decode("utf-8", "replace")
            elif kind == "mode":
                info.external_attr = data.draw(st.integers(0, 2**32 - 1))
            elif kind == "flags":
                info.flag_bits ^= 1 << data.draw(st.integers(0, 15))
            elif kind == "method":
                info.compress_type = data.draw(st.sampled_from([0, 1, 6, 8, 9, 12, 14, 93, 95, 98]))
            elif kind == "size":
                field = data.draw(st.sampled_from(["file_size", "compress_size", "header_offset"]))
                setattr(info, field, data.draw(st.sampled_from(NUMBERS[:-4]) | st.integers(0, 300)))
            elif kind == "extra":
                info.extra = data.draw(st.binary(max_size=30))
    use(tmp_path_factory.getbasetemp(), "f.zip", out.getvalue())


@given(data=st.data())
def test_mutated_images_in_a_whole_archive(tmp_path_factory, data):
    name = data.draw(st.sampled_from(list(FILES)))
    changed = {**FILES, name: data.draw(mutated(list(FILES.values())))}
    pack = data.draw(st.sampled_from([zip_of, tar_of]))
    use(tmp_path_factory.getbasetemp(), "e", pack(changed))


# --- bombs: little files that unpack to much -------------------------------------------------------------------

MEGABYTE = 2**20


def refused_as(folder, name: str, data: bytes, text: str) -> None:
    with pytest.raises(AssetError, match=text):
        load(written(folder / name, data))


def zip_of_copies(content: bytes, count: int, level: int) -> bytes:
    """`count` members of one content, deflated once."""
    deflate = zlib.compressobj(level, zlib.DEFLATED, -15)
    packed = deflate.compress(content) + deflate.flush()
    out = io.BytesIO()
    archive = zipfile.ZipFile(out, "w")
    for k in range(count):
        info = zipfile.ZipInfo(f"cat/{k:03d}.png")
        info.compress_type, info.CRC = zipfile.ZIP_DEFLATED, zlib.crc32(content)
        info.compress_size, info.file_size, info.header_offset = len(packed), len(content), out.tell()
        out.write(info.FileHeader() + packed)
        archive.filelist.append(info)
    archive.start_dir, archive._didModify = out.tell(), True
    archive.close()
    return out.getvalue()


def test_a_zip_of_zeros(tmp_path):
    refused_as(
        tmp_path, "bomb.zip", zip_of_copies(bytes(16 * MEGABYTE), 100, 1), "cat/000.png unpacks to more than 100 times"
    )


def test_members_that_are_large_are_not_read_far_ahead(tmp_path):
    """100 × 16 MB that pack 60 to 1: each may be, together they must not be in memory."""
    noise = np.random.default_rng(0).bytes(MEGABYTE // 4)
    whole = zip_of_copies(noise + bytes(16 * MEGABYTE), 100, 1)
    refused_as(tmp_path, "many.zip", whole, "cat/000.png is not an image")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_tar_of_zeros(tmp_path, pack):
    whole = pack(tar_of({f"cat/{k}.txt": bytes(MEGABYTE) for k in range(16)}))
    refused_as(tmp_path, "bomb.tar", whole, "unpacks to more than 100 times")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_tar_header_of_a_gigabyte(tmp_path, kind):
    info = tarfile.TarInfo("a")
    info.type, info.size = kind, 2**30
    whole = gzip.compress(info.tobuf() + bytes(4 * MEGABYTE))
    refused_as(tmp_path, "header.tar", whole, "it is damaged")
