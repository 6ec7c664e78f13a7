"""Guidance as an input of the network: training runs that draw it, sampling and scoring that choose it, refusals."""

import json
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from guided_helpers import GUIDED
from running import assert_equal_runs, gradients_of_step, one_line, tiny_config, train_run

from eval import classifier, fid, sample, sweep
from eval.reports.read import read_run
from meanflow.errors import ConfigError, UserError, run_main
from meanflow.guidance import GuidanceInput
from meanflow.training import estimate
from meanflow.training.batches import BatchStream, random_batch
from meanflow.training.costs import forward_multiply_adds
from meanflow.training.model import load, noise
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from meanflow.training.setup import open_data
from meanflow.training.state import build_network, count_parameters
from meanflow.training.step import make_loss

CPU = torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> RunFolder:
    """A short run whose network takes guidance as an input, to be read only."""
    run = RunFolder(tmp_path_factory.mktemp("guided") / "run")
    sampled = {"sample__guidance": 3.0, "sample__interval": [0.25, 0.75]}
    train_run(tiny_config(**GUIDED, **sampled, train__steps=30, optim__lr=0.01), run, ALONE)
    return run


def test_the_speed_of_a_large_network_is_measured_on_some_of_its_blocks(monkeypatch):
    config = tiny_config(**GUIDED)
    monkeypatch.setattr(estimate, "CPU_PARAMETERS", count_parameters(build_network(config, CPU)) // 2)
    rate, how = estimate._rate(config, CPU, 2, forward_multiply_adds(config))
    assert rate > 0 and "1 of 2 blocks" in how


# --- training --------------------------------------------------------------------------------------------------------


def test_a_sample_draws_the_same_in_any_micro_batch_of_any_process():
    """What iMF draws, and with it the gradient, is a function of the seed, the step and the row of the global batch."""

    def drawn(world: int, microbatch: int | None) -> list[tuple]:
        config, found = tiny_config(**GUIDED | {"train__microbatch": microbatch}), []
        for rank in range(world):
            ctx = DistributedContext(rank, world, CPU)
            for b in BatchStream(open_data(config, ALONE), config, ctx).micro_batches(1):
                columns = [b.cond[key].tolist() for key in ("omega", "t_min", "t_max", "unconditional", "class_labels")]
                found += zip(b.t.tolist(), b.r.tolist(), *columns, strict=True)
        return sorted(found)

    expected = drawn(1, None)
    assert len({row[2] for row in expected}) == len(expected) == 12
    assert drawn(1, 5) == drawn(2, None) == drawn(3, 3) == expected
    whole, parts = (gradients_of_step(tiny_config(**GUIDED | {"train__microbatch": m}), ALONE, 1) for m in (None, 5))
    scale = max(float(g.abs().max()) for g in whole.values())
    assert all(torch.allclose(whole[name] / scale, parts[name] / scale, rtol=0, atol=3e-6) for name in whole)


def test_a_resumed_run_is_bit_equal(tmp_path):
    def stop(run, config, state, ctx):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)

    config = tiny_config(**GUIDED, eval__every=1)
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    assert train_run(config, whole, ALONE) == 0
    assert train_run(config, parts, ALONE, stop) == 130
    assert train_run(config, parts, ALONE) == 0
    assert_equal_runs(whole.path, parts.path)
    assert json.loads(whole.metrics_file.read_text().splitlines()[-1])["error_v_head"] > 0


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": {"kind": "unet"}}, "objective.velocity=v_head; set it to boundary"),
        (
            {"model": {"kind": "unet"}, "objective__velocity": "boundary"},
            "omega_max=8; omega, t_min, t_max; omega_max=1",
        ),
        ({"model__classes": 0}, "omega_max=8; set model.classes; omega_max=1"),
        ({"model__v_head": False}, "objective.velocity=v_head needs a network with a v-head"),
        ({"guidance": {"omega_prime": 2.0}}, "set guidance=null"),
        ({"sample__guidance": 0.5}, "sample.guidance must be a number ≥ 1 (1 is none), got 0.5"),
        ({"sample__interval": [0.7, 0.3]}, "sample.interval must be two times t_min ≤ t_max in [0, 1], got 0.7, 0.3"),
        ({"eval__guidance": [2, 0]}, "eval.guidance must be a number ≥ 1"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(changes, parts):
    tree = {**GUIDED, "model": {**GUIDED["model"]}, "objective": {**GUIDED["objective"]}}
    for key, value in changes.items():
        group, _, name = key.partition("__")
        if key == "model":
            tree["model"] = {**tiny_tree_model(), "classes": 10}
        elif group in ("model", "objective"):
            tree[group][name] = value
        else:
            tree[key] = value
    with pytest.raises(ConfigError) as caught:
        tiny_config(**tree)
    message = str(caught.value)
    assert "\n" not in message and [part for part in parts.split("; ") if part not in message] == [], message


def tiny_tree_model() -> dict:
    return {
        "kind": "unet",
        "image_size": 8,
        "channels": 1,
        "width": 8,
        "multipliers": [1],
        "blocks": 1,
        "attention": [],
    }


def test_reduced_forms_train_on_other_networks(train_tiny):
    for classes in (0, 10):
        model = {**tiny_tree_model(), "classes": classes}
        objective = {"kind": "imeanflow", "velocity": "boundary", "omega_max": 1.0}
        run = train_tiny(f"with {classes}", model=model, objective=objective, train__steps=2)
        assert "error_v_head" not in json.loads(run.metrics_file.read_text().splitlines()[-1])
    with pytest.raises(ConfigError, match=r"sample.guidance.*need an objective that trains with guidance as an input"):
        tiny_config(model=model, objective=objective, sample__guidance=2.0)


def test_the_passes_without_gradient_are_without_dropout():
    model = {**tiny_tree_model(), "dropout": 0.3}
    config = tiny_config(model=model, objective={"kind": "imeanflow", "velocity": "boundary", "omega_max": 1.0})
    network, modes = build_network(config, CPU).train(), []
    network.register_forward_hook(lambda module, args, out: modes.append((module.training, torch.is_grad_enabled())))
    make_loss(network, replace(config, train=replace(config.train, jvp="func")), CPU)(random_batch(config, 4, CPU))
    assert modes == [(False, False), (True, True), (True, True)] and network.training  # v̂; rows with r < t, and others


# --- sampling --------------------------------------------------------------------------------------------------------


def test_sampling_gives_the_network_what_was_chosen(run):
    model = load(run.path, device=CPU)
    z, zero, one = noise(0, 0, 4, (1, 8, 8)), torch.zeros(4), torch.ones(4)
    labels = torch.arange(4)

    def expected(omega, low, high):
        with torch.no_grad():
            return z - model.network(z, zero, one, labels, omega * one, low * one, high * one)

    torch.testing.assert_close(model.sample(4), expected(3.0, 0.25, 0.75))  # the recipe's
    torch.testing.assert_close(model.sample(4, guidance=5.0), expected(5.0, 0.25, 0.75))
    torch.testing.assert_close(model.sample(4, guidance=5.0, interval=(0.0, 1.0)), expected(5.0, 0.0, 1.0))
    with torch.no_grad():
        plain = z - model.network(z, zero, one, labels)
    torch.testing.assert_close(model.sample(4, guidance=1.0, interval=(0.0, 1.0)), plain)  # 1 is no guidance
    assert not torch.allclose(model.sample(4), plain, atol=1e-4)


def test_scales_above_those_of_training_are_warned_of_and_below_1_refused(run, logged):
    model = load(run.path, device=CPU)
    assert model.guided(8.0) == GuidanceInput(8.0, (0.25, 0.75)) and not logged.messages
    model.guided(10.5)
    assert logged.messages == ["guidance 10.5 is above 8, the largest scale in training"]
    for choice in ({"guidance": 0.9}, {"guidance": float("nan")}, {"interval": (0.6, 0.4)}, {"interval": (-0.1, 1)}):
        with pytest.raises(UserError, match="must be"):
            model.sample(1, **choice)


def test_the_sample_command(run, tmp_path, capsys):
    arrays = {}
    for name, chosen in {"default": [], "same": ["--guidance", "3", "--interval", "0.25,0.75"],
                         "other": ["--guidance", "7.5"]}.items():  # fmt: skip
        out = tmp_path / f"{name}.npz"
        assert sample.main([str(run.path), "--n", "6", "--device", "cpu", "--out", str(out), *chosen]) == 0
        arrays[name] = np.load(out)["arr_0"]
    assert (arrays["default"] == arrays["same"]).all() and (arrays["default"] != arrays["other"]).any()
    assert "guidance ω 7.5 in [0.25, 0.75], EMA 0.9" in capsys.readouterr().out
    for omega in ("1", "2"):
        assert sample.main([str(run.path), "--n", "2", "--device", "cpu", "--guidance", omega]) == 0
    assert len(list((run.path / "samples").glob("*-w[12]-t0.25-0.75.png"))) == 2


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        (sample, ["--guidance", "2"], "guidance is no input of this network"),
        (sample, ["--interval", "0,1"], "guidance is no input of this network"),
        (sample, ["--guidance", "0.5"], "give a guidance scale of 1 (none) or more, not '0.5'"),
        (sample, ["--guidance", "inf"], "give a guidance scale"),
        (sample, ["--interval", "0.5"], "give t_min,t_max with 0 ≤ t_min ≤ t_max ≤ 1, such as 0.4,0.65, not '0.5'"),
        (sample, ["--interval", "0.6,0.4"], "give t_min,t_max"),
        (fid, ["--guidance", "1,2"], "guidance is no input of this network"),
        (fid, ["--guidance", "1,,2"], "give a guidance scale"),
        (classifier, ["--guidance", "2"], "guidance is no input of this network"),
        (sweep, [], "guidance is no input of this network"),
        (sweep, ["--guidance", "2"], "give two or more scales to compare"),
    ],
)
def test_other_networks_and_bad_values_are_refused_in_one_line(trained, capsys, command, arguments, message):
    assert run_main(command.main, [str(trained.path), "--device", "cpu", *arguments]) == 2
    assert message in one_line(capsys.readouterr().err)


# --- scoring ---------------------------------------------------------------------------------------------------------


def test_fid_compares_scales_and_intervals_on_one_set_of_noises(run, tmp_path, capsys):
    chosen = ["--guidance", "1,4", "--interval", "0,1", "--interval", "0.4,0.6", "--n", "40", "--device", "cpu"]
    assert fid.main([str(run.path), *chosen, "--out", str(tmp_path)]) == 0
    names = [f"step00000030-ema0.9-nfe1-n40-w{w}{t}" for w in (1, 4) for t in ("", "-t0.4-0.6")]
    assert {path.stem for path in tmp_path.glob("*.json")} == set(names)
    results = [json.loads((tmp_path / f"{name}.json").read_text()) for name in names]
    values = {(r["protocol"]["guidance"], *r["protocol"]["interval"]): r["metrics"]["fd-pixels"] for r in results}
    assert len(values) == len(set(values.values())) == 4
    (omega, low, high), least = min(values.items(), key=lambda item: item[1])
    line = f"best of 4 at NFE 1, EMA 0.9: --guidance {omega:g} --interval {low:g},{high:g}, fd-pixels {least:.4f}"
    assert line in capsys.readouterr().out
    assert len({json.dumps(r["protocol"]["samples"]) for r in results}) == 1  # noises, labels and weights


def test_the_sweep_makes_a_picture_and_scores_that_the_report_reads(run, capsys):
    assert sweep.main([str(run.path), "--guidance", "4,1", "--n", "30", "--device", "cpu"]) == 0
    assert str(run.path / "guidance.png") in capsys.readouterr().out
    found = json.loads((run.path / "guidance.json").read_text())
    assert found["omegas"] == [1, 4] and found["interval"] == [0.25, 0.75] and found["n"] == 30
    assert len(found["accuracies"]) == 2 and 0.9 < found["real_accuracy"] < 1
    assert (run.path / "guidance.png").read_bytes()[:4] == b"\x89PNG"
    scores = {score.guidance: score.value for score in read_run(run, "run").scores}
    expected = dict(zip(["ω 1 in [0.25, 0.75]", "ω 4 in [0.25, 0.75]"], found["distances"], strict=True))
    assert {name: scores[name] for name in expected} == pytest.approx(expected)
