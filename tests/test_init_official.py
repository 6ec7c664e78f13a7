"""`init.from` an official DiT or SiT checkpoint: what u is at the start, against a plain implementation of theirs."""

import argparse
import json
from pathlib import Path

import pytest
import torch
from plain_networks import plain_official_dit
from running import guided_latent_changes, newest, tiny_config, train_run

from dit.embedding import sincos_positions
from meanflow.errors import AssetError, ConfigError
from meanflow.training.config import InitConfig
from meanflow.training.official.dit import STEPS, release_of, steps_in_unit_time
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import fresh_state, initialise

CPU = torch.device("cpu")
MODEL = {"kind": "dit", "image_size": 8, "channels": 1, "patch": 2, "width": 32, "depth": 2, "heads": 4}


def official(seed: int = 0, image_size=8, channels=1, patch=2, width=32, depth=2, classes=10, outputs=2):
    """Random tensors by the releases' names, with positions and twice the channels (`outputs`) as they have."""
    g = torch.Generator().manual_seed(seed)
    shapes = {"x_embedder.proj": (width, channels, patch, patch), "t_embedder.mlp.0": (width, 256)}
    shapes |= {"t_embedder.mlp.2": (width, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    shapes |= {"final_layer.linear": (patch * patch * channels * outputs, width)}
    layers = {
        "adaLN_modulation.1": (6, 1),
        "attn.qkv": (3, 1),
        "attn.proj": (1, 1),
        "mlp.fc1": (4, 1),
        "mlp.fc2": (1, 4),
    }
    for k in range(depth):
        shapes |= {f"blocks.{k}.{name}": (a * width, b * width) for name, (a, b) in layers.items()}
    found = {"pos_embed": sincos_positions(image_size // patch, width)}
    for name, shape in shapes.items():
        found[f"{name}.weight"] = torch.randn(shape, generator=g) * shape[1] ** -0.5
        found[f"{name}.bias"] = 0.2 * torch.randn(shape[0], generator=g)
    found["y_embedder.embedding_table.weight"] = torch.randn(classes + 1, width, generator=g)
    return found


def state_of(path: Path, model: dict | None = None, **init):
    """A fresh state that is initialised from `path`, and what is said of it."""
    model = {"conditioning": "t,t-r", "classes": 10} | MODEL | (model or {})
    config = tiny_config(model=model, init__from=str(path), **{f"init__{key}": value for key, value in init.items()})
    state = fresh_state(config, CPU)
    return state, initialise(state, config.init)


def some():
    """z (6, 1, 8, 8) and t (6,)."""
    return torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor(
        [0.0, 0.1, 0.37, 0.5, 0.9, 1.0]
    )


# --- SiT: exactly its velocity ----------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioning", ["t,t-r", "t,r", "t,r,t-r"])
@pytest.mark.parametrize("outputs", [1, 2])
def test_u_is_sits_velocity(conditioning, outputs, tmp_path):
    """u(z, r, t) = −v_SiT(z, 1 − t) for every r, since SiT's time runs from noise to data: v_SiT = x − ε."""
    weights = official(outputs=outputs)
    torch.save(weights, tmp_path / "SiT.pt")
    state, _ = state_of(tmp_path / "SiT.pt", {"conditioning": conditioning})
    (z, t), labels = some(), torch.tensor([0, 3, 9, 10, 10, 5])  # 10: no class
    expected = -plain_official_dit(weights, 4, z, 1 - t, labels)[:, :1]
    for r in (t, torch.zeros(6), t / 2):
        torch.testing.assert_close(state.network(z, r, t, labels), expected, rtol=1e-5, atol=1e-5)
    assert expected.std() > 0.3
    for average in state.ema.averages.values():
        assert all(torch.equal(average[name], p) for name, p in state.network.named_parameters())


def test_the_other_embedder_learns(tmp_path):
    torch.save(official(), tmp_path / "SiT.pt")
    state, done = state_of(tmp_path / "SiT.pt")
    (z, t), embedder = some(), state.network.time_embed["t-r"]
    state.network(z, 0 * t, t).square().sum().backward()
    assert all(p.grad.any() for p in embedder.fc2.parameters()) and embedder.fc1.weight.any()
    assert sorted(done.fresh) == sorted(
        f"time_embed.t-r.{layer}.{leaf}" for layer in ("fc1", "fc2") for leaf in ("weight", "bias")
    )
    assert len(done.taken) + len(done.fresh) == len(list(state.network.parameters()))


def test_which_weights_are_taken(tmp_path):
    """A training state has model and ema; init.ema chooses."""
    content = {"model": official(1), "ema": official(2), "opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}
    torch.save(content, tmp_path / "0400000.pt")
    for ema, source in ((None, "ema"), ("weights", "model")):
        state, done = state_of(tmp_path / "0400000.pt", ema=ema)
        bias = state.network.label_embed.weight
        assert torch.equal(bias, content[source]["y_embedder.embedding_table.weight"]) and done.weights == source
        assert f"(official, {source}): took 31 of 35 tensors; as SiT's velocity" in done.summary()
    with pytest.raises(ConfigError, match=r"init\.ema: .* it holds ema, model"):
        state_of(tmp_path / "0400000.pt", ema=0.9999)


# --- DiT: a start ------------------------------------------------------------------------------------------------


def test_dits_steps_are_those_of_equal_noise():
    t = steps_in_unit_time()
    betas = [1e-4 + (0.02 - 1e-4) * k / (STEPS - 1) for k in range(STEPS)]
    for k in (0, 250, 999):
        alpha_bar = torch.tensor([1 - beta for beta in betas[: k + 1]], dtype=torch.float64).prod()
        assert ((1 - t[k]) / t[k]).square() == pytest.approx(float(alpha_bar / (1 - alpha_bar)), rel=1e-9)
    assert t.diff().min() > 0


def test_dits_noise_prediction_is_taken_over_where_it_varies_slowly(tmp_path):
    """Nothing is negated or reversed; where it varies slowly the refitted embedder gives what DiT's gives."""
    weights = official()
    weights["t_embedder.mlp.0.weight"].view(32, 2, 128)[..., :64] = 0  # the faster half of the frequencies
    torch.save(weights, tmp_path / "DiT-S-2.pt")
    state, done = state_of(tmp_path / "DiT-S-2.pt")
    steps, (z, _) = torch.tensor([0, 50, 200, 400, 700, 999]), some()
    t, labels = steps_in_unit_time()[steps].float(), torch.arange(6)
    expected = plain_official_dit(weights, 4, z, steps.float(), labels)[:, :1]
    torch.testing.assert_close(state.network(z, t, t, labels), expected, rtol=0.01, atol=0.01)
    assert "as DiT's noise prediction, which is only a start" in done.summary() and "error of 0." in done.summary()


@pytest.mark.parametrize(
    ("name", "release"),
    [("DiT-XL-2-256x256.pt", "dit"), ("SiT-XL-2-256.pt", "sit"), ("my_dit.pt", "dit"), ("edited.pt", "sit")],
)
def test_the_name_says_which_release_it_is_and_a_setting_overrides_it(name, release, tmp_path):
    assert release_of(tmp_path / name) == release
    torch.save(official(), tmp_path / name)
    said = {teacher: state_of(tmp_path / name, teacher=teacher)[1].summary() for teacher in (None, "sit", "dit")}
    assert "as SiT's velocity" in said["sit"] and "as DiT's noise" in said["dit"]
    assert said[None] == said[release]


# --- refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (
            {"blocks.1.attn.qkv.bias": None, "t_embedder.mlp.2.bias": None},
            "2 tensors missing: blocks.1.attn.qkv.bias, t_",
        ),
        ({"x_embedder.proj.weight": None}, "1 tensor missing: x_embedder.proj.weight"),
        ({"projectors.0.weight": torch.zeros(2)}, "1 tensor unknown: projectors.0.weight"),
        ({"blocks.0.mlp.fc1.bias": torch.zeros(3)}, "1 tensor of another shape: blocks.0.mlp.fc1.bias"),
        ({"final_layer.linear.bias": torch.zeros(12)}, "1 tensor of another shape: final_layer.linear.bias"),
        ({"pos_embed": torch.zeros(1, 16, 32)}, "1 tensor of another shape: pos_embed"),
    ],
)
def test_everything_or_nothing(changes, line, tmp_path):
    torch.save({k: v for k, v in (official() | changes).items() if v is not None}, tmp_path / "SiT.pt")
    with pytest.raises(AssetError) as error:
        state_of(tmp_path / "SiT.pt")
    assert line in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("there", "here", "line"),
    [
        ({"width": 64, "depth": 3}, {}, "(depth 2, width 32): set model.depth=3 model.width=64"),
        ({"classes": 7}, {}, "set model.classes=7"),
        ({"image_size": 16}, {}, "set model.image_size=16"),
        ({"patch": 4}, {}, "set model.patch=4"),
        ({"width": 384, "depth": 1}, {"width": 384, "depth": 1}, "set model.heads=6"),
        ({}, {"conditioning": "t-r"}, "set t,t-r"),
        ({}, {"kind": "unet", "image_size": 8, "multipliers": [1]}, "needs model.kind=dit"),
    ],
)
def test_another_network_names_the_settings(there, here, line, tmp_path):
    torch.save(official(**there), tmp_path / "SiT.pt")
    with pytest.raises(ConfigError) as error:
        if here.get("kind") == "unet":
            state = fresh_state(tiny_config(), CPU)
            initialise(state, InitConfig(str(tmp_path / "SiT.pt")))
        state_of(tmp_path / "SiT.pt", here)
    assert line in str(error.value) and "\n" not in str(error.value)


def test_a_setting_that_says_nothing_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"init\.teacher: .* is no official DiT or SiT checkpoint"):
        initialise(fresh_state(tiny_config(), CPU), InitConfig(str(tmp_path), teacher="dit"))


# --- in a run ----------------------------------------------------------------------------------------------------


def test_a_run_begins_with_it_and_says_so_once(tmp_path, alone, logged):
    torch.save(official(image_size=4, channels=4, width=16), tmp_path / "SiT.pt")
    changes = guided_latent_changes(tmp_path / "latents") | {"init__from": str(tmp_path / "SiT.pt")}
    train_run(tiny_config(**changes, optim__lr=1e-30, train__steps=1), RunFolder(tmp_path / "run"), alone)
    (line,) = [message for message in logged.messages if message.startswith("init.from")]
    assert "output negated, time reversed" in line and "the first 4 of 8 output channels" in line and "\n" not in line
    assert json.loads((tmp_path / "run" / "init.json").read_text())["changed"] in line
    assert newest(tmp_path / "run").model["time_embed.t-r.fc2.weight"].abs().max() < 1e-29


def test_a_missing_file_is_known_before_latents_are_prepared(tmp_path, alone):
    changes = guided_latent_changes(tmp_path / "latents") | {"init__from": str(tmp_path / "none.pt")}
    with pytest.raises(AssetError, match=r"init\.from .*none\.pt: no such file or folder; .* --set init\.from=PATH"):
        train_run(tiny_config(**changes), RunFolder(tmp_path / "run"), alone)
    assert not (tmp_path / "latents").exists()
