"""Checkpoints that are damaged, foreign, missing, or cut short by a full disk."""

import errno
import json
import os
import pickle
import random
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from meanflow.errors import AssetError
from meanflow.training import checkpoint as module
from meanflow.training.checkpoint import (
    FORMAT,
    Checkpoint,
    checkpoint_path,
    file_sha256,
    list_checkpoints,
    load_checkpoint,
    load_newest,
    prune_checkpoints,
    save_checkpoint,
)


def made(step: int = 1) -> Checkpoint:
    def numbers(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(step))

    weights = {"a.weight": numbers(3, 2, 3, 3).contiguous(memory_format=torch.channels_last), "b": numbers(5)}
    moments = {name: {"exp_avg": value * 2, "exp_avg_sq": value * 3} for name, value in weights.items()}
    optimizer = {name: {"step": torch.tensor(float(step)), **values} for name, values in moments.items()}
    meta = {"format": FORMAT, "step": step, "config": {"description": "ω, 8×8"}, "seconds": 0.1}
    meta |= {"images": 8 * step, "data": {"images": 9, "sha256": "0"}}
    return Checkpoint(weights, {"0.9": {name: value + 1 for name, value in weights.items()}}, optimizer, meta)


def save(folder: Path, *steps: int) -> list[Path]:
    return [save_checkpoint(folder, step, made(step)) for step in steps]


def assert_equal(a, b) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
    else:
        assert a == b


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    for name in ("model", "ema", "optimizer", "meta"):
        assert_equal(getattr(a, name), getattr(b, name))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- there and back --------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_is_loaded(tmp_path):
    (path,) = save(tmp_path / "new" / "folder", 7)
    assert path == checkpoint_path(tmp_path / "new" / "folder", 7)
    assert_same(load_checkpoint(path), made(7))
    assert names(path.parent) == ["00000007.json", "00000007.pt"]


def test_it_loads_without_this_package(tmp_path):
    """Tensors and JSON, as the README promises; the JSON beside it describes the file."""
    (path,) = save(tmp_path, 7)
    content = torch.load(path, weights_only=True)
    assert json.loads(content["meta"]) == made(7).meta
    summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert summary["sha256"] == file_sha256(path) and summary["bytes"] == path.stat().st_size
    assert summary["step"] == 7 and summary["config"] == made(7).meta["config"]


def test_a_file_carried_away_alone_still_loads(tmp_path):
    (path,) = save(tmp_path, 7)
    lone = shutil.copy(path, tmp_path / "lone.pt")
    assert_same(load_checkpoint(Path(lone)), made(7))


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 7, made(1))
    save_checkpoint(tmp_path, 7, made(2))
    assert_same(load_checkpoint(checkpoint_path(tmp_path, 7)), made(2))


def test_order_is_by_step_not_by_name(tmp_path):
    paths = save(tmp_path, 99_999_999, 100_000_000, 5)
    assert list_checkpoints(tmp_path) == [paths[2], paths[0], paths[1]]
    assert load_newest(tmp_path)[0] == paths[1]


def test_strangers_in_the_folder_are_left_alone(tmp_path):
    (path,) = save(tmp_path, 3)
    for name in ("00000003 (copy)", "3b", "best", "notes"):
        shutil.copy(path, tmp_path / f"{name}.pt")
        shutil.copy(path.with_suffix(".json"), tmp_path / f"{name}.json")
    before = names(tmp_path)
    save(tmp_path, 4)
    prune_checkpoints(tmp_path, step=4, keep=2, milestone_every=None)
    assert list_checkpoints(tmp_path) == [path, checkpoint_path(tmp_path, 4)]
    assert set(before) <= set(names(tmp_path))


# --- damage ----------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # inside a tensor: PyTorch alone would not notice
    path.write_bytes(data)


def remove(path: Path) -> None:
    path.unlink()


def garble_json(path: Path) -> None:
    path.with_suffix(".json").write_text('{"sha256": ')


def empty_json(path: Path) -> None:
    path.with_suffix(".json").write_text("")


def other_json(path: Path) -> None:
    path.with_suffix(".json").write_text("[1]")


def remove_json(path: Path) -> None:
    path.with_suffix(".json").unlink()


def become_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


DAMAGE = [truncate, empty, flip_a_bit, remove, garble_json, empty_json, other_json, remove_json, become_a_folder]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_one_before_saying_so(tmp_path, damage):
    older, newer = save(tmp_path, 3, 4)
    damage(newer)
    path, found, complaints = load_newest(tmp_path)
    assert path == older
    assert_same(found, made(3))
    (complaint,) = complaints
    assert str(newer) in complaint or str(newer.with_suffix(".json")) in complaint
    assert "\n" not in complaint and len(complaint) < 400


def test_several_damaged_ones_are_passed_over(tmp_path):
    paths = save(tmp_path, 1, 2, 3)
    flip_a_bit(paths[2])
    truncate(paths[1])
    path, found, complaints = load_newest(tmp_path)
    assert path == paths[0] and len(complaints) == 2 and "00000003" in complaints[0]
    assert_same(found, made(1))


@pytest.mark.parametrize("damage", DAMAGE)
def test_all_damaged_is_an_error_not_a_fresh_start(tmp_path, damage):
    for path in save(tmp_path, 3, 4):
        damage(path)
    with pytest.raises(AssetError, match="no intact checkpoint") as caught:
        load_newest(tmp_path)
    assert "00000003" in str(caught.value) and "00000004" in str(caught.value) and "\n" not in str(caught.value)


def test_no_checkpoint_at_all_is_a_fresh_start(tmp_path):
    assert load_newest(tmp_path) is None
    assert load_newest(tmp_path / "not there") is None


def test_a_save_that_was_killed_before_its_end_does_not_count(tmp_path):
    """Each moment of a save at which a kill can strike: the checkpoint before stays the newest."""
    (older,) = save(tmp_path, 3)
    (tmp_path / "00000004.pt.tmp").write_bytes(b"half")
    assert load_newest(tmp_path)[0] == older
    assert not load_newest(tmp_path)[2], "temporary files are no damage"
    (tmp_path / "00000004.json.tmp").write_text("{}")
    assert load_newest(tmp_path)[0] == older
    (newer,) = save(tmp_path, 4)
    newer.with_suffix(".json").unlink()  # killed between the two renames
    assert load_newest(tmp_path)[0] == older


def test_random_bit_flips_without_a_checksum_never_crash(tmp_path):
    """A file carried away alone: whatever the damage, one line or a checkpoint, never another exception."""
    (path,) = save(tmp_path, 7)
    whole, random_ = path.read_bytes(), random.Random(0)
    lone, refused = tmp_path / "lone.pt", 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(random_.randint(1, 3)):
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        lone.write_bytes(data[: random_.randrange(len(data))] if random_.random() < 0.2 else data)
        try:
            load_checkpoint(lone)
        except AssetError as error:
            refused += 1
            assert str(lone) in str(error) and "\n" not in str(error)
    assert refused > 50


class Trap:
    """Runs code when unpickled by a careless reader."""

    def __init__(self, mark: Path):
        self.mark = str(mark)

    def __reduce__(self):
        return (os.mkdir, (self.mark,))


def foreign_files(folder: Path) -> dict[str, Path]:
    folder.mkdir()
    mark = folder.parent / "code was run"
    contents = {
        "text.pt": b"hello\n",
        "empty.pt": b"",
        "zip.pt": b"PK\x03\x04" + bytes(100),
        "json.pt": b'{"format": 1}',
        "pickle.pt": pickle.dumps({"meta": "{}"}),
        "trap.pt": pickle.dumps(Trap(mark)),
        "trap2.pt": pickle.dumps({"meta": json.dumps({"format": FORMAT}), "model": Trap(mark)}),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    objects = {
        "tensor.pt": torch.zeros(3),
        "scalar.pt": torch.tensor(1.0),
        "list.pt": [1, 2],
        "number.pt": 3,
        "weights.pt": {"a": torch.zeros(2)},
        "meta-number.pt": {"meta": 3},
        "meta-list.pt": {"meta": "[1]"},
        "meta-text.pt": {"meta": "{"},
        "no-model.pt": {"meta": json.dumps({"format": FORMAT})},
        "future.pt": {"meta": json.dumps({"format": FORMAT + 1})},
        "model-list.pt": {"meta": json.dumps({"format": FORMAT}), "model": [1], "ema": {}, "optimizer": {}},
        "torch-trap.pt": {"meta": json.dumps({"format": FORMAT}), "model": Trap(mark), "ema": {}, "optimizer": {}},
    }
    for name, content in objects.items():
        torch.save(content, folder / name)
    return {path.name: path for path in folder.iterdir()}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_files_are_refused_in_one_line_and_run_no_code(tmp_path):
    for name, path in foreign_files(tmp_path / "foreign").items():
        with pytest.raises(AssetError) as caught:
            load_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500, (name, message)
    assert not (tmp_path / "code was run").exists()
    pickle.loads((tmp_path / "foreign" / "trap.pt").read_bytes())
    assert (tmp_path / "code was run").exists(), "the trap does not work, so the test above shows nothing"


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(AssetError, match=r"none\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")


def test_another_format_names_both(tmp_path):
    future = replace(made(), meta={**made().meta, "format": 9})
    path = save_checkpoint(tmp_path, 1, future)
    with pytest.raises(AssetError, match=rf"format 9, this version reads {FORMAT}"):
        load_checkpoint(path)


# --- a full disk -----------------------------------------------------------------------------------------------


class FullAfter:
    """open() for a disk with `room` bytes left."""

    def __init__(self, room: int, reason: int = errno.ENOSPC):
        self.room, self.reason, self.open = room, reason, open

    def __call__(self, path, mode="r", **options):
        file = self.open(path, mode, **options)
        if "w" not in mode:
            return file
        write, disk = file.write, self

        class Full:
            def __enter__(self):
                return self

            def __exit__(self, *exc_info):
                file.close()

            def write(self, data):
                size = len(data)
                if size > disk.room:
                    write(data[: disk.room])
                    disk.room = 0
                    raise OSError(disk.reason, os.strerror(disk.reason))
                disk.room -= size
                return write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()


def test_a_full_disk_at_any_byte_leaves_the_earlier_checkpoints(tmp_path, monkeypatch):
    (older,) = save(tmp_path, 3)
    needed = older.stat().st_size + older.with_suffix(".json").stat().st_size
    rooms = [0, 1, 63, 64, needed // 4, needed // 2, older.stat().st_size - 1, older.stat().st_size, needed - 1]
    for room in rooms:
        monkeypatch.setattr(module, "open", FullAfter(room), raising=False)
        with pytest.raises(AssetError) as caught:
            save_checkpoint(tmp_path, 4, made(4))
        monkeypatch.undo()
        message = str(caught.value)
        assert "step 4" in message and "No space left on device" in message and "\n" not in message, (room, message)
        assert "earlier ones are intact" in message and len(message) < 500
        assert names(tmp_path) == ["00000003.json", "00000003.pt"], room
        assert_same(load_newest(tmp_path)[1], made(3))
    monkeypatch.setattr(module, "open", FullAfter(2 * needed), raising=False)
    assert_same(load_checkpoint(save_checkpoint(tmp_path, 4, made(4))), made(4))


@pytest.mark.parametrize("reason", [errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_disk_that_refuses_for_another_reason(tmp_path, monkeypatch, reason):
    """A quota, a file system that turned read-only, a failing device, a server that is gone."""
    save(tmp_path, 3)
    monkeypatch.setattr(module, "open", FullAfter(1000, reason), raising=False)
    with pytest.raises(AssetError, match=rf"step 4 could not be saved \({os.strerror(reason)}\); earlier ones"):
        save_checkpoint(tmp_path, 4, made(4))
    monkeypatch.undo()
    assert_same(load_newest(tmp_path)[1], made(3))


def test_a_full_disk_while_replacing_keeps_the_old_file(tmp_path, monkeypatch):
    save(tmp_path, 3)
    monkeypatch.setattr(module, "open", FullAfter(1000), raising=False)
    with pytest.raises(AssetError):
        save_checkpoint(tmp_path, 3, made(9))
    monkeypatch.undo()
    assert_same(load_newest(tmp_path)[1], made(3))


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"could not be saved \((File exists|Not a directory)\)"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, made())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/dev/full is Linux's")
def test_a_disk_that_is_full_for_real(tmp_path):
    """/dev/full behaves as a full disk does; the write goes through the kernel."""
    save(tmp_path, 3)
    (tmp_path / "00000004.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(AssetError, match="No space left on device"):
        save_checkpoint(tmp_path, 4, made(4))
    assert names(tmp_path) == ["00000003.json", "00000003.pt"]
    assert_same(load_newest(tmp_path)[1], made(3))


# --- pruning ---------------------------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return [int(path.stem) for path in list_checkpoints(folder)]


def test_pruning_keeps_the_newest_and_the_milestones(tmp_path):
    save(tmp_path, *range(1, 10))
    prune_checkpoints(tmp_path, step=9, keep=2, milestone_every=4)
    assert steps(tmp_path) == [4, 8, 9]
    assert names(tmp_path) == [f"{step:08d}.{kind}" for step in (4, 8, 9) for kind in ("json", "pt")]


def test_pruning_without_milestones(tmp_path):
    save(tmp_path, *range(1, 6))
    prune_checkpoints(tmp_path, step=5, keep=1, milestone_every=None)
    assert steps(tmp_path) == [5]
    prune_checkpoints(tmp_path, step=5, keep=3, milestone_every=None)
    assert steps(tmp_path) == [5]


def test_pruning_removes_what_an_interrupted_save_or_prune_left(tmp_path):
    old, _, newest = save(tmp_path, 1, 5, 6)
    old.with_suffix(".json").unlink()  # killed while pruning: the JSON goes first
    (tmp_path / "00000004.pt.tmp").write_bytes(b"half")
    (tmp_path / "00000004.json.tmp").write_bytes(b"half")
    prune_checkpoints(tmp_path, step=6, keep=2, milestone_every=None)
    assert names(tmp_path) == [f"{step:08d}.{kind}" for step in (5, 6) for kind in ("json", "pt")]
    assert load_newest(tmp_path)[0] == newest


def test_pruning_never_deletes_what_was_just_saved(tmp_path):
    """A run that fell back from a damaged checkpoint saves *before* it: that one must stay, and be the newest."""
    paths = save(tmp_path, 5, 10)
    flip_a_bit(paths[1])
    assert load_newest(tmp_path)[0] == paths[0]
    (just_saved,) = save(tmp_path, 7)
    prune_checkpoints(tmp_path, step=7, keep=1, milestone_every=5)
    path, found, complaints = load_newest(tmp_path)
    assert path == just_saved and not complaints
    assert_same(found, made(7))
