"""Numbers that are not finite: which updates are skipped, what the run's own checks find, and replays of a step."""

import json
import math
import re
from itertools import pairwise

import pytest
import torch
from running import comparable_metrics, guided_latent_changes, newest, steps_of, tiny_config, train_run, write_images

from eval import replay
from meanflow.errors import AssetError, ConfigError, NumericsError, run_main
from meanflow.objectives import Loss
from meanflow.random import derive_seed
from meanflow.training import divergence, setup
from meanflow.training.checkpoint import load_checkpoint
from meanflow.training.divergence import Guard, NotFinite, check, checksum, record_failure
from meanflow.training.processes import DistributedContext
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import fresh_state, to_checkpoint

CPU = torch.device("cpu")


def judged(guard: Guard, *norms: float) -> list[float]:
    return [float(guard.judge(torch.tensor(norm))) for norm in norms]


# --- skipped updates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_from_a_bad_gradient_on_no_update_is_made(bad):
    """The host looks once in many steps; what came after the bad one must not have moved the weights."""
    assert judged(Guard(None, CPU), 1.0, 1e30, bad, 1.0, 1.0) == [0, 0, 1, 1, 1]


def test_spikes_are_skipped_and_counted_until_norms_have_risen_for_good(monkeypatch):
    monkeypatch.setattr(divergence, "SETTLE", 4)
    guard = Guard(3.0, CPU)
    assert judged(guard, 1.0, 9.0, 1.0, 1.0) == [0, 0, 0, 0], "it must know the usual norm first"
    assert float(guard.mean) == 3.0
    assert judged(guard, 9.1) == [1], "above three times the mean"
    assert float(guard.mean) == 4.5, "(3 · 3 + the limit 9) / 4"
    assert judged(guard, 13.4, 1e30) == [0, 1] and int(guard.skipped) == 2
    risen = judged(guard, *[100.0] * 40)
    assert risen == sorted(risen, reverse=True) and risen[0] == 1 and risen[-1] == 0


def test_the_spike_guard_continues_where_it_stopped():
    norms = torch.rand(300, generator=torch.Generator().manual_seed(0)).pow(-0.5).tolist()
    whole, first, second = Guard(2.0, CPU), Guard(2.0, CPU), Guard(2.0, CPU)
    expected = judged(whole, *norms)
    judged(first, *norms[:150])
    second.restore(json.loads(json.dumps(first.numbers())))
    assert judged(second, *norms[150:]) == expected[150:] and sum(expected) > 5
    assert second.numbers() == whole.numbers()
    assert Guard(None, CPU).numbers() is None and Guard(None, CPU).skipped is None


def test_a_run_with_a_spike_guard_skips_counts_and_resumes(train_tiny, monkeypatch):
    monkeypatch.setattr(divergence, "SETTLE", 3)
    spiky = {"train__spike_guard": 1.1, "train__steps": 16}
    once = train_tiny("once", **spiky)
    skipped = [line["skipped"] for line in read_metrics(once.metrics_file)]
    assert skipped == sorted(skipped) and 0 == skipped[0] < skipped[-1] < 13
    for steps in (5, 9, 16):
        twice = train_tiny("twice", **{**spiky, "train__steps": steps})
    assert comparable_metrics(once.path) == comparable_metrics(twice.path)
    step = next(i for i, (before, after) in enumerate(pairwise(skipped), 1) if after > before)
    weights = [newest(train_tiny(f"to{n}", **{**spiky, "train__steps": n}).path).model for n in (step, step + 1)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_loss_that_is_not_finite_with_a_gradient_that_is(train_tiny, monkeypatch):
    """Errors beyond float32 get weight zero (Eq. 22): the loss is NaN, their gradient 0. Nothing may be updated."""
    make_loss, make_state, kept = setup.loss_of_run, setup.fresh_state, {}

    def spoilt(*args):
        loss, compiled = make_loss(*args)

        def spoil(batch):
            error = loss(batch).per_sample * 1e30
            return Loss((1 / (error.detach().square() + 1) ** 0.75) * error.square())

        return spoil, compiled

    monkeypatch.setattr(setup, "loss_of_run", spoilt)
    monkeypatch.setattr(setup, "fresh_state", lambda *args: kept.setdefault("state", make_state(*args)))
    with pytest.raises(NumericsError, match=r"^step 1: loss nan, gradient norm nan"):
        train_tiny()
    before, after = make_state(tiny_config(), CPU).network, kept["state"].network
    assert all(torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True))


# --- the run's own check ---------------------------------------------------------------------------------------


class Peers(DistributedContext):
    """This process and others whose tables are given: what an all-reduce of the check would sum."""

    def __init__(self, *others: dict):
        super().__init__(0, len(others) + 1, CPU)
        object.__setattr__(self, "others", others)

    def all_reduce(self, x):
        for rank, other in enumerate(self.others, 1):
            finite = [int(all(bool(t.isfinite().all()) for t in group.values())) for group in other["tensors"].values()]
            sums = [int(checksum(group)) for group in other["tensors"].values()]
            x[rank] = torch.tensor([other["step"], *finite, *sums])
        return x


def groups(seed: int = 0) -> dict:
    numbers = torch.Generator().manual_seed(seed)
    conv = torch.randn(4, 3, 3, 3, generator=numbers).contiguous(memory_format=torch.channels_last)
    return {"weights": {"a": conv, "b": torch.randn(5, generator=numbers)}, "EMA 0.9": {"a": conv * 0.5}}


def peer(step: int = 7, **changed) -> dict:
    return {"tensors": {**groups(), **changed}, "step": step}


def one_bit_off() -> dict:
    weights = groups()["weights"]
    weights["b"].view(torch.int32)[3] ^= 1
    return weights


def test_equal_processes_and_large_numbers_pass(alone):
    check(groups(), 7, Peers(peer(), peer()))
    check(groups(), 7, alone)
    check({"weights": {"a": torch.tensor([3e38, -3e38])}}, 0, alone)


@pytest.mark.parametrize(
    ("mine", "peers", "message"),
    [
        ({}, [peer(), peer(weights=one_bit_off()), peer()], "of 4 processes, process 2 holds other weights: gradients"),
        ({}, [peer(weights=one_bit_off())], "of 2 processes, process 1 holds other weights"),
        ({"weights": one_bit_off()}, [peer(), peer()], "of 3 processes, process 0 holds other weights"),
        ({}, [peer(**{"EMA 0.9": groups(1)["EMA 0.9"]})], "process 1 holds other EMA 0.9"),
        ({}, [peer(0), peer(0), peer(), peer()], "process 1, 2 is at another step: gradients"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_process_that_differs_by_one_bit_is_named(mine, peers, message):
    with pytest.raises(NumericsError, match=rf"^step 7: .*{re.escape(message)}.*run folder is not the same"):
        check({**groups(), **mine}, 7, Peers(*peers))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_average_that_is_not_finite_is_named_with_its_tensor(alone, bad):
    mine = groups()
    mine["EMA 0.9"]["a"][1, 2, 0, 1] = bad
    with pytest.raises(NotFinite, match=r"^step 8: EMA 0\.9 not finite \(such as a; 1 of 1 tensors\)") as caught:
        check(mine, 7, alone)
    assert caught.value.step == 8
    with pytest.raises(NotFinite, match=r"^step 8: EMA 0\.9 not finite"):
        check(groups(), 7, Peers(peer(**{"EMA 0.9": mine["EMA 0.9"]})))


@pytest.mark.parametrize(("every", "found"), [(1, 5), (3, 6), (100, 8)])
def test_a_bad_average_stops_the_run_and_never_reaches_a_checkpoint(tmp_path, alone, every, found):
    """At the check, or at the latest before the next checkpoint."""

    def spoil(run, config, state, ctx):
        if state.step == 4:
            next(iter(state.ema.averages[0.9].values())).view(-1)[0] = math.nan

    config = tiny_config(train__steps=20, checkpoint__every=4, eval__every=4, train__check_every=every)
    run = RunFolder(tmp_path)
    with pytest.raises(NumericsError, match=rf"^step {found + 1}: EMA 0\.9 not finite.*last good checkpoint") as caught:
        train_run(config, run, alone, spoil)
    assert caught.value.exit_code == 4 and "\n" not in str(caught.value)
    kept = newest(tmp_path)
    assert kept.meta["step"] == 4 and all(x.isfinite().all() for x in kept.ema["0.9"].values())
    assert steps_of(tmp_path)[-1] == found
    assert train_run(config, run, alone) == 0, "the same command continues from the good one"


# --- replays ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("data") / "images"))


@pytest.fixture
def failed(tmp_path, alone, images):
    """A run whose weight is spoilt after step 4, with all that makes a batch depend on seeds."""
    rich = {"model__channels": 3, "model__dropout": 0.2, "model__augment_labels": 6, "model__classes": 2}
    rich |= {"data__path": images, "data__augment_p": 0.5, "data__flip": True, "train__microbatch": 3}
    run = RunFolder(tmp_path)

    def spoil(run, config, state, ctx):
        if state.step == 4:
            with torch.no_grad():
                next(state.network.parameters()).view(-1)[0] = math.nan

    with pytest.raises(NumericsError) as caught:
        train_run(tiny_config(train__steps=9, eval__every=4, **rich), run, alone, spoil)
    return run, str(caught.value)


def replayed(capsys, *arguments) -> str:
    assert run_main(replay.main, [str(argument) for argument in (*arguments, "--device", "cpu")]) == 0
    return capsys.readouterr().out


def loss_and_norm(text: str) -> tuple[float, float]:
    return tuple(float(x) for x in re.search(r"loss (\S+), gradient norm (\S+)", text).groups())


def test_what_a_guided_latent_run_draws_is_noted(tmp_path):
    config = tiny_config(**guided_latent_changes())
    before = to_checkpoint(fresh_state(config, CPU), config, {"images": 20, "classes": [], "sha256": ""})
    file = record_failure(RunFolder(tmp_path), config, before, NotFinite(5, "loss nan"), 1)
    seeds = json.loads(file.read_text())["failure"]["seeds"]
    assert seeds == {name: derive_seed(3, name, 4) for name in ("times", "noise", "posterior", "mirror", "label drop")}


def test_a_run_that_stops_leaves_the_step_to_replay(failed, capsys, tmp_path):
    run, message = failed
    file = run.failures / "00000005.json"
    assert f"bash run.sh replay {file}" in message
    noted = json.loads(file.read_text())["failure"]
    assert noted["step"] == 5 and noted["processes"] == 1 and len(noted["images"]) == 8
    assert set(noted["seeds"]) == {"times", "noise", "augment", "flip"} and file.stat().st_size < 10_000
    out = replayed(capsys, file)
    assert "step 5 of" in out and "which failed with loss nan" in out
    assert "loss nan, gradient norm nan" in out and "not finite here either" in out
    assert re.search(r"weights that are not finite \(1 of \d+\):", out)
    assert re.search(r"samples that are not finite \(8 of 8\):(\n  r 0\.\d+, t 0\.\d+: loss nan){8}\n", out)

    held = load_checkpoint(file.with_suffix(".pt"))
    held.meta["config"]["data"]["path"] = str(write_images(tmp_path / "others", count=24))
    with pytest.raises(ConfigError, match="other images"):
        replay.replay(held, str(file), CPU)
    assert run_main(replay.main, [str(tmp_path / "none.json")]) == AssetError.exit_code


@pytest.mark.parametrize("kind", ["images", "latents"])
@pytest.mark.parametrize("microbatch", [None, 3])
def test_replaying_a_good_step_gives_the_numbers_of_the_run(train_tiny, tmp_path, capsys, images, kind, microbatch):
    """Whatever a batch depends on: augmentation and dropout, or mirrored latents, dropped labels and guidance."""
    changes = {"model__channels": 3, "model__dropout": 0.2, "data__path": images}
    if kind == "latents":
        changes = guided_latent_changes(tmp_path / "latents")
    run = train_tiny(train__steps=4, checkpoint__every=3, train__microbatch=microbatch, **changes)
    line = list(read_metrics(run.metrics_file))[3]
    out = replayed(capsys, run.checkpoints / "00000003.json")
    assert loss_and_norm(out) == (line["loss"], line["grad_norm"]) and "all of it is finite" in out


def test_a_step_of_several_processes_is_replayed_by_one(train_tiny, images, logged):
    run = train_tiny(train__steps=4, checkpoint__every=3, model__channels=3, data__path=images)
    held = load_checkpoint(run.checkpoints / "00000003.pt")
    held.meta["failure"] = {"step": 4, "what": "loss nan", "processes": 4}
    assert replay.replay(held, "the checkpoint", CPU)
    loss, norm = loss_and_norm("\n".join(logged.messages))
    line = list(read_metrics(run.metrics_file))[3]
    assert (loss, norm) == (pytest.approx(line["loss"], rel=1e-5), pytest.approx(line["grad_norm"], rel=1e-4))
