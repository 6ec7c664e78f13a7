"""A run's settings as a whole: ranges, contradictions, the shipped recipes, and what may change on resume."""

import re
import shlex
from dataclasses import is_dataclass, replace

import pytest
import torch
import yaml
from running import RECIPES, ROOT, guided_latent_changes, tiny_config, tiny_tree, write_recipe

from meanflow.errors import ConfigError
from meanflow.training import settings
from meanflow.training.batches import split_batch
from meanflow.training.config import (
    CHANGEABLE,
    CHANGEABLE_ON_REQUEST,
    RunConfig,
    changes,
    config_from_tree,
    config_to_yaml,
    load_config,
    refuse_changed_run,
    upgraded,
)
from meanflow.training.state import build_network, count_parameters
from unet import UNet


def recipe_of(name: str) -> RunConfig:
    return load_config(ROOT / "recipes" / f"{name}.yaml")


# --- ranges ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"objective__kind": "meanflaw"}, "objective.kind meanflaw; did you mean meanflow"),
        ({"objective__times__ratio": 1.2}, "times.ratio; [0, 1]; 1.2"),
        ({"objective__times__ratio": -0.1}, "times.ratio"),
        ({"objective__times__sigma": 0}, "times.sigma; > 0"),
        ({"objective__times__distribution": "normal"}, "times.distribution; lognorm"),
        ({"objective__p": -1}, "objective.p; ≥ 0"),
        ({"objective__c": 0}, "objective.c; > 0"),
        ({"objective__tangent": "(v, 1, 2)"}, "objective.tangent; (v, 0, 1)"),
        ({"train__jvp": "finite"}, "train.jvp; dual; func"),
        ({"train__batch": 0}, "train.; batch"),
        ({"train__steps": 0}, "train.; steps"),
        ({"train__microbatch": 0}, "train.microbatch"),
        ({"train__precision": "fp16"}, "train.precision; bf16"),
        ({"train__check_every": 0}, "train.check_every"),
        ({"train__spike_guard": 1}, "train.spike_guard; > 1"),
        ({"train__compile": "fast"}, "train.compile; reduce-overhead"),
        ({"optim__lr": 0}, "optim.lr"),
        ({"optim__eps": -1e-8}, "optim.; eps"),
        ({"optim__betas": [0.9, 1]}, "optim.betas; [0, 1)"),
        ({"optim__betas": [0.9]}, "optim.betas; a list of 2"),
        ({"optim__weight_decay": -1}, "optim.weight_decay"),
        ({"optim__warmup_steps": -1}, "optim.; warmup_steps"),
        ({"optim__clip": 0}, "optim.clip"),
        ({"ema__decays": []}, "ema.decays"),
        ({"ema__decays": [0.9, 1.0]}, "ema.decays"),
        ({"ema__decays": [0.9, 0.9]}, "ema.decays; repeats"),
        ({"ema__eval": 0.99}, "ema.eval; 0.99"),
        ({"ema__every": 0}, "ema.every"),
        ({"ema__store": "disk"}, "ema.store; host"),
        ({"init__ema": 0.9}, "init.ema; init.from"),
        ({"init__teacher": "dit"}, "init.teacher; init.from"),
        ({"model__width": 7}, "model.width; even"),
        ({"model__dropout": 1.0}, "model.dropout"),
        ({"model__multipliers": []}, "model.multipliers"),
        ({"model__multipliers": [1, 1, 1, 1, 1]}, "model.image_size; halved"),
        ({"model__attention": [5]}, "model.attention"),
        ({"model__conditioning": "t, r"}, "model.conditioning; t,t-r"),
        ({"model__classes": -1}, "model.; classes"),
        ({"data__source": "mnist"}, "data.source; digits"),
        ({"data__augment_p": 1.5}, "data.augment_p"),
        ({"data__path": ""}, "data.path"),
        ({"checkpoint__every": 0}, "checkpoint.every"),
        ({"checkpoint__keep": 0}, "checkpoint.; keep"),
        ({"checkpoint__milestone_every": 3}, "checkpoint.milestone_every; multiple"),
        ({"logging__flush_every": 0}, "logging.flush_every"),
        ({"sample__count": 0}, "sample.count"),
        ({"sample__seed": -1}, "sample.seed"),
        ({"sample__uint8": "ceil"}, "sample.uint8; floor"),
        ({"eval__samples": 1}, "eval.samples"),
        ({"eval__steps": []}, "eval.steps"),
        ({"eval__steps": [1, 0]}, "eval.steps"),
        ({"eval__every": 0}, "eval.every"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        # contradictions between groups
        (
            {"train__compile": "default", "train__jvp": "func", "objective__times__stratified": False},
            "train.compile; objective.times.stratified=true; train.jvp=dual",
        ),
        (
            {"train__compile": "default", "train__activation_checkpointing": "blocks"},
            "train.activation_checkpointing=null or train.compile=null",
        ),
        ({"train__jvp": "func", "train__activation_checkpointing": "blocks"}, "set train.jvp=dual"),
        ({"train__tangent_precision": "fp16"}, "train.tangent_precision must be null or bf16"),
        ({"train__tangent_precision": "bf16", "train__precision": "bf16"}, "needs precision fp32 or tf32"),
        ({"train__activation_checkpointing": "all"}, "null or one of cheap, blocks"),
        ({"guidance": {"omega_prime": 2}}, "guidance needs classes"),
        ({"model__augment_labels": 6}, "data.flip; set model.augment_labels=0"),
        ({"data__flip": True}, "set model.augment_labels=6"),
        ({"data__augment_p": 0.1}, "set model.augment_labels=6"),
    ],
    ids=str,
)
def test_values_out_of_range_name_their_key(tmp_path, change, parts):
    file = write_recipe(tmp_path / "odd.yaml", **change)
    with pytest.raises(ConfigError) as caught:
        load_config(file)
    message = str(caught.value)
    assert message.startswith(f"{file}: ") and "\n" not in message
    assert [part for part in parts.split("; ") if part not in message] == [], message


def test_a_batch_that_does_not_divide_names_one_that_does():
    config = tiny_config(train__batch=10)
    assert split_batch(config, 1) == 10 and split_batch(config, 5) == 2
    for world, near in ((4, 12), (16, 16)):
        with pytest.raises(ConfigError, match=rf"train\.batch 10 .* {world} processes.*--set train\.batch={near}"):
            split_batch(config, world)


def test_overrides_are_checked_as_files_are_and_named_in_errors(recipe):
    config = load_config(recipe(), ["optim.lr=1e-4", "train.steps=1e3", "optim.betas=[9e-1, 0.5]"])
    assert config.optim.lr == 1e-4 and config.train.steps == 1000 and config.optim.betas == (0.9, 0.5)
    for text in ("train.steps=true", "train.steps=", "optim.lr=fast", "train.compile=1", "model.multipliers=2"):
        with pytest.raises(ConfigError, match=re.escape(f"tiny.yaml with --set {text}: {text.partition('=')[0]}")):
            load_config(recipe(), [text])


# --- recipes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_loads_builds_its_network_and_returns_from_yaml(path, tmp_path):
    config = load_config(path)
    (tmp_path / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    assert load_config(tmp_path / "config.yaml") == config
    assert config_from_tree(settings.to_tree(config), "here") == config
    assert len(config.description) > 20 and "\n" not in config.description
    assert not re.search(r"(^|[\s:])/(?:home|work|tmp|root)", path.read_text()), "a place of one machine"
    assert count_parameters(build_network(config, torch.device("meta"))) > 1000


def test_the_cifar10_recipe_is_the_papers():
    """Appendix A and Table 3."""
    config = recipe_of("cifar10")
    with torch.device("meta"):
        assert count_parameters(UNet(config.model)) == 55_932_419
    assert (config.train.batch, config.train.steps, config.optim.lr) == (1024, 800_000, 6e-4)
    assert (config.optim.betas, config.optim.warmup_steps, config.optim.weight_decay) == ((0.9, 0.999), 10_000, 0)
    times, objective = config.objective.times, config.objective
    assert (times.sampler, times.ratio, times.mu, times.sigma) == ("v0", 0.75, -2.0, 2.0)
    assert (objective.p, objective.c, objective.tangent) == (0.75, 1e-3, "(v, 0, 1)")
    assert config.ema.eval == 0.99995 and config.model.dropout == 0.2 and config.model.conditioning == "t,t-r"


@pytest.mark.parametrize(
    ("name", "network", "guidance", "interval", "epochs"),
    [
        ("b4", (4, 768, 12, 12), (1.0, 0.0, 1.0), (0.0, 1.0), 80),
        ("b2", (2, 768, 12, 12), (2.0, 0.5, 1.0), (0.0, 1.0), 240),
        ("m2", (2, 1024, 16, 16), (2.0, 0.5, 1.0), (0.0, 1.0), 240),
        ("l2", (2, 1024, 24, 16), (2.5, 0.92, 0.2), (0.0, 0.8), 240),
        ("xl2", (2, 1152, 28, 16), (2.5, 0.92, 0.2), (0.0, 0.75), 240),
        ("xl2plus", (2, 1152, 28, 16), (2.0, 0.5, 1.0), (0.3, 0.8), 1000),
    ],
)
def test_the_imagenet_recipes_are_table_4(name, network, guidance, interval, epochs):
    config = recipe_of(f"imagenet_{name}")
    model, guided, objective = config.model, config.guidance, config.objective
    assert (model.patch, model.width, model.depth, model.heads) == network
    assert (guided.omega_prime, guided.kappa, pytest.approx(guided.omega)) == guidance
    assert (guided.t_start, guided.t_end, guided.label_drop) == (*interval, 0.1)
    assert 0 <= config.train.steps * config.train.batch / 1_281_167 - epochs < 1e-3 and config.train.batch == 256
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-4, (0.9, 0.95), 0)
    assert (config.ema.decays, config.ema.every, objective.p, objective.c) == ((0.9999,), 1, 1.0, 1e-2)
    assert (objective.times.ratio, objective.times.mu, objective.times.sigma) == (0.25, -0.4, 1.0)


@pytest.mark.parametrize(
    ("name", "network", "parameters", "guidance", "interval"),
    [
        ("b2", (768, 12, 12), 88.9, 7.5, (0.4, 0.65)),
        ("m2", (768, 24, 12), 173.9, 10.5, (0.4, 0.6)),
        ("l2", (1024, 32, 16), 409.1, 10.5, (0.4, 0.6)),
        ("xl2", (1024, 48, 16), 610.4, 8.0, (0.42, 0.62)),
    ],
)
def test_the_imf_recipes_are_the_published_ones(name, network, parameters, guidance, interval):
    """Sizes without the branch for v, as published; that of training has more."""
    config = recipe_of(f"imf_{name}")
    model, objective = config.model, config.objective
    assert (model.width, model.depth, model.heads, model.patch, model.head_depth) == (*network, 2, 8)
    bare = replace(config, model=replace(model, v_head=False), objective=replace(objective, velocity="boundary"))
    assert count_parameters(build_network(bare, torch.device("meta"))) / 1e6 == pytest.approx(parameters, abs=0.05)
    assert abs(config.train.steps * config.train.batch / 1_281_167 - 640) < 1e-3 and config.train.batch == 1024
    assert config.optim.warmup_steps * config.train.batch / 1_281_167 == pytest.approx(10, abs=1e-3)
    assert (config.optim.lr, config.optim.betas, config.optim.weight_decay) == (1e-4, (0.9, 0.95), 0)
    assert (config.ema.decays, objective.p, objective.c) == ((0.9999,), 1.0, 1e-2)
    assert (objective.times.ratio, objective.times.mu, objective.times.sigma) == (0.5, -0.4, 1.0)
    assert objective.omega_range == (1, 8) and objective.label_drop == 0.1
    assert (config.sample.guidance, config.sample.interval) == (guidance, interval)


def test_the_initial_network_is_a_function_of_the_seed():
    cpu = torch.device("cpu")
    one, other = (build_network(tiny_config(seed=seed), cpu) for seed in (1, 2))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    again = build_network(tiny_config(seed=1), cpu)
    assert torch.equal(torch.get_rng_state(), before), "building a network moved the global generator"
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), again.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_config_classes_are_frozen():
    kinds = [RunConfig, *(kind for kind, _ in settings.leaves(RunConfig).values())]
    assert len(set(kinds)) > 10
    assert all(is_dataclass(kind) and kind.__dataclass_params__.frozen for kind in kinds)


# --- earlier versions ------------------------------------------------------------------------------------------


def test_the_settings_of_an_earlier_version_load():
    old = tiny_tree(**guided_latent_changes(), train__jvp="func")
    objective = old.pop("objective")
    old["loss"] = {"p": objective["p"], "c": objective["c"], "tangent": objective["tangent"], "jvp": "func"}
    old["times"] = {**objective["times"], "share": "per_sample"}
    del old["train"]["jvp"], old["times"]["stratified"]
    old["guidance"] |= {"omega": 1.0, "dropped": "independent"}
    del old["guidance"]["unconditional_rows"]
    new = tiny_config(**guided_latent_changes(), train__jvp="func", objective__times__stratified=False)
    new = replace(new, guidance=replace(new.guidance, unconditional_rows="any"))
    assert config_from_tree(old, "an old run") == new
    assert config_from_tree(upgraded(old), "an old run") == new, "upgraded twice"
    for group in ("times", "loss"):
        with pytest.raises(ConfigError, match=r"an old run: (times|loss)\S* is not a setting"):
            config_from_tree({**old, group: 3}, "an old run")


def test_a_recipe_may_have_one_of_an_earlier_version_as_its_base(tmp_path):
    old = tiny_tree()
    objective = old.pop("objective")
    old |= {"times": objective.pop("times"), "loss": {key: objective[key] for key in ("p", "c", "tangent")}}
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(old))
    (tmp_path / "new.yaml").write_text("base: old\nobjective: {p: 0.5}\n")
    assert load_config(tmp_path / "new.yaml") == tiny_config(objective__p=0.5)


# --- what may change -------------------------------------------------------------------------------------------


def test_changes_lists_exactly_what_differs():
    old, new = tiny_config(), tiny_config(train__steps=9, optim__lr=0.5)
    assert changes(old, new) == {"train.steps": (6, 9), "optim.lr": (1e-3, 0.5)}
    assert changes(old, old) == {}
    assert changes(tiny_config(eval__steps=[1]), tiny_config(eval__steps=[1, 2])) == {"eval.steps": ([1], [1, 2])}


FREE = {
    "description": "other words",
    "data__root": "elsewhere",
    "data__path": "elsewhere",
    "train__steps": 7,
    "train__microbatch": 2,
    "ema__eval": 0.5,
    "train__compile": "default",
    "checkpoint__every": 3,
    "logging__flush_every": 2,
    "sample__count": 4,
    "eval__samples": 10,
}
ON_REQUEST = {
    "optim__lr": 2e-3,
    "optim__warmup_steps": 9,
    "optim__clip": 0.5,
    "ema__decays": [0.9, 0.5, 0.99],
    "train__spike_guard": 3,
}
NEVER = {
    "seed": 4,
    "model__width": 10,
    "model__dropout": 0.1,
    "data__source": "cifar10",
    "objective__times__ratio": 0.5,
    "objective__p": 1.0,
    "optim__betas": [0.9, 0.95],
    "ema__decays": [0.9, 0.99],
    "train__batch": 16,
    "train__precision": "bf16",
    "init__from": "runs/other",
}


@pytest.mark.parametrize(
    ("change", "when"),
    [({key: value}, when) for when, keys in enumerate((FREE, ON_REQUEST, NEVER)) for key, value in keys.items()],
    ids=str,
)
def test_what_may_change_when_a_run_continues(change, when):
    fixed = {"train__jvp": "func", "ema__decays": [0.9, 0.5]}
    old, new = tiny_config(**fixed), tiny_config(**{**fixed, **change})
    (key,) = changes(old, new)
    if when == 0:
        refuse_changed_run(old, new, "here")
        return
    with pytest.raises(ConfigError) as caught:
        refuse_changed_run(old, new, "runs/a run")
    message, shown = str(caught.value), settings.shown(settings.flatten(settings.to_tree(new))[key])
    assert "\n" not in message and f"{key} is" in message and f"{shown} now" in message
    assert "bash run.sh resume 'runs/a run'" in message
    if when == 1:
        refuse_changed_run(old, new, "here", {key})
        repeat, _, change = message.partition("repeat --set ")[2].partition(". To change it from here on: --set ")
        for text, config in ((repeat, old), (change, new)):  # what is printed can be pasted
            tree = settings.apply_overrides(settings.to_tree(config), shlex.split(text))
            assert config_from_tree(tree, "pasted") == config
    else:
        assert "--out" in message
        same_network = not key.startswith("model.") or key == "model.dropout"
        assert same_network == ("--set init.from='runs/a run'" in message) == ("init.ema=weights" in message)
        with pytest.raises(ConfigError, match="another run"):
            refuse_changed_run(old, new, "here", {key})


def test_guidance_may_change_on_request_but_not_begin():
    without = tiny_config(**{**guided_latent_changes(), "guidance": None})
    with_it = tiny_config(**guided_latent_changes())
    stronger = replace(with_it, guidance=replace(with_it.guidance, omega_prime=2.0))
    refuse_changed_run(with_it, stronger, "here", {"guidance.omega_prime"})
    with pytest.raises(ConfigError, match=r"guidance\.label_drop is null there, 0\.1 now"):
        refuse_changed_run(without, with_it, "here", {"guidance.omega_prime"})


def test_changeable_keys_exist():
    known = settings.leaves(RunConfig)
    for key in (*CHANGEABLE, *CHANGEABLE_ON_REQUEST):
        assert any(settings.within(path, [key]) for path in known), key
