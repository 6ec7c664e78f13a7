"""Every objective in training: resumed, divided, in two processes, guided, in bf16, compiled, sampled."""

import signal
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from method_helpers import UNET, perturbed
from running import (
    assert_equal_runs,
    comparable_metrics,
    gradients_of_step,
    guided_latent_changes,
    in_processes,
    tiny_config,
    train_run,
)
from torch import nn

from meanflow.errors import ConfigError
from meanflow.objectives import Objective
from meanflow.training import compiling
from meanflow.training.batches import random_batch
from meanflow.training.model import Model, noise
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import Ema, build_network, fresh_state
from meanflow.training.step import make_loss

CPU, META = torch.device("cpu"), torch.device("meta")
KINDS = Objective.kinds()
PLAIN_NETWORK = {"imeanflow": {"velocity": "boundary", "omega_max": 1.0}}  # u(z, r, t) alone: no other head or input
kinds = pytest.mark.parametrize("kind", KINDS)
GUIDED = {"guidance": {"omega_prime": 2.0, "kappa": 0.5, "fade_from": 0.8, "label_drop": 0.2}}


def config_of(kind: str, **changes):
    """The tiny run with this objective's default settings, its teacher among the averages, and half a batch r < t."""
    objective, decays = {"kind": kind, **PLAIN_NETWORK.get(kind, {})}, [0.9]
    if decay := KINDS[kind]().teacher_decay:
        decays.append(decay)
    changes = {"model__width": 4, "train__steps": 4, "ema__decays": decays, **changes}
    return tiny_config(objective=objective, **changes)


@kinds
def test_a_resumed_run_is_bit_equal(kind, tmp_path, alone):
    """With dropout, labels and uneven micro-batches."""

    def stop(run, config, state, ctx):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)

    rich = {"model__dropout": 0.2, "model__classes": 10, "train__microbatch": 3, "eval__every": 1}
    config = config_of(kind, **rich)
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    assert train_run(config, whole, alone) == 0
    assert train_run(config, parts, alone, stop) == 130
    assert train_run(config, parts, alone) == 0
    assert_equal_runs(whole.path, parts.path)
    lines = comparable_metrics(whole.path)
    logged = lines[0].keys() - {"step", "images", "loss", "grad_norm", "lr"}
    assert {"error", "error_r_eq_t"} & logged and logged <= KINDS[kind].titles.keys()


def gradients(ctx, folder=None) -> dict[str, dict[str, torch.Tensor]]:
    return {kind: gradients_of_step(config_of(kind, train__microbatch=None), ctx, 1) for kind in KINDS}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    return in_processes(2, gradients, tmp_path_factory.mktemp("pair"))


def assert_same(found, expected):
    scale = max(g.abs().max() for g in expected.values())
    for name, g in expected.items():
        torch.testing.assert_close(found[name] / scale, g / scale, rtol=0, atol=2e-6)


@kinds
def test_the_gradient_does_not_depend_on_how_the_batch_is_divided(kind, pair, alone):
    expected = gradients_of_step(config_of(kind, train__microbatch=None), alone, 1)
    assert_same(gradients_of_step(config_of(kind, train__microbatch=3), alone, 1), expected)
    for member in pair:
        assert_same(member[kind], expected)


def gradient_of(config, network, ema, batch) -> torch.Tensor:
    torch.manual_seed(0)
    network.zero_grad()
    make_loss(network, config, CPU, ema)(batch).mean.backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])


@kinds
@pytest.mark.parametrize("backbone", ["unet", "dit"])
def test_both_backbones_in_every_way_of_computing(kind, backbone):
    """Guided where that makes sense; recomputed activations change nothing, and bf16 little."""
    guidance = GUIDED if KINDS[kind].learns_velocity else {}
    model = {"model__classes": 10, "model__width": 4} if backbone == "unet" else guided_latent_changes()
    config = config_of(kind, **{"model__width": 16, "train__microbatch": None, **model, **guidance})
    state = fresh_state(config, CPU)
    perturbed(state.network).train()
    state.ema.restart()
    batch = replace(random_batch(config, 16, CPU), progress=0.66)
    compute = partial(gradient_of, network=state.network, ema=state.ema, batch=batch)
    expected = compute(config)
    assert expected.isfinite().all() and expected.any()
    for change, tolerance in ({"activation_checkpointing": "blocks"}, 1e-5), ({"precision": "bf16"}, 0.1):
        found = compute(replace(config, train=replace(config.train, **change)))
        assert (found - expected).norm() < tolerance * expected.norm(), change


@kinds
def test_a_step_does_not_wait_for_the_device_and_logs_what_is_on_it(kind):
    """On the meta device, whose numbers no host can read; r and t are on the CPU, as in training."""
    guidance = GUIDED if KINDS[kind].learns_velocity else {}
    config = config_of(kind, model__classes=10, train__microbatch=None, **guidance)
    network = build_network(config, META).train()
    loss = make_loss(network, config, META, Ema(network, config.ema))
    out = loss(replace(random_batch(config, 16, META), progress=0.66))
    out.mean.backward()
    logged = [value[0] if isinstance(value, tuple) else value for value in out.logged.values()]
    assert {value.device for value in (out.per_sample, *logged)} == {META}
    assert not any(value.requires_grad for value in logged)
    assert {value[1].device.type for value in out.logged.values() if isinstance(value, tuple)} <= {"cpu"}  # masks


class Small(nn.Module):
    """Quick to compile."""

    def __init__(self):
        super().__init__()
        self.config = UNET
        self.first, self.last, self.times = nn.Conv2d(1, 4, 3), nn.Conv2d(4, 1, 3, padding=2), nn.Linear(2, 4)

    def forward(self, z, r, t, run_block=None):
        h = self.first(z) + self.times(torch.stack([r, t], dim=1))[:, :, None, None]
        return self.last(F.silu(h))


@kinds
def test_compiled_steps_are_the_eager_ones(kind, monkeypatch):
    """In the middle of the schedules. `aot_eager` traces as torch.compile does and runs the graph as it is."""
    original, given = torch.compile, []

    def compile(function, dynamic, mode, **how):
        given.append(function)
        return original(function, dynamic=dynamic, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", compile)
    config = config_of(kind, train__microbatch=None)
    torch.manual_seed(0)
    network = Small()
    ema = Ema(network, config.ema)
    compiled = replace(config, train=replace(config.train, compile="default"))
    batch = replace(random_batch(config, 8, CPU), progress=0.66)
    found, expected = (gradient_of(how, network, ema, batch) for how in (compiled, config))
    assert given and (found - expected).norm() < 1e-5 * expected.norm()


@kinds
def test_what_makes_no_sense_is_refused_in_one_line(kind):
    objective = KINDS[kind]
    if not objective.learns_velocity:
        with pytest.raises(ConfigError, match=r"does not learn u\(z, t, t\), which guidance evaluates: set guidance"):
            config_of(kind, model__classes=10, **GUIDED)
        assert config_of(kind, model__classes=10, guidance={"omega_prime": 1.0}).guidance.terms == ()
    if objective.same_dropout:
        with pytest.raises(ConfigError, match=r"same dropout mask in two passes.* set train.compile=null"):
            config_of(kind, model__dropout=0.1, train__compile="default")
        assert config_of(kind, model__dropout=0.1, train__compile="auto")
    if not objective.needs_jvp:
        with pytest.raises(
            ConfigError, match=r"tangent_precision has no effect: objective.kind=\w+ takes no derivative"
        ):
            config_of(kind, train__tangent_precision="bf16")


def test_auto_does_not_compile_where_masks_must_be_equal(monkeypatch):
    monkeypatch.setattr(compiling, "mode_of_step", lambda config, images: "default")
    cuda = torch.device("cuda")
    for kind, objective in KINDS.items():
        for dropout in (0.0, 0.1):
            config = config_of(kind, model__dropout=dropout, train__steps=20_000)
            mode = compiling.chosen_mode(config, cuda, 8)
            assert (mode is None) == (objective.same_dropout and dropout > 0)


@kinds
def test_samples_depend_on_seed_and_number_alone(kind, tmp_path):
    config = config_of(kind)
    network = perturbed(fresh_state(config, CPU).network).eval()
    model = Model(network, config, tmp_path, "0.9", {}, None)
    whole = model.sample(5, steps=3)
    torch.testing.assert_close(whole, model.sample(5, steps=3, batch=2))
    torch.testing.assert_close(whole, model.sample(5, grid=(1, 2 / 3, 1 / 3, 0)), rtol=1e-4, atol=1e-5)
    z, time = noise(0, 0, 5, config.z_shape), torch.ones(5)
    with torch.no_grad():
        if config.objective.sampler == "renoise":
            for k, t in enumerate((1, 2 / 3, 1 / 3)):
                x = z - t * network(z, 0 * time, t * time)
                r = t - 1 / 3
                z = (1 - r) * x + r * noise(0, 0, 5, config.z_shape, k + 1)
        else:
            for t in (1, 2 / 3, 1 / 3):
                end = t if config.objective.sampler == "euler" else t - 1 / 3
                z = z - network(z, end * time, t * time) / 3
    torch.testing.assert_close(whole, z, rtol=1e-4, atol=1e-4)
