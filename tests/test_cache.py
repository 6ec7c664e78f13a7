"""Decoded images are kept in a file: what is read from it is what decoding gives, whatever happens to the file."""

import errno
import multiprocessing
import os
import pickle
import resource
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from image_helpers import PACKERS, encoded, folder_of, load, pixels, png, written
from running import tiny_config, until

from meanflow.data import DataConfig, cache, dataset, load_dataset
from meanflow.data.dataset import cache_of
from meanflow.errors import AssetError, ConfigError
from meanflow.training.estimate import data_line
from meanflow.training.setup import describe

FILES = {f"{name}/{k}.png": png(k + 10 * len(name)) for name in ("ant", "bumblebee") for k in range(4)}


@pytest.fixture
def kept(tmp_path):
    """`kept(path, …)` loads with a cache, and says whether images were decoded."""
    decoded = []

    def kept(path, **settings):
        before = len(decoded)
        data = load(path, cache=str(tmp_path / "kept"), **settings)
        return data, len(decoded) > before

    original = dataset.load_images
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dataset, "load_images", lambda *a: decoded.append(a) or original(*a))
        yield kept


def files(tmp_path) -> list[Path]:
    return sorted((tmp_path / "kept").iterdir()) if (tmp_path / "kept").exists() else []


def same(a, b) -> bool:
    labels = a.labels is b.labels if a.labels is None or b.labels is None else torch.equal(a.labels, b.labels)
    return torch.equal(a.images, b.images) and labels and a.class_names == b.class_names and describe(a) == describe(b)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar.gz"])
def test_what_is_kept_is_what_was_decoded(tmp_path, kept, kind, logged):
    path = PACKERS[kind](FILES, tmp_path)
    plain = load(path, cache=None)
    assert not files(tmp_path)
    first, second, third = kept(path), kept(path), kept(path)
    assert (first[1], second[1], third[1]) == (True, False, False)
    assert same(first[0], plain) and same(second[0], plain)
    (file,) = files(tmp_path)
    assert logged.messages == [f"decoded images are kept in {file} (0 MB); it may be deleted"]
    assert second[0].known_sha256 == plain.sha256 and plain.known_sha256 is None
    assert second[0].images.data_ptr() == third[0].images.data_ptr()  # mapped and checked once in a process


def test_a_flat_folder_has_no_labels(tmp_path, kept):
    path = folder_of({"1.png": png(1), "2.png": png(2)}, tmp_path / "flat")
    (a, _), (b, again) = kept(path), kept(path)
    assert same(a, b) and not again and b.labels is None and b.class_names == ()


def test_names_that_are_no_text(tmp_path, kept):
    path = tmp_path / os.fsdecode(b"\xff\n" + b"long" * 60)
    written(path / os.fsdecode(b"\xff") / "1.png", png())
    (a, _), (b, again) = kept(path), kept(path)
    assert same(a, b) and not again and files(tmp_path)[0].name.isascii()


def with_old_times(path: Path, data: bytes) -> None:
    """Another content of the same size and the same modification time, as unpacking an archive can leave it."""
    status = path.stat()
    assert len(data) == status.st_size
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def bitmap(key: int) -> bytes:
    return encoded(pixels(key), "BMP")


CHANGES = {
    "content": lambda path: with_old_times(path / "ant" / "0.bmp", bitmap(99)),
    "added": lambda path: written(path / "ant" / "9.bmp", bitmap(9)),
    "removed": lambda path: (path / "bee" / "1.bmp").unlink(),
    "renamed": lambda path: (path / "bee" / "1.bmp").rename(path / "bee" / "7.bmp"),
    "moved": lambda path: (path / "bee" / "1.bmp").rename(path / "ant" / "7.bmp"),
    "class": lambda path: (path / "bee").rename(path / "wasp"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_decoded_again(tmp_path, kept, change):
    path = folder_of({f"{name}/{k}.bmp": bitmap(k) for name in ("ant", "bee") for k in range(3)}, tmp_path / "images")
    kept(path)
    CHANGES[change](path)
    (data, again), (_, once_more) = kept(path), kept(path)
    assert again and not once_more and same(data, load(path, cache=None))
    assert len(files(tmp_path)) == 1  # the old one is replaced


def test_a_changed_archive_is_decoded_again(tmp_path, kept):
    path = PACKERS["zip"](FILES, tmp_path)
    kept(path)
    PACKERS["zip"](dict(list(FILES.items())[1:]), tmp_path)
    data, again = kept(path)
    assert again and len(data) == 7


def test_an_empty_class_folder_is_refused_with_a_cache_too(tmp_path, kept):
    path = folder_of(FILES, tmp_path / "images")
    kept(path)
    (path / "wasp").mkdir()
    with pytest.raises(AssetError, match="wasp/ is a class folder without images"):
        kept(path)


def test_each_setting_has_its_own_file(tmp_path, kept):
    both = {f"{split}/{name}": data for split in ("train", "test") for name, data in FILES.items()}
    path = folder_of(both, tmp_path / "images")
    ways = [{}, {"split": "test"}, {"resize": "crop"}, {"resize": "crop", "size": 4}, {"resize": "crop", "channels": 1}]
    found = [kept(path, **how)[0] for how in ways]
    assert len(files(tmp_path)) == len(ways) and all(not kept(path, **how)[1] for how in ways)
    assert all(same(data, kept(path, **how)[0]) for data, how in zip(found, ways, strict=True))
    shutil.copytree(path, tmp_path / "other" / "images")
    assert kept(tmp_path / "other" / "images")[1] and len(files(tmp_path)) == len(ways) + 1


def test_a_cache_damaged_anywhere_is_made_again_with_one_warning(tmp_path, kept, logged):
    path = folder_of(FILES, tmp_path / "images")
    plain, _ = kept(path)
    (file,) = files(tmp_path)
    whole = file.read_bytes()
    ends = [0, 1, len(cache.MAGIC), 30, cache.PREFIX.size + 5, 3000, 4096, len(whole) - 1]
    broken = [whole[:end] for end in ends] + [whole + b"\0", b"junk" * 2000]
    places = (0, 9, 20, cache.PREFIX.size + 3, cache.PREFIX.size + 200, 4096, len(whole) - 1)
    broken += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in places]
    for data in broken:
        file.unlink()
        file.write_bytes(data)
        logged.clear()
        found, again = kept(path)
        assert again and same(found, plain) and file.read_bytes() == whole
        warnings = [record.getMessage() for record in logged.records if record.levelname == "WARNING"]
        assert len(warnings) == 1 and warnings[0].startswith(f"{file} cannot be used (")
    (tmp_path / "kept" / "folder").mkdir()  # of another program: left alone
    file.unlink()
    file.mkdir()
    logged.clear()
    found, again = kept(path)
    assert again and same(found, plain) and "Is a directory" in logged.text


def refuse(*arguments, **how):
    raise OSError(errno.EROFS, os.strerror(errno.EROFS))


@pytest.mark.parametrize("how", ["full", "read-only", "little space", "a file in the way"])
def test_where_nothing_can_be_kept_training_goes_on(tmp_path, kept, logged, monkeypatch, how):
    path = folder_of(FILES, tmp_path / "images")
    plain = load(path, cache=None)
    largest = resource.getrlimit(resource.RLIMIT_FSIZE)
    if how == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4200, largest[1]))  # the header fits
    elif how == "read-only":
        monkeypatch.setattr(Path, "mkdir", refuse)
    elif how == "little space":
        monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: SimpleNamespace(free=2**31))
    else:
        (tmp_path / "kept").write_text("")
    try:
        found, _ = kept(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, largest)
    assert same(found, plain)
    (line,) = logged.messages
    assert "data.cache" in line and "\n" not in line and "run the same command again" not in line
    assert not (tmp_path / "kept").is_dir() or not files(tmp_path)


def test_auto_keeps_what_is_slow_beside_the_downloads(tmp_path, monkeypatch):
    path = folder_of(FILES, tmp_path / "images")
    config = DataConfig(path=str(path), root=str(tmp_path / "data"))
    first = load_dataset(config, 8, 3)
    assert config.cache == "auto" and not (tmp_path / "data").exists()
    monkeypatch.setattr(dataset, "SLOW_S", 0.0)
    load_dataset(config, 8, 3)
    (file,) = (tmp_path / "data" / "cache").iterdir()
    assert file.name.startswith("images-8x8x3-") and cache_of(config, 8, 3).file == file
    monkeypatch.setattr(dataset, "load_images", None)
    assert same(load_dataset(config, 8, 3), first)


def test_processes_share_the_pixels(tmp_path, kept):
    """They are a private mapping of the file, which costs memory only where it is written to: nowhere."""
    path = folder_of(FILES, tmp_path / "images")
    kept(path)
    data, _ = kept(path)
    (file,) = files(tmp_path)
    lines = Path("/proc/self/maps").read_text().splitlines()
    ranges = [line.split()[0].split("-") for line in lines if line.endswith(str(file))]
    assert any(int(a, 16) <= data.images.data_ptr() < int(b, 16) for a, b in ranges)


def load_in_a_process(path: Path, folder: Path, stop: bool = False) -> multiprocessing.Process:
    def work() -> None:
        if stop:  # with everything written, and not in its place yet
            os.replace = lambda *names: time.sleep(60)
        load(path, cache=str(folder))

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    return process


def test_killed_while_writing_and_several_at_a_time(tmp_path):
    path, folder = folder_of(FILES, tmp_path / "images"), tmp_path / "kept"
    killed = load_in_a_process(path, folder, stop=True)
    until(lambda: list(folder.glob("*.tmp")))
    killed.kill()
    killed.join()
    assert len(list(folder.glob("*.tmp"))) == 1
    several = [load_in_a_process(path, folder) for _ in range(4)]
    for process in several:
        process.join(60)
    assert [process.exitcode for process in several] == [0] * 4
    (file,) = folder.iterdir()
    found = load(path, cache=str(folder))
    assert file.suffix == ".images" and found.known_sha256 and same(found, load(path, cache=None))


def test_the_error_of_an_unfit_image_travels_between_processes(tmp_path):
    path = folder_of({"1.png": png(size=9)}, tmp_path / "images")
    with pytest.raises(AssetError) as caught:
        load(path)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_a_dry_run_opens_only_the_header(tmp_path):
    path, folder = PACKERS["tar.gz"](FILES, tmp_path), str(tmp_path / "kept")
    config = tiny_config(data__path=str(path), data__cache=folder, model__channels=3, model__classes=2)
    assert data_line(config) == f"8 images of 2 classes in {path}"
    load(path, cache=folder)
    (file,) = files(tmp_path)
    assert data_line(config) == f"8 images of 2 classes in {path}, decoded in {file}"
    with pytest.raises(ConfigError, match=r"model\.classes is 3, but the data have 2"):
        data_line(tiny_config(data__path=str(path), data__cache=folder, model__channels=3, model__classes=3))
