"""Checkpoints that are damaged, foreign, missing, or cut short by a full disk."""

import errno
import json
import os
import pickle
import random
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import differences

from meanflow.errors import AssetError
from meanflow.files import sha256_file
from meanflow.training import checkpoint as module
from meanflow.training.checkpoint import (
    FORMAT,
    PARTS,
    Checkpoint,
    checkpoint_path,
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


def assert_is(found: Checkpoint, expected: Checkpoint) -> None:
    for part in (*PARTS, "meta"):
        assert differences(getattr(found, part), getattr(expected, part)) == []


def assert_newest(folder: Path, step: int, complaints: int = 0) -> list[str]:
    """What `load_newest` gives is the checkpoint of this step; the complaints about others, so many, a line each."""
    path, found, lines = load_newest(folder)
    assert path == checkpoint_path(folder, step) and len(lines) == complaints
    assert_is(found, made(step))
    assert not [line for line in lines if "\n" in line or len(line) > 400]
    return lines


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def files_of(*steps: int) -> list[str]:
    return [f"{step:08d}.{kind}" for step in steps for kind in ("json", "pt")]


# --- there and back --------------------------------------------------------------------------------------------


def test_a_checkpoint_loads_as_it_was_saved(tmp_path):
    """By this package and without it: tensors and JSON; the JSON beside the file describes it."""
    folder = tmp_path / "new" / "folder"
    (path,) = save(folder, 7)
    assert path == checkpoint_path(folder, 7) and names(folder) == files_of(7)
    assert_is(load_checkpoint(path), made(7))
    assert json.loads(torch.load(path, weights_only=True)["meta"]) == made(7).meta
    summary = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    assert summary == {"sha256": sha256_file(path), "bytes": path.stat().st_size, **made(7).meta}
    lone = Path(shutil.copy(path, tmp_path / "lone.pt"))
    assert_is(load_checkpoint(lone), made(7))
    save_checkpoint(folder, 7, made(2))
    assert_is(load_checkpoint(path), made(2))


def test_order_is_by_step_not_by_name(tmp_path):
    assert load_newest(tmp_path) is None and load_newest(tmp_path / "not there") is None
    paths = save(tmp_path, 99_999_999, 100_000_000, 5)
    assert list_checkpoints(tmp_path) == [paths[2], paths[0], paths[1]]
    assert_newest(tmp_path, 100_000_000)


def test_files_with_other_names_are_left_alone(tmp_path):
    (path,) = save(tmp_path, 3)
    for name in ("00000003 (copy)", "3b", "best", "notes"):
        shutil.copy(path, tmp_path / f"{name}.pt")
        shutil.copy(path.with_suffix(".json"), tmp_path / f"{name}.json")
    before = names(tmp_path)
    save(tmp_path, 4)
    prune_checkpoints(tmp_path, step=4, keep=2, milestone_every=None)
    assert names(tmp_path) == sorted(before + files_of(4))
    assert list_checkpoints(tmp_path) == [path, checkpoint_path(tmp_path, 4)]


# --- damage ----------------------------------------------------------------------------------------------------


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4  # inside a tensor: PyTorch alone would not notice
    path.write_bytes(data)


DAMAGE = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "emptied": lambda path: os.truncate(path, 0),
    "a bit flipped": flip_a_bit,
    "removed": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "JSON torn": lambda path: path.with_suffix(".json").write_text('{"sha256": '),
    "JSON empty": lambda path: path.with_suffix(".json").write_text(""),
    "JSON of another kind": lambda path: path.with_suffix(".json").write_text("[1]"),
    "JSON removed": lambda path: path.with_suffix(".json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_falls_back_to_the_one_before_and_all_damaged_is_an_error(tmp_path, damage):
    older, newer = save(tmp_path, 3, 4)
    DAMAGE[damage](newer)
    (complaint,) = assert_newest(tmp_path, 3, complaints=1)
    assert str(newer) in complaint or str(newer.with_suffix(".json")) in complaint
    DAMAGE[damage](older)
    with pytest.raises(AssetError, match=r"no intact checkpoint.*00000004.*00000003") as caught:
        load_newest(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_save_that_was_killed_before_its_end_does_not_count(tmp_path):
    """Each moment of a save at which a kill can strike: the checkpoint before remains the newest."""
    save(tmp_path, 3)
    for name in ("00000004.pt.tmp", "00000004.json.tmp"):
        (tmp_path / name).write_bytes(b"half")
        assert_newest(tmp_path, 3)
    (newer,) = save(tmp_path, 4)
    newer.with_suffix(".json").unlink()  # killed between the two renames
    assert_newest(tmp_path, 3, complaints=1)


def test_random_bit_flips_without_a_checksum_never_crash(tmp_path):
    """A file without its JSON: whatever the damage, one line or a checkpoint, never another exception."""
    whole, chance = save(tmp_path, 7)[0].read_bytes(), random.Random(0)
    lone, refused = tmp_path / "lone.pt", 0
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        lone.write_bytes(data[: chance.randrange(len(data))] if chance.random() < 0.2 else data)
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


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_files_are_refused_in_one_line_and_run_no_code(tmp_path):
    mark, ours = tmp_path / "code was run", {"meta": json.dumps({"format": FORMAT})}
    raw = [b"hello\n", b"", b"PK\x03\x04" + bytes(100), b'{"format": 1}', pickle.dumps({"meta": "{}"})]
    raw += [pickle.dumps(Trap(mark)), pickle.dumps({**ours, "model": Trap(mark)})]
    objects = [torch.zeros(3), torch.tensor(1.0), [1, 2], 3, {"a": torch.zeros(2)}]
    objects += [{"meta": meta} for meta in (3, "[1]", "{", json.dumps({"format": FORMAT + 1}))]
    objects += [ours, *({**ours, "ema": {}, "optimizer": {}, "model": model} for model in ([1], Trap(mark)))]
    path = tmp_path / "foreign.pt"
    for content in (*raw, *objects):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        with pytest.raises(AssetError) as caught:
            load_checkpoint(path)
        message = str(caught.value)
        assert message.startswith(f"{path}: ") and "\n" not in message and len(message) < 500, (content, message)
    assert not mark.exists()
    pickle.loads(pickle.dumps(Trap(mark)))
    assert mark.exists(), "the trap does not work, so the test above shows nothing"


def test_a_missing_file_and_another_format_say_so(tmp_path):
    with pytest.raises(AssetError, match=r"none\.pt: no such checkpoint"):
        load_checkpoint(tmp_path / "none.pt")
    path = save_checkpoint(tmp_path, 1, replace(made(), meta={**made().meta, "format": 9}))
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
                if len(data) > disk.room:
                    write(data[: disk.room])
                    disk.room = 0
                    raise OSError(disk.reason, os.strerror(disk.reason))
                disk.room -= len(data)
                return write(data)

            def __getattr__(self, name):
                return getattr(file, name)

        return Full()


# A full disk, a quota, a file system that turned read-only, a failing device, a server that is gone.
REASONS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


@pytest.mark.parametrize("step", [4, 3], ids=["a new step", "a step saved again"])
@pytest.mark.parametrize("reason", REASONS, ids=errno.errorcode.get)
def test_a_disk_that_refuses_at_any_byte_leaves_the_earlier_checkpoints(tmp_path, monkeypatch, reason, step):
    (older,) = save(tmp_path, 3)
    data = older.stat().st_size
    needed = data + older.with_suffix(".json").stat().st_size
    for room in (0, 1, 63, 64, needed // 4, needed // 2, data - 1, data, needed - 1):
        monkeypatch.setattr(module, "open", FullAfter(room, reason), raising=False)
        expected = rf"step {step} could not be saved \({re.escape(os.strerror(reason))}\); earlier ones are intact"
        with pytest.raises(AssetError, match=expected) as caught:
            save_checkpoint(tmp_path, step, made(4))
        monkeypatch.undo()
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
        assert names(tmp_path) == files_of(3), room
        assert_newest(tmp_path, 3)
    monkeypatch.setattr(module, "open", FullAfter(2 * needed), raising=False)
    assert_is(load_checkpoint(save_checkpoint(tmp_path, 4, made(4))), made(4))


def test_a_folder_that_cannot_be_made_and_a_disk_that_is_full_for_real(tmp_path):
    """/dev/full behaves as a full disk does; the write goes through the kernel."""
    (tmp_path / "file").write_text("")
    with pytest.raises(AssetError, match=r"could not be saved \((File exists|Not a directory)\)"):
        save_checkpoint(tmp_path / "file" / "checkpoints", 1, made())
    save(tmp_path / "run", 3)
    (tmp_path / "run" / "00000004.pt.tmp").symlink_to("/dev/full")
    with pytest.raises(AssetError, match="No space left on device"):
        save_checkpoint(tmp_path / "run", 4, made(4))
    assert names(tmp_path / "run") == files_of(3)


# --- pruning ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keep", "milestone_every", "left"),
    [(2, 4, (4, 8, 9)), (1, None, (9,)), (3, None, (7, 8, 9)), (20, 1, range(1, 10))],
)
def test_pruning_keeps_the_newest_and_the_milestones(tmp_path, keep, milestone_every, left):
    save(tmp_path, *range(1, 10))
    for _ in range(2):
        prune_checkpoints(tmp_path, 9, keep, milestone_every)
        assert names(tmp_path) == files_of(*left)


def test_pruning_removes_what_an_interrupted_save_or_prune_left(tmp_path):
    old, *_ = save(tmp_path, 1, 5, 6)
    old.with_suffix(".json").unlink()  # killed while pruning: the JSON goes first
    for kind in ("pt", "json"):
        (tmp_path / f"00000004.{kind}.tmp").write_bytes(b"half")
    prune_checkpoints(tmp_path, step=6, keep=2, milestone_every=None)
    assert names(tmp_path) == files_of(5, 6)
    assert_newest(tmp_path, 6)


def test_pruning_never_deletes_what_was_just_saved(tmp_path):
    """A run that fell back from a damaged checkpoint saves *before* it: that one must stay, and be the newest."""
    flip_a_bit(save(tmp_path, 5, 10)[1])
    assert_newest(tmp_path, 5, complaints=1)
    save(tmp_path, 7)
    prune_checkpoints(tmp_path, step=7, keep=1, milestone_every=5)
    assert_newest(tmp_path, 7)
    assert names(tmp_path) == [*files_of(5, 7), "00000010.json.damaged", "00000010.pt.damaged"]
