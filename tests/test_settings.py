"""YAML ⇄ dataclasses: what is refused, and whether the line says which key, which file and what to do."""

import math
from dataclasses import dataclass

import pytest
import yaml
from running import ROOT, TREE, tiny_tree

from eval.settings import main as print_page
from eval.settings import page
from meanflow.errors import ConfigError
from meanflow.training import settings
from meanflow.training.config import RunConfig, load_config


@dataclass(frozen=True)
class Inner:
    rate: float
    sizes: tuple[int, ...] = (1, 2)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must be ≥ 0, got {self.rate}")


@dataclass(frozen=True)
class Other:
    train: Inner
    lr: float = 1.0


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


def test_a_complete_tree_builds():
    built = outer(limit=3, inner={"rate": 2, "sizes": [4, 5]})
    assert built == Outer("a", 1, True, 3.0, (1.0, 2.5), Inner(2.0, (4, 5)))
    assert isinstance(built.limit, float) and isinstance(built.pair[0], float) and isinstance(built.inner.rate, float)
    assert outer(limit=None).limit is None
    assert outer(inner={"rate": 2}).inner == Inner(2.0, (1, 2)), "what is left out takes its default"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", " 1e-4 "])
def test_numbers_that_yaml_reads_as_text_are_numbers(text):
    assert yaml.safe_load("1e-4") == "1e-4", "PyYAML has changed: this case is gone"
    assert outer(limit=text).limit == 1e-4 == settings.build(float, yaml.safe_load(text), "x", "f")


@pytest.mark.parametrize(
    ("value", "number"),
    [("1e3", 1000), (2.0, 2), ("12", 12), (10**12, 10**12), (2**62 + 1, 2**62 + 1), (str(2**62 + 1), 2**62 + 1)],
)
def test_whole_numbers_are_integers_however_they_are_spelt(value, number):
    count = outer(count=value).count
    assert count == number and type(count) is int


NO_INTEGER = [True, 1.5, "many", "", None, [], {}, "1e-4", math.nan, math.inf, "inf", 2**63, "9" * 5000]
NO_NUMBER = [True, "fast", "", [], {}, math.nan, -math.inf, "nan", "inf", 10**400]
WRONG = [
    *(({"count": value}, "count must be a whole number") for value in NO_INTEGER),
    *(({"limit": value}, "limit must be a number") for value in NO_NUMBER),
    *(({"flag": value}, "flag must be true or false") for value in (0, 1, "true", "yes", None)),
    *(({"name": value}, "name must be a text") for value in (1, True, None, ["a"])),
    *(({"pair": value}, "pair must be a list") for value in (1, "1, 2", None, {"a": 1})),
    ({"pair": [1, 2, 3]}, "pair must be a list of 2"),
    ({"pair": [1, "x"]}, "pair[1] must be a number, got 'x'"),
    ({"inner": {"rate": 1, "sizes": [1, 2, 3.5]}}, "inner.sizes[2] must be a whole number"),
    ({"inner": {"rate": None}}, "inner.rate must be a number, got None"),
    ({"inner": {"rate": -1}}, "inner.rate must be ≥ 0, got -1.0"),
    ({"inner": {"sizes": []}}, "inner.rate is missing"),
    *(({"inner": value}, "inner must be a group of settings") for value in (3, None)),
    ({"inner": {"rat": 1}}, "inner.rat is not a setting; did you mean inner.rate?"),
    ({"iner": {"rate": 1}}, "iner.rate is not a setting; did you mean inner.rate?"),
    ({"sizes": 1}, "sizes is not a setting; did you mean inner.sizes?"),
    ({"inner": {"rate": 1, "resolution": 1}}, "did you mean model.image_size?"),
    ({"colour": 1}, "colour is not a setting; known here: name, count"),
    ({"inner": {7: 1, "rate": 1}}, "inner.7 is not a setting"),
    ({"inner": {16**5000: 1, "rate": 1}}, "is not a setting"),
]


@pytest.mark.parametrize(
    ("change", "message"), WRONG, ids=lambda value: str(value)[:40] if value != WRONG[-1][0] else ""
)
def test_a_wrong_tree_is_one_line_that_names_key_file_and_what_was_meant(change, message):
    with pytest.raises(ConfigError) as caught:
        outer(**change)
    assert str(caught.value).startswith("some.yaml: ") and message in str(caught.value)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_synonyms_name_the_setting_that_the_file_has():
    with pytest.raises(ConfigError, match=r"learning_rate is not a setting; did you mean lr\?"):
        settings.build(Other, {"learning_rate": 1}, "", "other.yaml")


def test_a_value_in_place_of_a_group():
    with pytest.raises(ConfigError, match=r"some\.yaml: the file must be a group of settings"):
        settings.build(Outer, [1], "", "some.yaml")


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
        (b"\xff\xfe\x00\x81", ""),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_settings(tmp_path, text, part):
    file = tmp_path / "odd.yaml"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        settings.read_yaml(file)
    assert str(file) in str(caught.value) and part in str(caught.value) and "\n" not in str(caught.value)


# --- base ------------------------------------------------------------------------------------------------------


@pytest.fixture
def merged(tmp_path):
    """`merged(name="YAML", …)` writes recipes, and the kit's in a folder `kit` under kit_…; reads the first one."""

    def merged(**texts: str):
        (tmp_path / "kit").mkdir(exist_ok=True)
        for name, text in texts.items():
            folder = tmp_path / "kit" if name.startswith("kit_") else tmp_path
            (folder / f"{name.removeprefix('kit_')}.yaml").write_text(text)
        return settings.read_with_base(tmp_path / f"{next(iter(texts))}.yaml", library=tmp_path / "kit")

    return merged


def test_a_recipe_is_merged_over_its_base_group_by_group(merged):
    base = "model: {kind: unet, width: 8}\noptim: {lr: 1, betas: [1, 2]}\nguidance: {kappa: 1}\nseed: 3\n"
    middle = "base: bottom\noptim: {lr: 2}\nguidance: null\n"
    assert merged(top="base: middle.yaml\noptim: {betas: [3]}\nseed: 4\n", middle=middle, bottom=base) == {
        "model": {"kind": "unet", "width": 8},
        "optim": {"lr": 2, "betas": [3]},
        "guidance": None,
        "seed": 4,
    }


def test_a_group_of_another_kind_replaces_that_of_the_base(merged):
    base = "model: {kind: unet, width: 8, blocks: 2}\n"
    assert merged(top="base: one\nmodel: {kind: dit, depth: 3}\n", one=base)["model"] == {"kind": "dit", "depth": 3}
    same = merged(top="base: one\nmodel: {kind: unet, blocks: 3}\n", one=base)["model"]
    assert same == {"kind": "unet", "width": 8, "blocks": 3}


def test_a_base_is_beside_the_recipe_or_one_of_the_kit(merged):
    """Also where the recipe has the name of the kit's that it is based on."""
    assert merged(mine="base: demo\nseed: 1\n", kit_demo="seed: 2\nname: kit") == {"seed": 1, "name": "kit"}
    assert merged(demo="base: demo\nseed: 1\n", kit_demo="seed: 2\nname: kit") == {"seed": 1, "name": "kit"}
    assert merged(mine="base: demo\n", demo="name: own", kit_demo="name: kit") == {"name": "own"}


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("base: cifra10\n", r"mine\.yaml: its base cifra10 is no recipe .*; did you mean cifar10\?"),
        ("base: mine\n", r"mine\.yaml: its base mine leads back to itself"),
        ("base: round\n", r"round\.yaml: its base mine leads back to itself"),
        ("base: ../other/recipe\n", r"mine\.yaml: base must be the name of a recipe"),
        ("base: [demo]\n", r"mine\.yaml: base must be the name of a recipe"),
        ("base: ''\n", r"mine\.yaml: base must be the name of a recipe"),
    ],
)
def test_bases_that_cannot_be(merged, text, part):
    with pytest.raises(ConfigError, match=part):
        merged(mine=text, round="base: mine\n", kit_cifar10="seed: 1\n")


def test_your_own_recipe_may_be_based_on_one_of_ours(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: imagenet_b4\nmodel: {patch: 2}\n")
    config, base = load_config(tmp_path / "mine.yaml"), load_config(ROOT / "recipes" / "imagenet_b4.yaml")
    assert config.model.patch == 2 and config.data == base.data and config.model.width == base.model.width


# --- --set -----------------------------------------------------------------------------------------------------


def override(*texts: str):
    return settings.apply_overrides(TREE, texts)


def test_overrides_set_what_they_name_and_leave_the_rest():
    tree = override(
        "train.steps=6", "optim.lr=1e-4", "model.multipliers=[1, 2]", "data.path=/a=b/c", " train.steps = 7"
    )
    assert tree == tiny_tree(train__steps=7, optim__lr="1e-4", model__multipliers=[1, 2], data__path="/a=b/c")
    assert tiny_tree() == TREE, "the original changed"
    assert override("model.conditioning=t,r")["model"]["conditioning"] == "t,r"
    assert override("objective.tangent=(v, 0, 0)")["objective"]["tangent"] == "(v, 0, 0)"
    assert override("guidance.kappa=0.5")["guidance"] == {"kappa": 0.5}
    assert override("objective=null")["objective"] is None


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("train.steps.x=3", "train.steps.x is not a setting"),
        ("train=3", "train is a group of settings"),
        ("model={width: 3}", "model is a group of settings"),
        ("train.steps", "expected key.path=value, such as train.steps=1000"),
        ("=3", "expected key.path=value"),
        ("", "expected key.path=value"),
        ("train.steps=[1", "not valid YAML"),
        ("train.steps={a: 1, a: 2}", "repeats the key a"),
        ("optim.lr=1: e-3", "optim.lr is a group of settings"),
    ],
)
def test_overrides_that_are_refused(text, part):
    with pytest.raises(ConfigError) as caught:
        override(text, text)
    assert str(caught.value).startswith(f"--set {text}: ") and part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("train.stepz", "did you mean train.steps?"),
        ("modle.width", "did you mean model.width?"),
        ("width", "did you mean model.width?"),
        ("stepz", "did you mean train.steps or sample.steps or eval.steps?"),
        ("optim.learning_rate", "did you mean optim.lr?"),
        ("train.batch_size", "did you mean train.batch?"),
        ("batch_size", "did you mean train.batch?"),
        ("train.epochs", "did you mean train.steps?"),
        ("ema.decay", "did you mean ema.decays?"),
        ("guidance.omega", "did you mean guidance.omega_prime?"),
        ("times.ratio", "it is called objective.times.ratio now"),
        ("times.share", "it is called objective.times.stratified now"),
        ("loss.p", "it is called objective.p now"),
        ("loss.jvp", "it is called train.jvp now"),
        ("guidance.dropped", "it is called guidance.unconditional_rows now"),
        ("checkpoint.xyz", "known here: every, keep, milestone_every"),
        (".", " is not a setting"),
    ],
)
def test_an_unknown_key_names_file_and_what_was_meant(recipe, key, meant):
    with pytest.raises(ConfigError) as caught:
        load_config(recipe(), ["seed=4", f"{key}=3"])
    expected = f"{recipe()} with --set seed=4 {key}=3: {key} is not a setting; {meant}"
    assert expected in str(caught.value) or (key == "." and meant in str(caught.value))


def test_synonyms_and_new_names_are_settings():
    known = settings.leaves(RunConfig)
    for meant in (*settings.SYNONYMS.values(), *settings.RENAMED.values()):
        assert any(settings.within(key, [meant]) for key in known), meant
    assert not settings.SYNONYMS.keys() & {key.rpartition(".")[2] for key in known}, "they are settings themselves"


# --- back ------------------------------------------------------------------------------------------------------


def test_to_tree_undoes_build():
    config = settings.build(RunConfig, TREE, "", "f")
    assert settings.to_tree(config) == TREE and settings.build(RunConfig, TREE, "", "f") == config


def test_each_setting_can_be_overridden_by_its_dotted_path():
    assert settings.flatten({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}
    for path, value in settings.flatten(TREE).items():
        assert override(f"{path}={settings.shown(value)}") == TREE, path


def test_the_page_of_all_settings_is_up_to_date(capsys, tmp_path):
    """If this fails: bash run.sh settings --out docs/settings.md"""
    text = page()
    assert text == (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    for key in settings.leaves(RunConfig):
        assert f"| `{key}` |" in text or key.endswith(".kind"), key
    assert not [line for line in text.splitlines() if "|  |" in line.rpartition(" | ")[0]], "a cell is empty"
    assert "| `optim.lr` | learning rate | > 0 | required | --set |" in text
    assert print_page(["--out", str(tmp_path / "page.md")]) == 0 == print_page([])
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == text == capsys.readouterr().out
