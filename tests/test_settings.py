"""YAML ⇄ dataclasses: what is refused, and whether the line says which key, which file and what to do."""

import math
from dataclasses import dataclass

import pytest
import yaml
from running import TREE, tiny_tree

from meanflow.errors import ConfigError
from meanflow.training import settings
from meanflow.training.config import RunConfig


@dataclass(frozen=True)
class Inner:
    rate: float
    sizes: tuple[int, ...]

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must be ≥ 0, got {self.rate}")


@dataclass(frozen=True)
class Outer:
    name: str
    count: int
    flag: bool
    limit: float | None
    pair: tuple[float, float]
    inner: Inner


def outer(**changes):
    tree = {"name": "a", "count": 1, "flag": True, "limit": None, "pair": [1, 2.5], "inner": {"rate": 1, "sizes": []}}
    return settings.build(Outer, {**tree, **changes}, "", "some.yaml")


def refused(*parts: str, **changes) -> None:
    with pytest.raises(ConfigError) as caught:
        outer(**changes)
    message = str(caught.value)
    assert message.startswith("some.yaml: ") and "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_complete_tree_builds():
    built = outer(limit=3, inner={"rate": 2, "sizes": [4, 5]})
    assert built == Outer("a", 1, True, 3.0, (1.0, 2.5), Inner(2.0, (4, 5)))
    assert isinstance(built.limit, float) and isinstance(built.pair[0], float) and isinstance(built.inner.rate, float)


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", " 1e-4 "])
def test_numbers_that_yaml_reads_as_text_are_numbers(text):
    assert yaml.safe_load("1e-4") == "1e-4", "PyYAML has changed: this case is gone"
    assert outer(limit=text).limit == 1e-4
    assert settings.build(float, yaml.safe_load(text), "x", "f") == 1e-4


@pytest.mark.parametrize(("value", "number"), [("1e3", 1000), (2.0, 2), ("12", 12), (10**12, 10**12)])
def test_whole_numbers_are_integers_however_they_are_spelt(value, number):
    count = outer(count=value).count
    assert count == number and type(count) is int


def test_a_large_integer_keeps_its_last_digit():
    assert outer(count=2**62 + 1).count == 2**62 + 1


@pytest.mark.parametrize("value", [True, False, 1.5, "many", "", None, [], {}, "1e-4", math.nan, math.inf, "inf"])
def test_what_is_no_integer(value):
    refused("count must be a whole number", repr(value)[:20], count=value)


@pytest.mark.parametrize("value", [True, "fast", "", [], {}, math.nan, -math.inf, "nan", "inf", 10**400])
def test_what_is_no_finite_number(value):
    refused("limit must be a number", limit=value)


@pytest.mark.parametrize("value", [0, 1, "true", "yes", None])
def test_what_is_no_truth_value(value):
    refused("flag must be true or false", flag=value)


@pytest.mark.parametrize("value", [1, True, None, ["a"]])
def test_what_is_no_text(value):
    refused("name must be a text", name=value)


@pytest.mark.parametrize("value", [1, "1, 2", None, {"a": 1}])
def test_what_is_no_list(value):
    refused("pair must be a list", pair=value)


def test_elements_of_lists_are_named():
    refused("pair must be a list of 2", pair=[1, 2, 3])
    refused("pair[1] must be a number", "'x'", pair=[1, "x"])
    refused("inner.sizes[2] must be a whole number", inner={"rate": 1, "sizes": [1, 2, 3.5]})


def test_null_only_where_it_is_allowed():
    assert outer(limit=None).limit is None
    refused("inner.rate must be a number, got None", inner={"rate": None, "sizes": []})


def test_a_group_must_be_a_group():
    refused("inner must be a group of settings", inner=3)
    refused("inner must be a group of settings", inner=None)
    with pytest.raises(ConfigError, match="the file must be a group of settings"):
        settings.build(Outer, [1], "", "some.yaml")


def test_a_misspelt_key_is_named_with_its_file_and_the_nearest():
    refused("inner.rat is not a setting", "did you mean", "rate", inner={"rat": 1, "sizes": []})
    refused("colour is not a setting", colour=1)
    refused("7 is not a setting", **{"inner": {7: 1, "rate": 1, "sizes": []}})


def test_a_missing_key_is_named():
    refused("inner.sizes is missing", inner={"rate": 1})


def test_a_value_out_of_range_is_named_with_its_group():
    refused("inner.rate must be ≥ 0, got -1.0", inner={"rate": -1, "sizes": []})


def test_long_values_are_cut_in_messages():
    with pytest.raises(ConfigError) as caught:
        outer(count="x" * 5000)
    assert len(str(caught.value)) < 200


# --- files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("a: 1\nb: 2\na: 3\n", "repeats the key a"),
        ("g:\n  a: 1\n  a: 1\n", "repeats the key a"),
        ("a: [1, 2\n", "not valid YAML"),
        ("a: *nowhere\n", "not valid YAML"),
        ("\ta: 1\n", "line 1"),
        ("? [1]\n: 2\n", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['false']\n", "not valid YAML"),
        ("- 1\n- 2\n", "expected a mapping of settings, found list"),
        ("", "expected a mapping of settings, found NoneType"),
        ("just text", "found str"),
        ("<<: {a: 1}\n", "not valid YAML"),
        *((f"a: !!{tag} 8\n", "not valid YAML") for tag in ("timestamp", "bool", "omap", "set")),
        ("a: !!int ''\n", "not valid YAML"),
    ],
)
def test_files_that_are_no_settings(tmp_path, text, part):
    file = tmp_path / "odd.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings.read_yaml(file)
    assert str(file) in str(caught.value) and part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for file in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(ConfigError, match=r"cannot be read|not valid YAML"):
            settings.read_yaml(file)


# --- --set -----------------------------------------------------------------------------------------------------


def override(*texts: str):
    return settings.apply_overrides(TREE, list(texts))


def test_overrides_set_what_they_name_and_leave_the_rest():
    tree = override("train.steps=7", "optim.lr=1e-4", "model.multipliers=[1, 2]", "data.path=null", "seed=9")
    expected = tiny_tree(train__steps=7, optim__lr="1e-4", model__multipliers=[1, 2], data__path=None, seed=9)
    assert tree == expected
    assert tiny_tree() == TREE, "the original changed"


def test_overrides_keep_commas_spaces_and_equals_signs():
    assert override("model.conditioning=t,r")["model"]["conditioning"] == "t,r"
    assert override("objective.tangent=(v, 0, 0)")["loss"]["tangent"] == "(v, 0, 0)"
    assert override("data.path=/a=b/c")["data"]["path"] == "/a=b/c"
    assert override(" train.steps = 7")["train"]["steps"] == 7


def test_the_last_override_of_a_key_wins():
    assert override("train.steps=7", "train.steps=8")["train"]["steps"] == 8


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("train.stepz=3", ["train.stepz is not a setting", "did you mean train.steps?"]),
        ("modle.width=3", ["modle.width is not a setting", "did you mean model"]),
        ("width=3", ["width is not a setting", "model.width"]),
        ("train.steps.x=3", ["train.steps.x is not a setting"]),
        ("train=3", ["train is a group of settings", "batch", "precision"]),
        ("model={width: 3}", ["model is a group of settings"]),
        ("train.steps", ["expected key.path=value"]),
        ("=3", ["expected key.path=value"]),
        ("", ["expected key.path=value"]),
        (".=3", ["is not a setting"]),
        ("train.steps=[1", ["not valid YAML"]),
        ("train.steps={a: 1, a: 2}", ["repeats the key a"]),
    ],
)
def test_overrides_that_are_refused(text, parts):
    with pytest.raises(ConfigError) as caught:
        override(text)
    message = str(caught.value)
    assert message.startswith(f"--set {text}: ") and "\n" not in message
    for part in parts:
        assert part in message, message


# --- back ------------------------------------------------------------------------------------------------------


def test_to_tree_undoes_build():
    config = settings.build(RunConfig, TREE, "", "f")
    tree = settings.to_tree(config)
    assert tree == TREE
    assert settings.build(RunConfig, tree, "", "f") == config


def test_flatten():
    assert settings.flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_each_setting_can_be_overridden_by_its_dotted_path():
    for path, value in settings.flatten(TREE).items():
        text = yaml.safe_dump(value, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        assert settings.apply_overrides(TREE, [f"{path}={text}"]) == TREE, path


def test_a_mapping_whose_key_is_a_number_is_one_line_also_at_the_second_time():
    """The long fuzz run found it."""
    with pytest.raises(ConfigError, match="is a group of settings"):
        settings.apply_overrides({"optim": {"lr": 1.0}}, ["optim.lr=1: e-3", "optim.lr=1: e-3"])
