"""Recipes from anywhere: load_config gives a RunConfig or one line."""

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from mutations import mutated, refused, written
from running import RECIPES, ROOT, tiny_tree

from meanflow.errors import ConfigError
from meanflow.training.config import config_from_tree, load_config

WORDS = rb"""&a |*a|- |: |{|}|[|]|? |<<: |!!python/object/apply:os.system [x]|!!int |!!float |!!binary |!!set |!!map
|!!timestamp |!!seq |!<x> |%YAML 9.9|---|...|~|null|true|1e999|.nan|-.inf|2001-99-99|1:90|0o9|-0|'|"|>|#|\x|"\ud800"
|base: |times: |loss: """
WORDS = WORDS.replace(b"\n", b"").split(b"|")
WORDS += [b"|\n", b"\t", b"\r", b"\xe2\x80\xa8", b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x85", b"\n  a: 1\n", b"\n"]
WORDS += [b"0x" + b"f" * 5000, b"9" * 5000, b"1" + b"_" * 99, b"[" * 2000, b"{a: " * 500]
TINY = yaml.safe_dump(tiny_tree(), sort_keys=False).encode()


OLD = (ROOT / "tests" / "data" / "runs" / "dit" / "config.yaml").read_bytes()  # in the layout of an earlier version


@given(mutated([TINY, RECIPES[0].read_bytes(), OLD], WORDS))
def test_a_mutated_recipe(tmp_path_factory, data):
    path = written(tmp_path_factory.getbasetemp() / "recipe.yaml", data)
    refused(lambda: load_config(path))


@given(st.lists(mutated([b"optim.lr=1e-3", b"model.multipliers=[1, 2]", b"description=x"], WORDS), max_size=3))
def test_mutated_overrides(tmp_path_factory, overrides):
    path = written(tmp_path_factory.getbasetemp() / "tiny.yaml", TINY)
    refused(lambda: load_config(path, [override.decode("utf-8", "replace") for override in overrides]))


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.just(6000).map(lambda digits: 10**digits),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3),
    max_leaves=6,
)


@given(st.data(), VALUES)
def test_a_value_of_any_kind_in_any_place(data, value):
    """As in the config that a checkpoint carries, which JSON made."""
    tree = data.draw(st.sampled_from([tiny_tree(), yaml.safe_load(OLD)]))
    place = data.draw(st.sampled_from(list(tree)))
    if isinstance(tree[place], dict) and data.draw(st.booleans()):
        tree[place][data.draw(st.sampled_from(list(tree[place])) | st.text(max_size=3))] = value
    else:
        tree[place] = value
    refused(lambda: config_from_tree(tree, "the test"))


# --- bombs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [3, 30])
def test_aliases_cannot_multiply(tmp_path, depth):
    """The "billion laughs": each line names the one before it nine times."""
    lines = ["a0: &a0 [x]"] + [f"a{k}: &a{k} [{', '.join([f'*a{k - 1}'] * 9)}]" for k in range(1, depth)]
    path = written(tmp_path / "laughs.yaml", "\n".join(lines).encode())
    with pytest.raises(ConfigError, match="alias"):
        load_config(path)


def test_a_recipe_of_megabytes_is_not_read(tmp_path):
    path = written(tmp_path / "long.yaml", TINY + b"# \n" * 2**20)
    with pytest.raises(ConfigError, match="too large"):
        load_config(path)
