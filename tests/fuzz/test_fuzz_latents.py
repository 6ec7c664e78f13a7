"""Prepared latents from anywhere: open_latents and verify give latents or one line."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from latent_helpers import contents, digits, make
from mutations import mutated, refused

from meanflow.data.latents import open_latents, verify

FILES = ["manifest.json", "plan.json", "labels.bin", "shard-00001.json", "shard-00001.bin"]
WORDS = [b"null", b"[]", b"{}", b"-1", b"1e400", b"9" * 5000, b'"', b"[" * 2000, b"true", b"\\ud800", b"../"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "latents"
    make(digits(folder), shard_images=1000)
    return folder


def use(folder: Path) -> None:
    def read():
        latents = open_latents(folder, digits(folder))
        latents.read(torch.arange(len(latents)), torch.zeros(len(latents), dtype=torch.bool))

    refused(read)
    refused(lambda: verify(folder))


def broken_copy(whole: Path, base: Path, name: str, data: bytes) -> Path:
    folder = base / "broken latents"
    if not folder.exists():
        shutil.copytree(whole, folder)
    for file, content in contents(whole).items():
        if (folder / file).read_bytes() != content:
            (folder / file).write_bytes(content)
    (folder / name).write_bytes(data)
    return folder


@given(data=st.data())
def test_a_mutated_file(tmp_path_factory, whole, data):
    files, name = contents(whole), data.draw(st.sampled_from(FILES))
    use(broken_copy(whole, tmp_path_factory.getbasetemp(), name, data.draw(mutated([files[name]], WORDS))))


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.lists(st.integers(), max_size=3)
)


@given(data=st.data())
def test_anything_in_the_place_of_a_fact(tmp_path_factory, whole, data):
    tree = json.loads((whole / "manifest.json").read_bytes())
    place = tree
    while True:
        key = data.draw(st.sampled_from(list(place) if isinstance(place, dict) else range(len(place))))
        if not isinstance(place[key], dict | list) or not place[key] or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(VALUES)
    use(broken_copy(whole, tmp_path_factory.getbasetemp(), "manifest.json", json.dumps(tree).encode()))
