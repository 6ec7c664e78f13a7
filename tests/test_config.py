"""A run's settings as a whole: ranges, contradictions, the shipped recipes, and what may change on resume."""

import re
import subprocess

import pytest
import torch
import yaml
from meanflow.training.network import build_network, count_parameters
from running import RECIPES, ROOT, guided_latent_changes, tiny_config, tiny_tree

from dit import DiT, DiTConfig
from meanflow.errors import ConfigError
from meanflow.training import settings
from meanflow.training.config import (
    CHANGEABLE,
    RunConfig,
    changes,
    config_from_tree,
    config_to_yaml,
    load_config,
    refuse_changed_run,
)
from meanflow.training.processes import DistributedContext
from unet import UNet


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"objective__times__ratio": 1.2}, ["times.ratio", "[0, 1]", "1.2"]),
        ({"objective__times__ratio": -0.1}, ["times.ratio"]),
        ({"objective__times__sigma": 0}, ["times.sigma", "> 0"]),
        ({"objective__times__sampler": "v2"}, ["times.sampler", "v0", "v1"]),
        ({"objective__times__sampler": "v1"}, ["times.", "v1", "mu_r"]),
        ({"objective__times__mu_r": 0.1}, ["times.", "mu_r", "v0"]),
        ({"objective__times__distribution": "normal"}, ["times.distribution", "lognorm"]),
        ({"objective__times__share": "some"}, ["times.share", "exact"]),
        ({"objective__p": -1}, ["loss.p", "≥ 0"]),
        ({"objective__c": 0}, ["loss.c", "> 0"]),
        ({"objective__tangent": "(v, 1, 2)"}, ["loss.tangent", "(v, 0, 1)"]),
        ({"train__jvp": "finite"}, ["train.jvp", "dual", "func"]),
        ({"train__batch": 0}, ["train.", "batch"]),
        ({"train__batch": -8}, ["train.", "batch"]),
        ({"train__steps": 0}, ["train.", "steps"]),
        ({"train__microbatch": 0}, ["train.microbatch"]),
        ({"train__precision": "fp16"}, ["train.precision", "bf16"]),
        ({"optim__lr": 0}, ["optim.lr"]),
        ({"optim__eps": -1e-8}, ["optim.", "eps"]),
        ({"optim__betas": [0.9, 1]}, ["optim.betas", "[0, 1)"]),
        ({"optim__betas": [0.9]}, ["optim.betas", "a list of 2"]),
        ({"optim__weight_decay": -1}, ["optim.weight_decay"]),
        ({"optim__warmup_steps": -1}, ["optim.", "warmup_steps"]),
        ({"optim__clip": 0}, ["optim.clip"]),
        ({"ema__decays": []}, ["ema.decays"]),
        ({"ema__decays": [0.9, 1.0]}, ["ema.decays"]),
        ({"ema__decays": [0.9, 0.9]}, ["ema.decays", "repeats"]),
        ({"ema__eval": 0.99}, ["ema.eval", "0.99"]),
        ({"ema__every": 0}, ["ema.every"]),
        ({"model__width": 7}, ["model.width", "even"]),
        ({"model__dropout": 1.0}, ["model.dropout"]),
        ({"model__multipliers": []}, ["model.multipliers"]),
        ({"model__multipliers": [1, 1, 1, 1, 1]}, ["model.image_size", "halved"]),
        ({"model__attention": [5]}, ["model.attention"]),
        ({"model__conditioning": "t, r"}, ["model.conditioning", "t,t-r"]),
        ({"model__classes": -1}, ["model.", "classes"]),
        ({"data__source": "mnist"}, ["data.source", "digits"]),
        ({"data__augment_p": 1.5}, ["data.augment_p"]),
        ({"data__path": ""}, ["data.path"]),
        ({"checkpoint__every": 0}, ["checkpoint.every"]),
        ({"checkpoint__keep": 0}, ["checkpoint.", "keep"]),
        ({"checkpoint__milestone_every": 3}, ["checkpoint.milestone_every", "multiple"]),
        ({"logging__flush_every": 0}, ["logging.flush_every"]),
        ({"sample__count": 0}, ["sample.count"]),
        ({"sample__seed": -1}, ["sample.", "seed"]),
        ({"eval__samples": 1}, ["eval.samples"]),
        ({"eval__steps": []}, ["eval.steps"]),
        ({"eval__steps": [1, 0]}, ["eval.steps"]),
        ({"eval__every": 0}, ["eval.every"]),
        (
            {"train__compile": "default", "train__jvp": "func", "objective__times__share": "per_sample"},
            ["train.compile", "times.share", "train.jvp"],
        ),
        (
            {"train__compile": "default", "train__activation_checkpointing": True},
            ["train.activation_checkpointing", "train.compile"],
        ),
        ({"seed": -1}, ["seed"]),
        ({"seed": 2**63}, ["seed"]),
        ({"model__augment_labels": 6}, ["model.augment_labels", "data.flip"]),
        ({"data__flip": True}, ["model.augment_labels", "6 labels"]),
        ({"data__augment_p": 0.1}, ["model.augment_labels"]),
    ],
)
def test_values_out_of_range_name_their_key(tmp_path, change, parts):
    file = tmp_path / "odd.yaml"
    file.write_text(yaml.safe_dump(tiny_tree(**change)))
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    for part in parts:
        assert part in message, message


def test_a_batch_that_does_not_divide_names_one_that_does(alone):
    from meanflow.training.batches import split_batch

    config = tiny_config(train__batch=10)
    assert split_batch(config, 1) == 10 and split_batch(config, 5) == 2
    with pytest.raises(ConfigError, match=r"train\.batch 10 .* 4 processes.*train\.batch=12"):
        split_batch(config, 4)
    with pytest.raises(ConfigError, match=r"train\.batch 10 .* 16 processes.*train\.batch=16"):
        split_batch(config, 16)


def test_overrides_are_named_in_errors(recipe):
    with pytest.raises(ConfigError, match=r"tiny\.yaml with --set times\.ratio=1\.2: times\.ratio"):
        load_config(recipe(), ["objective.times.ratio=1.2"])


def test_a_number_in_scientific_notation_on_the_command_line(recipe):
    config = load_config(recipe(), ["optim.lr=1e-4", "train.steps=1e3", "optim.betas=[9e-1, 0.5]"])
    assert config.optim.lr == 1e-4 and config.train.steps == 1000 and config.optim.betas == (0.9, 0.5)


def test_overrides_pass_the_same_door_as_files(recipe):
    for text in ("train.steps=true", "train.steps=", "optim.lr=fast", "train.compile=1", "model.multipliers=2"):
        with pytest.raises(ConfigError, match=re.escape(text.partition("=")[0])):
            load_config(recipe(), [text])


# --- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_and_returns_from_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_tree(settings.to_tree(config), "here") == config
    assert len(config.description) > 20 and "\n" not in config.description


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_builds_its_network(path):
    config = load_config(path)
    with torch.device("meta"):
        network = (DiT if isinstance(config.model, DiTConfig) else UNet)(config.model)
    assert count_parameters(network) > 1000


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_spells_all_its_keys_once(path):
    """The YAML itself is complete: nothing is left to defaults, nothing is there twice."""
    spelt, built = settings.read_yaml(path), settings.to_tree(load_config(path))
    assert list(settings.flatten(spelt)) == list(settings.flatten(built))


def test_there_are_the_recipes_of_the_readme():
    assert {"demo", "cifar10"} <= {path.stem for path in RECIPES}


def test_the_paper_network_has_its_parameters():
    with torch.device("meta"):
        network = UNet(load_config(ROOT / "recipes" / "cifar10.yaml").model)
    assert count_parameters(network) == 55_932_419


def test_the_cifar10_recipe_is_the_papers():
    """Appendix A and Table 3, spelt out once more."""
    config = load_config(ROOT / "recipes" / "cifar10.yaml")
    assert (config.train.batch, config.train.steps, config.optim.lr) == (1024, 800_000, 6e-4)
    assert (config.optim.betas, config.optim.warmup_steps, config.optim.weight_decay) == ((0.9, 0.999), 10_000, 0)
    assert (config.times.ratio, config.times.mu, config.times.sigma) == (0.75, -2.0, 2.0)
    assert (config.loss.p, config.loss.tangent, config.model.conditioning) == (0.75, "(v, 0, 1)", "t,t-r")
    assert config.ema.eval == 0.99995 and config.model.dropout == 0.2


def test_the_initial_network_is_a_function_of_the_seed():
    cpu = torch.device("cpu")
    one, same, other = (build_network(tiny_config(seed=seed), cpu) for seed in (1, 1, 2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build_network(tiny_config(seed=1), cpu)
    assert torch.equal(torch.get_rng_state(), before), "building a network moved the global generator"
    for a, b, c in zip(one.parameters(), same.parameters(), again.parameters(), strict=True):
        assert torch.equal(a, b) and torch.equal(a, c)
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_recipes_name_no_place_of_this_machine():
    for path in RECIPES:
        assert not re.search(r"(^|[\s:])/(?:home|work|tmp|root)", path.read_text()), path


# --- what may change -------------------------------------------------------------------------------------------


def test_changes_lists_exactly_what_differs():
    old, new = tiny_config(), tiny_config(train__steps=9, optim__lr=0.5)
    assert changes(old, new) == {"train.steps": (6, 9), "optim.lr": (1e-3, 0.5)}
    assert changes(old, old) == {}
    assert changes(tiny_config(eval__steps=[1]), tiny_config(eval__steps=[1, 2])) == {"eval.steps": ([1], [1, 2])}


@pytest.mark.parametrize(
    "change",
    [
        {"description": "other words"},
        {"data__root": "elsewhere"},
        {"data__path": "elsewhere"},
        {"train__steps": 7},
        {"train__microbatch": 2},
        {"ema__eval": 0.5},
        {"train__compile": "default"},
        {"checkpoint__every": 3},
        {"checkpoint__keep": 5},
        {"logging__flush_every": 2},
        {"sample__count": 4},
        {"eval__samples": 10},
    ],
)
def test_how_a_run_is_run_and_judged_may_change(change):
    fixed = {"train__jvp": "func", "ema__decays": [0.9, 0.5]}
    refuse_changed_run(tiny_config(**fixed), tiny_config(**{**fixed, **change}), "here")


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"model__width": 10},
        {"model__dropout": 0.1},
        {"data__source": "cifar10"},
        {"data__flip": True, "model__augment_labels": 6},
        {"objective__times__ratio": 0.5},
        {"objective__p": 1.0},
        {"optim__lr": 2e-3},
        {"ema__decays": [0.9, 0.99]},
        {"train__batch": 16},
        {"train__precision": "bf16"},
    ],
)
def test_what_is_learnt_may_not_change(change):
    with pytest.raises(ConfigError) as caught:
        refuse_changed_run(tiny_config(), tiny_config(**change), "runs/here")
    message = str(caught.value)
    assert message.startswith("runs/here") and "--out" in message and "\n" not in message
    for path, value in change.items():
        assert path.replace("__", ".") in message and repr(value) in message, message


def test_changeable_keys_exist():
    known = {*settings.flatten(tiny_tree()), *settings.flatten(tiny_tree(**guided_latent_changes()))}
    for key in CHANGEABLE:
        assert any(path == key or path.startswith(f"{key}.") for path in known), key


def test_config_classes_are_frozen_and_have_no_defaults():
    from dataclasses import MISSING, fields, is_dataclass
    from typing import get_type_hints

    for kind in [RunConfig, *(hint for hint in get_type_hints(RunConfig).values() if is_dataclass(hint))]:
        assert kind.__dataclass_params__.frozen, kind
        for field in fields(kind):
            assert field.default is MISSING and field.default_factory is MISSING, f"{kind.__name__}.{field.name}"


def test_processes_is_main():
    assert (
        DistributedContext(0, 2, torch.device("cpu")).is_main
        and not DistributedContext(1, 2, torch.device("cpu")).is_main
    )


def test_the_recipe_list_of_run_sh_has_every_recipe():
    shown = subprocess.run(["bash", str(ROOT / "run.sh")], capture_output=True, text=True, check=True).stdout
    for path in RECIPES:
        assert f"  {path.stem} " in shown and load_config(path).description in shown


@pytest.mark.parametrize(
    ("name", "network", "guidance", "interval", "images"),
    [
        ("b4", (4, 768, 12, 12), (1.0, 0.0, 1.0), (0.0, 1.0), 80),
        ("b2", (2, 768, 12, 12), (2.0, 0.5, 1.0), (0.0, 1.0), 240),
        ("m2", (2, 1024, 16, 16), (2.0, 0.5, 1.0), (0.0, 1.0), 240),
        ("l2", (2, 1024, 24, 16), (2.5, 0.92, 0.2), (0.0, 0.8), 240),
        ("xl2", (2, 1152, 28, 16), (2.5, 0.92, 0.2), (0.0, 0.75), 240),
        ("xl2plus", (2, 1152, 28, 16), (2.0, 0.5, 1.0), (0.3, 0.8), 1000),
    ],
)
def test_the_imagenet_recipes_are_table_4(name, network, guidance, interval, images):
    config = load_config(ROOT / "recipes" / f"imagenet_{name}.yaml")
    model, guided = config.model, config.guidance
    assert (model.patch, model.width, model.depth, model.heads) == network
    assert (guided.omega_prime, guided.kappa, guided.omega) == guidance
    assert (guided.t_start, guided.t_end, guided.label_drop) == (*interval, 0.1)
    epochs = config.train.steps * config.train.batch / 1_281_167
    assert 0 <= epochs - images < 1e-3 and config.train.batch == 256
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-4, (0.9, 0.95), 0)
    assert (config.ema.decays, config.ema.every, config.loss.p, config.loss.c) == ((0.9999,), 1, 1.0, 1e-2)
    assert (config.times.ratio, config.times.mu, config.times.sigma) == (0.25, -0.4, 1.0)
