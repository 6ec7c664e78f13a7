"""Checkpoints from anywhere: load_checkpoint and what takes its content give a run's state or one line."""

import io
import json
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated, refused, written
from running import tiny_config

from meanflow.errors import AssetError
from meanflow.training.checkpoint import PARTS, load_checkpoint, load_newest, save_checkpoint
from meanflow.training.config import config_from_tree
from meanflow.training.divergence import Guard
from meanflow.training.model import open_checkpoint
from meanflow.training.state import Ema, TrainState, make_optimizer, restore, to_checkpoint

CONFIG = tiny_config(train__spike_guard=2.0)
WORDS = [b"c__builtin__\neval\n", b"cos\nsystem\n", b"(X\x04\x00\x00\x00codetR.", b"ccollections\nOrderedDict\n"]
WORDS += [
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"cbuiltins\nbytearray\nJ\xff\xff\xff\x7f\x85R",
    b"\x8e" + b"\xff" * 8,
]
WORDS += [b"\x80\x02", b"\x80\x05", b"q\xff", b"r\xff\xff\xff\x7f", b"\x8a\xff", b"J\xff\xff\xff\x7f"]
WORDS += [b"}", b")", b"R", b"b", b"Q"]


def small_state() -> TrainState:
    """A run's state with a network of two tensors, so that an input costs milliseconds."""
    network = torch.nn.Linear(3, 2)
    optimizer = make_optimizer(network, CONFIG.optim)
    for p in network.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return TrainState(network, optimizer, Ema(network, CONFIG.ema), Guard(2.0, torch.device("cpu")))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    data = {"images": 9, "classes": [], "sha256": "0" * 64}
    return save_checkpoint(tmp_path_factory.mktemp("whole"), 1, to_checkpoint(small_state(), CONFIG, data))


def use(path: Path) -> bool:
    """What a resumed run does with it, and what the evaluation's entry points open."""

    def resume():
        checkpoint = load_checkpoint(path)
        config_from_tree(checkpoint.meta["config"], str(path))
        state = small_state()
        restore(state, checkpoint, str(path))
        state.optimizer.step()

    refused(lambda: open_checkpoint(path))
    return refused(resume)


def repacked(whole: Path, **changed: bytes) -> bytes:
    """The same zip with members replaced: `data_pkl=…` for archive/data.pkl."""
    out = io.BytesIO()
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(out, "w") as new:
        for info in old.infolist():
            new.writestr(info.filename, changed.get(Path(info.filename).name.replace(".", "_"), old.read(info)))
    return out.getvalue()


def member(whole: Path, ending: str) -> bytes:
    with zipfile.ZipFile(whole) as archive:
        return archive.read(next(name for name in archive.namelist() if name.endswith(ending)))


def test_the_whole_one_is_taken(whole):
    assert not use(whole)


@given(data=st.data())
def test_a_mutated_file(tmp_path_factory, whole, data):
    use(written(tmp_path_factory.getbasetemp() / "a.pt", data.draw(mutated([whole.read_bytes()]))))


@given(data=st.data())
def test_a_mutated_pickle_in_a_whole_zip(tmp_path_factory, whole, data):
    pickled = data.draw(mutated([member(whole, "/data.pkl")], WORDS))
    use(written(tmp_path_factory.getbasetemp() / "b.pt", repacked(whole, data_pkl=pickled)))


@given(data=st.data())
def test_a_mutated_newest_falls_back_or_says_so(tmp_path_factory, whole, data):
    """With its JSON beside it, either of which may be damaged."""
    folder = tmp_path_factory.getbasetemp() / "fall back"
    folder.mkdir(exist_ok=True)
    both = {suffix: whole.with_suffix(suffix).read_bytes() for suffix in (".pt", ".json")}
    for suffix, content in both.items():
        written(folder / f"00000001{suffix}", content)
        written(folder / f"00000002{suffix}", content)
    suffix = data.draw(st.sampled_from(list(both)))
    damaged = written(folder / f"00000002{suffix}", data.draw(mutated([both[suffix]])))
    path, _, complaints = load_newest(folder)
    assert path.stem == "00000001" if complaints else damaged.read_bytes() == both[suffix] or suffix == ".json"


ANYTHING = st.recursive(
    st.none() | st.integers(-9, 9) | st.floats() | st.text(max_size=3) | st.builds(torch.zeros, st.integers(0, 3)),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)


@given(data=st.data())
def test_anything_in_the_place_of_a_part(tmp_path_factory, whole, data):
    content = torch.load(whole, weights_only=True)
    part = data.draw(st.sampled_from(PARTS))
    key = data.draw(st.sampled_from(list(content[part])))
    other = data.draw(ANYTHING)
    if data.draw(st.booleans()):
        content[part] = other
    elif part == "model" or data.draw(st.booleans()):
        content[part][key] = other
    else:
        content[part][key][data.draw(st.sampled_from(list(content[part][key])))] = other
    path = tmp_path_factory.getbasetemp() / "c.pt"
    torch.save(content, path)
    use(path)


@given(data=st.data())
def test_anything_in_the_place_of_a_fact(tmp_path_factory, whole, data):
    content = torch.load(whole, weights_only=True)
    meta = json.loads(content["meta"])
    meta[data.draw(st.sampled_from(list(meta)))] = data.draw(
        ANYTHING.filter(lambda value: "tensor" not in repr(value)) | st.just(10**30)
    )
    for name in data.draw(st.lists(st.sampled_from(list(meta)), max_size=1)):
        del meta[name]
    path = tmp_path_factory.getbasetemp() / "d.pt"
    torch.save({**content, "meta": json.dumps(meta)}, path)
    use(path)


# --- bombs -----------------------------------------------------------------------------------------------------


def test_a_packed_tensor_is_refused(tmp_path, whole):
    """torch.save never packs: 128 MB of zeros in a file of a few hundred kB are no checkpoint."""
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(whole) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for info in old.infolist():
            if not info.filename.endswith("/data/0"):
                new.writestr(info.filename, old.read(info))
        with new.open("archive/data/0", "w") as huge:
            for _ in range(2):
                huge.write(bytes(2**26))
    with pytest.raises(AssetError, match="unpacks to more than it is"):
        load_checkpoint(path)
    with pytest.raises(AssetError, match="unpacks to more than it is"):
        open_checkpoint(path)
