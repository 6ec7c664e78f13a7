"""Figures 2 and 3: the mixture's closed forms against other ways to them, and the command that draws."""

import json
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from PIL import Image
from report_helpers import refused
from running import ROOT

from eval.toy.measure import errors, in_float64, sliced_wasserstein
from eval.toy.mixture import Mixture
from eval.toy.train import MeasureConfig, PlaneNetwork, Toy2dConfig, Training
from eval.toy2d import main
from meanflow.errors import AssetError, ConfigError, NumericsError
from meanflow.jvp import take_jvp
from meanflow.objectives.meanflow import TANGENTS
from meanflow.random import generator
from meanflow.training import settings

RECIPE = ROOT / "recipes" / "figures" / "toy2d.yaml"
COMPONENTS = ((1.5, -0.5, 0.4), (-1.0, 0.8, 0.3), (0.2, 1.0, 0.6))
SMALL = [
    *("network.width=16", "network.depth=2", "train.steps=30", "train.batch=64", "measure.points=100"),
    *("measure.samples=200", "measure.steps=[1,3]", "draw.arrows=5", "draw.samples=50"),
]


@pytest.fixture
def mixture() -> Mixture:
    return Mixture(COMPONENTS)


def points(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """z (n, 2) and t > r (n,), float64."""
    draws = generator(seed, "points")
    t, r = torch.rand(2, n, generator=draws, dtype=torch.float64).mul(0.9).add(0.05).sort(0, descending=True).values
    return 1.5 * torch.randn(n, 2, generator=draws, dtype=torch.float64), t, r


def small(tmp_path, *overrides: str) -> list[str]:
    return [str(RECIPE), "--out", str(tmp_path), *(part for text in (*SMALL, *overrides) for part in ("--set", text))]


def test_v_is_what_the_score_says(mixture):
    """z_t = (1 − t) x + t ε gives E[ε | z] = −t ∇ log p_t(z), and so v = −(z + t ∇ log p_t) / (1 − t)."""
    z, t, _ = points(50)
    z.requires_grad_()
    (score,) = torch.autograd.grad(mixture.log_density(z, t).sum(), z)
    expected = -(z + t[:, None] * score) / (1 - t[:, None])
    torch.testing.assert_close(mixture.velocity(z, t), expected, rtol=1e-9, atol=1e-9)


def test_v_and_the_density_are_those_of_samples(mixture):
    """E[ε − x | z_t = z], with data drawn and each x weighted by the density of the ε that leads from it to z."""
    x = mixture.sample(400_000, generator(0, "data"))
    for (z,), t in (((torch.tensor([0.3, 0.4]),), 0.6), ((torch.tensor([1.0, 0.0]),), 0.4)):
        eps = (z - (1 - t) * x) / t
        weight = (-eps.square().sum(1) / 2).exp()
        v = (weight[:, None] * (eps - x)).sum(0) / weight.sum()
        density = weight.mean() / (2 * torch.pi * t**2)
        where = z[None].double(), torch.tensor([t], dtype=torch.float64)
        torch.testing.assert_close(mixture.velocity(*where)[0], v, rtol=0.01, atol=0.01)
        torch.testing.assert_close(mixture.log_density(*where).exp()[0], density, rtol=0.01, atol=0)


def test_one_component_flows_as_the_gaussian_does():
    alone = Mixture(((0.7, -0.3, 0.5),))
    closed = Gaussian(torch.tensor([0.7, -0.3], dtype=torch.float64), torch.full((2,), 0.5, dtype=torch.float64))
    z, t, r = points(30)
    t[0], r[1], r[2] = 1, 0, t[2]
    torch.testing.assert_close(alone.velocity(z, t), closed.velocity(z, t))
    torch.testing.assert_close(alone.flow(z, t, r), closed.flow(z, t, r), rtol=1e-7, atol=1e-7)
    expected = closed.average_velocity(z, r=r, t=t)
    torch.testing.assert_close(alone.average_velocity(z, r, t), expected, rtol=1e-6, atol=1e-6)


def test_the_true_u_satisfies_the_identity(mixture):
    """Eq. (6): u = v − (t − r) du/dt, with du/dt by central differences along (v, 0, 1), Eq. (8)."""
    z, t, r = points(30)
    keep = t - r > 0.05
    z, t, r = z[keep], t[keep], r[keep]
    v, h = mixture.velocity(z, t), 1e-3
    ahead, behind = (mixture.average_velocity(z + s * h * v, r, t + s * h) for s in (1, -1))
    dudt = (ahead - behind) / (2 * h)
    expected = v - (t - r)[:, None] * dudt
    torch.testing.assert_close(mixture.average_velocity(z, r, t), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("tangent", TANGENTS)
def test_the_network_goes_through_the_kits_derivative(tangent):
    """Dual numbers and torch.func.jvp give it the same loss and gradient."""
    config = settings.load(Toy2dConfig, RECIPE)
    network, objective = PlaneNetwork(config.network).double(), replace(config.objective, tangent=tangent)
    z, t, r = points(20)
    r[15:] = t[15:]
    found = {}
    for method in ("dual", "func"):
        loss = objective.loss(network, z, z.cos(), r, t, jvp=take_jvp(method)).mean
        found[method] = (loss, *torch.autograd.grad(loss, list(network.parameters())))
    torch.testing.assert_close(found["dual"], found["func"])


def test_sliced_wasserstein_of_known_cases():
    a = torch.randn(1000, 2, generator=generator(0, "a"), dtype=torch.float64)
    assert sliced_wasserstein(a, a.flip(0)) == 0
    shift = torch.tensor([0.3, -0.4], dtype=torch.float64)
    # In direction e the distance is |shift·e|, and the mean of (shift·e)² over directions is ‖shift‖²/2.
    assert sliced_wasserstein(a, a + shift) == pytest.approx(0.5 / 2**0.5, rel=1e-9)
    with pytest.raises(NumericsError, match="not finite"):
        sliced_wasserstein(a, a / 0)


def test_the_truth_has_no_error(mixture):
    lines = errors(mixture.average_velocity, mixture, MeasureConfig(points=50, samples=2, steps=(1, 2)), seed=0)
    assert all(line["u"] == 0 for line in lines) and lines[0]["v"] == 0
    assert [line["v"] for line in lines[1:-1]] == sorted(line["v"] for line in lines[1:-1]) and lines[1]["v"] > 0.01


@pytest.mark.parametrize("velocity", ["marginal", "conditional"])
def test_training_brings_u_towards_the_truth(velocity):
    overrides = ["network.width=32", "network.depth=3", "train.steps=400", "train.batch=128", f"velocity={velocity}"]
    config = settings.load(Toy2dConfig, RECIPE, [*overrides, "mixture=[[0.5, -0.5, 0.6]]"])
    mixture, measure = Mixture(config.mixture), MeasureConfig(points=200, samples=2, steps=(1, 2))
    training = Training(config, mixture)
    before = errors(in_float64(training.network), mixture, measure, seed=1)
    after = errors(in_float64(training.run()), mixture, measure, seed=1)
    factor = 0.3 if velocity == "marginal" else 0.5  # ε − x is v with noise
    for old, new in zip(before, after, strict=True):
        assert new["u"] < factor * old["u"], new


def test_a_rate_that_breaks_the_loss_is_said(mixture):
    config = settings.load(Toy2dConfig, RECIPE, ["train.lr=1e30", "train.steps=20", "train.batch=8"])
    with pytest.raises(NumericsError, match=r"not finite at step 20: a smaller train\.lr"):
        Training(config, mixture).run()


# --- the command -----------------------------------------------------------------------------------------------


def test_the_command_draws_and_repeats_itself(tmp_path, capsys):
    assert main(small(tmp_path / "a")) == 0
    said = capsys.readouterr().out
    torch.manual_seed(5)  # nothing hangs on the global generator
    assert main(small(tmp_path / "b")) == 0
    for name in ("numbers.json", "toy2d.png"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    numbers = json.loads((tmp_path / "a" / "numbers.json").read_text())
    assert numbers["distance"]["v"].keys() == numbers["distance"]["u"].keys() == {"1", "3"}
    assert numbers["distance"]["v"]["1"] > numbers["distance"]["v"]["3"] > numbers["distance"]["exact flow"]
    assert numbers["config"]["train"]["steps"] == 30
    assert f"{numbers['error'][-1]['u']:.2%}" in said and "1-NFE" in said
    assert Image.open(tmp_path / "a" / "toy2d.png").width >= 1000


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    assert main([*small(tmp_path / "out"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "width: 16" in said and "parameters" in said and "ms a step" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.leraning_rate=1", "train.leraning_rate is not a setting"),
        ("velocity=average", "velocity must be one of marginal, conditional"),
        ("mixture=[[0, 0, 0]]", "mixture must be"),
        ("mixture=[[0, 0]]", "mixture[0] must be a list of 3"),
        ("measure.steps=[4]", "measure.steps must be two or more"),
        ("draw.times=[0, 0.5, 1]", "draw.times must be in (0, 1]"),
        ("network.depth=0", "network.width, depth and octaves must be"),
        ("train.ema=1", "train.betas and ema must be"),
    ],
)
def test_a_bad_setting_is_one_line(override, words, tmp_path):
    assert words in refused(ConfigError, main, RECIPE, "--out", tmp_path / "out", "--set", override)
    assert not (tmp_path / "out").exists()


def test_an_unwritable_folder_is_reported_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "out", tmp_path / "file", "/proc/x"):
        assert "cannot be written" in refused(AssetError, main, RECIPE, "--out", out)
