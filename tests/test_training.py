"""The loop: what one step does, what a stopped and resumed run does, and when it must stop by itself.

Resumed means bit-equal: every test of it compares weights, averages, optimiser and metrics exactly.
"""

import io
import json
import math
import signal
import time

import pytest
import torch
from running import (
    CLOCK,
    RICH,
    assert_equal_runs,
    comparable_metrics,
    differences,
    newest,
    steps_of,
    tiny_config,
    train_run,
    write_images,
)

from meanflow.data import Dataset, load_dataset
from meanflow.errors import ConfigError, NumericsError, UserError
from meanflow.objectives import Loss
from meanflow.training import metrics, setup
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from meanflow.training.config import EmaConfig, OptimConfig
from meanflow.training.divergence import Guard
from meanflow.training.metrics import MetricsLog, StepSums, rewind_metrics
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder
from meanflow.training.signals import StopRequest
from meanflow.training.state import Ema, fresh_state, learning_rate, make_optimizer
from meanflow.training.step import accumulate, make_loss, update

CPU = torch.device("cpu")
STEPS = 10


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """RICH with its images: `rich(group__key=value, …)`."""
    images = str(write_images(tmp_path_factory.mktemp("data") / "images"))
    return lambda **changes: {**RICH, "data__path": images, **changes}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, rich) -> RunFolder:
    run = RunFolder(tmp_path_factory.mktemp("unbroken"))
    assert train_run(tiny_config(**rich(train__steps=STEPS)), run, DistributedContext(0, 1, CPU)) == 0
    return run


def stop_at(step: int, number: int = signal.SIGINT):
    """An evaluation that raises a real signal after a step; the loop then stops after the next one."""

    def evaluate(run, config, state, ctx) -> None:
        if state.step == step:
            signal.raise_signal(number)

    return evaluate


# --- a stopped and resumed run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[4], [9], [1, 2, 3], [3, 6, 8]], ids=str)
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(train_tiny, rich, unbroken, stops):
    for steps in [*stops, STEPS]:
        run = train_tiny(**rich(train__steps=steps))
    assert steps_of(run.path) == list(range(1, STEPS + 1))
    assert_equal_runs(run.path, unbroken.path)


def test_ctrl_c_saves_and_the_same_command_ends_bit_equal(tmp_path, alone, rich, unbroken, logged):
    config, run = tiny_config(**rich(train__steps=STEPS, eval__every=1)), RunFolder(tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train_run(config, run, alone, stop_at(5)) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert logged.messages == ["stopped and saved at step 6 of 10; the same command continues"]
    assert newest(tmp_path).meta["step"] == 6 and steps_of(tmp_path)[-1] == 6
    assert train_run(config, run, alone, stop_at(7, signal.SIGTERM)) == 143
    assert logged.messages[1].startswith("continuing from step 6 (")
    assert train_run(config, run, alone) == 0
    assert_equal_runs(run.path, unbroken.path)


def test_a_signal_in_the_last_step_is_not_swallowed(tmp_path, alone, logged):
    """The step is finished and saved, but what comes after training (sampling, scoring) must not start."""
    config, run = tiny_config(train__steps=3, eval__every=3), RunFolder(tmp_path)
    assert train_run(config, run, alone, stop_at(3)) == 130
    assert logged.messages == ["stopped and saved at step 3 of 3; the same command continues"]
    assert train_run(config, run, alone) == 0 and steps_of(tmp_path) == [1, 2, 3]


def test_signals_sent_twice_by_a_launcher_are_one_and_a_later_ctrl_c_is_immediate(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr("meanflow.training.signals.time.monotonic", lambda: clock[0])
    with StopRequest() as stop:
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        clock[0] += 0.5
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert stop.requested and stop.exit_code == 130
        clock[0] += 10
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_finished_run_started_again_changes_nothing_but_may_be_prolonged(train_tiny, logged):
    once = train_tiny("once", train__steps=8)
    twice = train_tiny("twice", train__steps=5)
    before = {path: path.read_bytes() for path in twice.checkpoints.iterdir()}
    train_tiny("twice", train__steps=5)
    train_tiny("twice", train__steps=4)
    assert {path: path.read_bytes() for path in twice.checkpoints.iterdir()} == before
    assert "train.steps is 4, fewer than the 5 that are done" in logged.messages[-1]
    train_tiny("twice", train__steps=8, logging__flush_every=7, checkpoint__every=3, description="longer")
    assert_equal_runs(once.path, twice.path)
    seconds = [line["seconds"] for line in read_metrics(twice.metrics_file)]
    assert seconds == sorted(seconds), "they go on where they stopped"


def test_steps_after_the_newest_checkpoint_are_done_again(train_tiny, rich, unbroken):
    """As after a kill: metrics run ahead of the checkpoint, and the last line is torn."""
    run = train_tiny(**rich(train__steps=6))
    for kind in (".json", ".pt"):
        checkpoint_path(run.checkpoints, 6).with_suffix(kind).unlink()
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 7, "imag')
    assert_equal_runs(train_tiny(**rich(train__steps=STEPS)).path, unbroken.path)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(train_tiny, rich, unbroken, logged):
    damaged = checkpoint_path(train_tiny(**rich(train__steps=6)).checkpoints, 6)
    damaged.write_bytes(damaged.read_bytes()[:-1000])
    run = train_tiny(**rich(train__steps=STEPS))
    assert logged.messages[0].startswith(f"{damaged}: is damaged")
    assert logged.messages[0].endswith("; using the one before")
    assert logged.messages[1].startswith("continuing from step 4 (")
    assert json.loads(run.starts_file.read_text().splitlines()[-1])["step"] == 4
    assert_equal_runs(run.path, unbroken.path)


def test_the_same_images_elsewhere_are_accepted_and_others_are_not(train_tiny, rich, tmp_path):
    train_tiny(**rich(train__steps=1))
    moved, other = write_images(tmp_path / "moved"), write_images(tmp_path / "other", count=24)
    run = train_tiny(**rich(train__steps=2, data__path=str(moved)))
    assert steps_of(run.path) == [1, 2]
    with pytest.raises(ConfigError, match=r"trained on other images \(22, now 24\).*--out") as caught:
        train_tiny(**rich(train__steps=3, data__path=str(other)))
    assert "\n" not in str(caught.value)


def test_the_course_depends_on_the_seed(train_tiny):
    runs = [train_tiny(f"seed{seed}", seed=seed, train__steps=2) for seed in (1, 2)]
    assert comparable_metrics(runs[0].path) != comparable_metrics(runs[1].path)


def test_evaluation_is_called_on_schedule_with_a_saved_checkpoint(tmp_path, alone, monkeypatch):
    calls, now = [], time.perf_counter
    monkeypatch.setattr("meanflow.training.metrics.time.perf_counter", lambda: now() + 1000 * len(calls))

    def evaluate(run, config, state, ctx):
        assert load_checkpoint(checkpoint_path(run.checkpoints, state.step)).meta["step"] == state.step
        calls.append((state.step, state.network.training))
        state.network.eval()
        torch.manual_seed(0)  # a careless evaluation

    config = tiny_config(train__steps=7, eval__every=3, checkpoint__every=5, model__dropout=0.2)
    for name, hook in (("with", evaluate), ("without", None)):
        train_run(config, RunFolder(tmp_path / name), alone, hook)
    assert calls == [(3, True), (6, True)]
    assert_equal_runs(tmp_path / "with", tmp_path / "without")
    *_, last = read_metrics(tmp_path / "with" / "metrics.jsonl")
    assert last["seconds"] < 1000, "evaluations are not training time"


# --- settings changed on the way -------------------------------------------------------------------------------


def test_a_learning_rate_changed_on_request_acts_and_is_recorded(tmp_path, alone):
    """It is kept by later starts, also if a crash came before the next checkpoint."""
    run, changed = RunFolder(tmp_path / "run"), tiny_config(train__steps=7, optim__lr=0.01, checkpoint__every=50)
    train_run(tiny_config(train__steps=4), run, alone)
    with pytest.raises(ConfigError, match=r"optim\.lr is 0\.001 there, 0\.01 now"):
        train_run(changed, run, alone)
    for _ in range(2):
        train_run(changed, run, alone, requested={"optim.lr"})
        list_checkpoints(run.checkpoints)[-1].with_suffix(".json").unlink()  # as if killed before it
    train_run(changed, run, alone)  # `resume RUN`: config.yaml has the new rate, the checkpoint the old one
    assert [line["lr"] for line in comparable_metrics(run.path)] == [2e-4, 4e-4, 6e-4, 8e-4, 0.01, 0.01, 0.01]
    starts = [json.loads(line) for line in run.starts_file.read_text().splitlines()]
    assert [start["changed"].get("optim.lr") for start in starts] == [None, [1e-3, 0.01], None, None]
    assert [start["step"] for start in starts] == [0, 4, 4, 4]
    with pytest.raises(ConfigError, match=r"resume .*, or repeat --set optim\.lr=0\.01\. To change it from here"):
        train_run(tiny_config(train__steps=9), run, alone)


def test_an_average_added_on_the_way_starts_from_the_weights(train_tiny, tmp_path, alone):
    run = train_tiny(train__steps=3)
    weights = newest(run.path).model
    config = tiny_config(train__steps=4, ema__decays=[0.9, 0.5])
    train_run(config, run, alone, requested={"ema.decays"})
    after = newest(run.path)
    for name, value in after.ema["0.5"].items():
        torch.testing.assert_close(value, (weights[name] + after.model[name]) / 2)
    with pytest.raises(ConfigError, match=r"ema\.decays"):
        train_run(tiny_config(train__steps=5), run, alone, requested={"ema.decays"})


def test_a_refused_start_changes_no_file(train_tiny, rich, tmp_path):
    run = train_tiny(**rich(train__steps=2))
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    other = str(write_images(tmp_path / "other", count=24))
    for change in ({"data__path": other}, {"data__path": str(tmp_path / "none")}, {"seed": 9}):
        with pytest.raises(UserError):
            train_tiny(**rich(train__steps=3, **change))
    assert {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()} == before


# --- numbers that are not finite -------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_before_any_update(tmp_path, alone, value, clip):
    kept = {}

    def spoil(run, config, state, ctx):
        """After step 4 was saved, spoil one weight; keep what the others and the optimiser were."""
        if state.step == 4:
            with torch.no_grad():
                next(state.network.parameters()).view(-1)[0] = value
            kept["state"] = state
            kept["before"] = [p.detach().clone() for p in state.network.parameters()]
            moments = state.optimizer.state.items()
            kept["moments"] = {p: {k: v.clone() for k, v in values.items()} for p, values in moments}

    run = RunFolder(tmp_path)
    with pytest.raises(NumericsError) as caught:
        train_run(tiny_config(train__steps=9, eval__every=4, optim__clip=clip), run, alone, spoil)
    message, last = str(caught.value), checkpoint_path(run.checkpoints, 4)
    assert caught.value.exit_code == 4 and "\n" not in message
    assert message.startswith("step 5: ") and f"the last good checkpoint is {last}" in message
    assert f"bash run.sh resume {run.path} --set optim.lr=0.0005 optim.clip=1.0" in message
    assert list_checkpoints(run.checkpoints)[-1] == last
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    for before, after in zip(kept["before"], kept["state"].network.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    for p, moments in kept["moments"].items():
        assert differences(moments, dict(kept["state"].optimizer.state[p])) == []


def test_before_the_first_checkpoint_the_message_says_so(train_tiny, tmp_path, monkeypatch):
    def spoilt(config, device):
        state = fresh_state(config, device)
        with torch.no_grad():
            next(state.network.parameters()).fill_(math.nan)
        return state

    monkeypatch.setattr(setup, "fresh_state", spoilt)
    with pytest.raises(NumericsError, match=r"^step 1: .*there is no checkpoint yet"):
        train_tiny()
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")


# --- one step --------------------------------------------------------------------------------------------------


def one_parameter(*values: float) -> torch.nn.Module:
    module = torch.nn.Module()
    module.p = torch.nn.Parameter(torch.tensor(values))
    return module


def test_the_warm_up_is_linear_and_then_constant():
    config = OptimConfig(lr=2.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(OptimConfig(lr=0.1), 0) == 0.1


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_update_is_adam_with_clipping(kind, clip):
    """Against PyTorch's plain form and its own clipping, over several steps and a warm-up; RAdam's sixth is the first
    that is rectified."""
    decay = 0.1 if kind == "radam" else 0.0
    config = OptimConfig(lr=0.1, kind=kind, betas=(0.9, 0.99), warmup_steps=3, clip=clip, weight_decay=decay)
    ours, theirs = one_parameter(1.0, -2.0, 3.0), one_parameter(1.0, -2.0, 3.0)
    optimizer, guard = make_optimizer(ours, config), Guard(None, CPU)
    how = {"lr": 1.0, "betas": config.betas, "eps": config.eps, "foreach": False}
    if kind == "adam":
        plain = torch.optim.Adam(theirs.parameters(), **how)
    else:
        plain = torch.optim.RAdam(theirs.parameters(), weight_decay=decay, decoupled_weight_decay=True, **how)
    for step in range(12):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        ours.p.grad, theirs.p.grad = gradient.clone(), gradient.clone()
        norm = update(optimizer, [ours.p], config, step, guard)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        plain.param_groups[0]["lr"] = learning_rate(config, step)
        plain.step()
        torch.testing.assert_close(norm, gradient.norm())
        torch.testing.assert_close(ours.p, theirs.p, rtol=1e-6, atol=2e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("kind", ["adam", "radam"])
def test_a_bad_gradient_leaves_no_trace(bad, clip, kind):
    """Weights, moments and Adam's own step count: the next good gradient acts as if the bad one had never been."""
    config = OptimConfig(lr=0.1, kind=kind, betas=(0.9, 0.99), weight_decay=0.1, clip=clip)
    with_bad, without = one_parameter(1.0, 2.0), one_parameter(1.0, 2.0)
    optimizers = [make_optimizer(module, config) for module in (with_bad, without)]
    for gradient in (*[[0.3, 0.1]] * 6, [bad, 0.1], [0.2, -5.0]):
        for module, optimizer in zip((with_bad, without), optimizers, strict=True):
            if module is with_bad or all(map(math.isfinite, gradient)):
                module.p.grad = torch.tensor(gradient)
                update(optimizer, [module.p], config, 0, Guard(None, CPU))
    assert torch.equal(with_bad.p, without.p)
    states = [optimizer.state[module.p] for module, optimizer in zip((with_bad, without), optimizers, strict=True)]
    assert differences(dict(states[0]), dict(states[1])) == []


def test_a_bad_first_gradient_leaves_radam_as_it_was():
    module = one_parameter(1.0, 2.0)
    optimizer = make_optimizer(module, OptimConfig(lr=0.1, kind="radam", weight_decay=0.1))
    module.p.grad = torch.tensor([math.nan, 1.0])
    update(optimizer, [module.p], OptimConfig(lr=0.1, kind="radam"), 0, Guard(None, CPU))
    assert module.p.tolist() == [1, 2] and not any(value.any() for value in optimizer.state[module.p].values())


def test_a_resumed_run_with_radam_is_bit_equal(tmp_path, alone):
    config = tiny_config(optim__kind="radam", train__steps=10, eval__every=1, checkpoint__every=20)
    whole, parts = (RunFolder(tmp_path / name) for name in ("whole", "parts"))
    assert train_run(config, whole, alone) == 0
    assert train_run(config, parts, alone, stop_at(7)) == 130
    assert train_run(config, parts, alone) == 0
    assert_equal_runs(whole.path, parts.path)


def test_averages_follow_their_closed_form():
    """Every 2 steps with decay²: after the updates at 2 and 4, from e₀ = 1 towards the weights 3 and 5."""
    module = one_parameter(1.0)
    ema = Ema(module, EmaConfig(decays=(0.9, 0.5), every=2))
    for step in range(1, 6):
        with torch.no_grad():
            module.p.fill_(step + 1.0)
        ema.update(step)
    for decay in (0.9, 0.5):
        d = decay**2
        assert ema.averages[decay]["p"].item() == pytest.approx(d * (d * 1 + (1 - d) * 3) + (1 - d) * 5, rel=1e-6)


# --- batches ---------------------------------------------------------------------------------------------------


def micro_batches(config, step: int, rank: int = 0, world: int = 1):
    stream = BatchStream(load_dataset(config.data, 8, 3), config, DistributedContext(rank, world, CPU))
    return list(stream.micro_batches(step))


def rows(parts) -> torch.Tensor:
    """All that a step trains on, one sample a row, in the order of t, which is unique."""
    columns = [[part.t, part.x, part.eps, part.r, *part.cond.values()] for part in parts]
    table = torch.cat([torch.cat([c.reshape(len(c), -1).double() for c in part], 1) for part in columns])
    return table[table[:, 0].argsort()]


@pytest.mark.parametrize(("world", "microbatch"), [(1, None), (1, 3), (2, None), (2, 2), (5, 1)])
def test_a_step_sees_the_same_samples_however_it_is_divided(rich, world, microbatch):
    whole = micro_batches(tiny_config(**rich(train__microbatch=None)), 2)
    config = tiny_config(**rich(train__microbatch=microbatch))
    divided = [part for rank in range(world) for part in micro_batches(config, 2, rank, world)]
    assert torch.equal(rows(whole), rows(divided))
    for part in divided:
        assert len(part.t) <= (microbatch or 10)
        r_neq_t = (part.t != part.r).tolist()
        assert r_neq_t == sorted(r_neq_t, reverse=True), "samples with r ≠ t come first"


def test_batches_are_a_function_of_the_step_alone(rich, alone):
    config = tiny_config(**rich())
    stream = BatchStream(load_dataset(config.data, 8, 3), config, alone)
    first = list(stream.micro_batches(3))
    list(stream.micro_batches(0))
    assert torch.equal(rows(first), rows(micro_batches(config, 3)))
    assert not torch.equal(first[0].eps, next(stream.micro_batches(4)).eps)


def test_dropout_masks_are_others_in_each_step_process_and_micro_batch(rich):
    config, drawn = tiny_config(**rich()), []
    dataset = load_dataset(config.data, 8, 3)
    for rank in range(2):
        stream = BatchStream(dataset, config, DistributedContext(rank, 2, CPU))
        for step in (0, 1, 2, 1):
            draws = [torch.rand(1).item() for _ in stream.micro_batches(step)]
            drawn.append(draws)
    first, second = drawn[:4], drawn[4:]
    assert first[1] == first[3] and second[1] == second[3], "a function of the step"
    numbers = [number for row in first[:3] + second[:3] for number in row]
    assert len(numbers) == 12 == len(set(numbers))


def test_images_reach_the_network_in_its_range_without_augmentation(alone):
    config = tiny_config(train__batch=1797)
    dataset = load_dataset(config.data, 8, 1)
    (part,) = BatchStream(dataset, config, alone).micro_batches(0)
    assert part.x.min() == -1 and part.x.max() == 1 and part.cond == {}
    values = ((part.x + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(values.flatten().sort()[0], dataset.images.flatten().sort()[0])


def test_labels_must_fit_the_data(rich, alone):
    config = tiny_config(**rich(model__classes=3))
    with pytest.raises(ConfigError, match=r"model\.classes is 3, .* 2 classes: set model\.classes=2"):
        BatchStream(load_dataset(config.data, 8, 3), config, alone)
    flat = Dataset(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), None, ())
    with pytest.raises(ConfigError, match=r"no class folders: set model\.classes=0"):
        BatchStream(flat, config, alone)
    assert "class_labels" not in micro_batches(tiny_config(**rich(model__classes=0)), 0)[0].cond


@pytest.mark.parametrize("microbatch", [1, 3, 4, 7])
def test_accumulation_gives_the_gradient_of_the_whole_batch(rich, alone, microbatch):
    def gradients(**change):
        config = tiny_config(**rich(model__dropout=0.0, **change))
        state = fresh_state(config, CPU)
        sums, total = StepSums(), GradientSum(state.network, alone)
        stream = BatchStream(load_dataset(config.data, 8, 3), config, alone)
        loss = make_loss(state.network, config, CPU)
        accumulate(loss, stream.micro_batches(1), stream.micro_steps, config.train.batch, total, sums)
        return [p.grad for p in state.network.parameters()], sums

    whole, sums = gradients(train__microbatch=None)
    parts, part_sums = gradients(train__microbatch=microbatch)
    torch.testing.assert_close(part_sums.sums, sums.sums, rtol=1e-5, atol=1e-6)
    assert part_sums.counts == sums.counts
    scale = max(g.abs().max() for g in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-6)


# --- metrics ---------------------------------------------------------------------------------------------------


def test_a_line_of_metrics_is_what_it_says(train_tiny, alone):
    """Recomputed from the first batch and the initial network, by hand."""
    run, config = train_tiny(train__steps=1), tiny_config(train__steps=1)
    network = fresh_state(config, CPU).network
    (part,) = BatchStream(load_dataset(config.data, 8, 1), config, alone).micro_batches(0)
    out = make_loss(network, config, CPU)(part)
    out.mean.backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in network.parameters())).item()
    error, r_eq_t = out.logged["error"], part.t == part.r
    (line,) = read_metrics(run.metrics_file)
    expected = {
        "step": 1,
        "images": 8,
        "loss": (error / (error + 1e-3) ** 0.75).mean().item(),
        "error": error.mean().item(),
        "error_r_eq_t": error[r_eq_t].mean().item(),
        "error_r_lt_t": error[~r_eq_t].mean().item(),
        "grad_norm": norm,
        "lr": 1e-3 / 5,
    }
    assert r_eq_t.sum() == 2
    assert {key: value for key, value in line.items() if key not in CLOCK} == pytest.approx(expected, rel=1e-4)
    assert all(line[key] > 0 for key in CLOCK)


@pytest.mark.parametrize(("ratio", "missing", "other"), [(0.0, "lt", "eq"), (1.0, "eq", "lt")])
def test_an_error_without_samples_is_null_not_zero(train_tiny, ratio, missing, other):
    run = train_tiny(train__steps=2, objective__times__ratio=ratio)
    for line in comparable_metrics(run.path):
        assert line[f"error_r_{missing}_t"] is None and line[f"error_r_{other}_t"] == line["error"]


def log_of(path, *losses: float, ctx: DistributedContext | None = None, seconds: float = 0.0) -> MetricsLog:
    """A log that is read once in 50 steps, as on a GPU, with these losses recorded."""
    log = MetricsLog(path, ctx or DistributedContext(0, 1, CPU), 50, seconds)
    log.flush_every = 50
    for step, loss in enumerate(losses, 1):
        note(log, step, loss)
    return log


def note(log: MetricsLog, step: int, loss: float = 1.0, stop: bool = False, **logged) -> None:
    sums = StepSums()
    sums.add(Loss(torch.tensor([loss, loss]), logged))
    log.record(step, 2, 0.1, sums, torch.tensor(1.0), stop=stop)


def test_the_log_keeps_what_came_before_a_bad_step(tmp_path):
    with pytest.raises(NumericsError, match=r"^step 3: loss nan"):
        log_of(tmp_path / "metrics.jsonl", 1.0, 2.0, math.nan, 4.0).flush()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_an_objective_may_log_other_values_in_other_steps(tmp_path):
    log = log_of(tmp_path / "metrics.jsonl", 1.0)
    some = torch.tensor([True, False])
    note(log, 2, extra=torch.tensor([2.0, 4.0]), part=(torch.tensor([5.0, 7.0]), some))
    note(log, 3, 8.0, part=(torch.tensor([math.nan, 7.0]), ~some & some))
    log.flush()
    lines = [{key: line.get(key, "") for key in ("loss", "extra", "part")} for line in read_metrics(log.path)]
    assert lines == [
        {"loss": 1.0, "extra": "", "part": ""},
        {"loss": 1.0, "extra": 3.0, "part": 5.0},
        {"loss": 8.0, "extra": "", "part": None},
    ]


def test_a_request_to_stop_is_seen_at_the_next_reading(tmp_path):
    """At once on one process; several wait until all of them read."""
    log = log_of(tmp_path / "metrics.jsonl", 1.0)
    assert not log.due and log.flush() is False
    note(log, 2, stop=True)
    note(log, 3)
    assert log.due and log.flush() is True and log.flush() is False
    pair = log_of(tmp_path / "pair.jsonl", ctx=DistributedContext(0, 2, CPU))
    note(pair, 1, stop=True)
    assert not pair.due


def test_the_wait_for_the_device_counts_as_training_time_and_pauses_do_not(tmp_path, monkeypatch):
    """A device works on after the host has issued its steps: their time is known when the log is read."""
    clock = [0.0]
    monkeypatch.setattr("meanflow.training.metrics.time.perf_counter", lambda: clock[0])

    class Busy(DistributedContext):
        def all_reduce(self, x):
            clock[0] += 3.0  # the device is done
            return x

    log = log_of(tmp_path / "metrics.jsonl", ctx=Busy(0, 1, CPU), seconds=10.0)
    for step in range(1, 5):
        clock[0] += 0.25  # the host issues a step
        note(log, step)
    log.flush()
    lines = list(read_metrics(log.path))
    assert [line["seconds"] for line in lines] == [11.0, 12.0, 13.0, 14.0] and log.seconds == 14.0
    assert [line["images_per_s"] for line in lines] == [2.0] * 4
    clock[0] += 1000  # a checkpoint, an evaluation
    log.pause()
    clock[0] += 1
    note(log, 5)
    log.flush()
    assert list(read_metrics(log.path))[-1]["seconds"] == 18.0


# --- the metrics file ------------------------------------------------------------------------------------------


def lines_of(*steps: int) -> str:
    return "".join(json.dumps({"step": step, "loss": float(step)}) + "\n" for step in steps)


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "los', '{"step"', "\x00\x00\x00", "null", "[4]", '{"loss": 1}', '"4"', "4", "\n\r\n", "\r"]
)
def test_torn_and_foreign_lines_are_left_out(tmp_path, torn):
    """At the end and in the middle; continuing drops them only where they are after its step."""
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines_of(1, 2, 3) + torn, newline="")
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    rewind_metrics(file, 2)
    assert file.read_text() == lines_of(1, 2)
    middle = lines_of(1) + torn + "\n" + lines_of(2, 3)
    file.write_text(middle, newline="")
    assert [line["step"] for line in read_metrics(file)] == [1, 2, 3]
    for step, left in ((3, middle), (2, lines_of(1) + torn + "\n" + lines_of(2)), (1, lines_of(1)), (0, "")):
        rewind_metrics(file, step)
        assert file.read_bytes() == left.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("odd", ['{"step": 1\n"loss": 2}\n', '{"step": 3}, {"step": 4}\n'])
def test_a_line_is_one_step_also_where_blocks_of_lines_are_read(tmp_path, odd):
    file = tmp_path / "metrics.jsonl"
    file.write_text(lines_of(2) + odd)
    assert [line["step"] for line in read_metrics(file)] == [2]


@pytest.mark.parametrize("block", [1, 7, 50, 10**6])
def test_a_file_is_rewound_with_any_size_of_block(tmp_path, monkeypatch, block):
    monkeypatch.setattr(metrics, "BLOCK", block)
    file = tmp_path / "metrics.jsonl"
    for ending in ("", '{"step": 9'):
        file.write_text(lines_of(*range(1, 9)) + ending)
        rewind_metrics(file, 5)
        assert file.read_text() == lines_of(*range(1, 6))
    file.write_text("")
    rewind_metrics(file, 5)
    assert file.read_text() == "" and list(read_metrics(file)) == []
    rewind_metrics(tmp_path / "none.jsonl", 5)
    assert list(read_metrics(tmp_path / "none.jsonl")) == []


def test_continuing_a_long_run_reads_only_the_end_of_its_metrics(tmp_path, monkeypatch):
    file, read = tmp_path / "metrics.jsonl", []
    filler = {"images_per_s": 1234.5, "padding": "x" * 200}
    file.write_text("".join(json.dumps({"step": step, **filler}) + "\n" for step in range(1, 20_001)))

    class Counting(io.FileIO):
        def read(self, size=-1):
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(metrics, "open", Counting, raising=False)
    rewind_metrics(file, 19_000)
    monkeypatch.undo()
    assert sum(read) <= 2**20 < file.stat().st_size / 4
    assert sum(1 for _ in read_metrics(file)) == 19_000


def test_tensorboard_without_the_package_is_one_line(train_tiny, monkeypatch):
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train_tiny(logging__tensorboard=True)


def test_the_progress_bar_does_not_flood_a_log(train_tiny, capsys):
    """Where stderr is no terminal, twenty steps are a handful of lines, not one or two each."""
    train_tiny(train__steps=20, checkpoint__every=20)
    shown = capsys.readouterr().err
    assert 1 <= shown.count("step/s") + shown.count("s/step") <= 3


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("jvp", ["dual", "func"])
def test_every_precision_and_derivative_trains(train_tiny, precision, jvp):
    run = train_tiny(train__steps=2, train__precision=precision, train__jvp=jvp, train__deterministic=True)
    torch.use_deterministic_algorithms(False)
    for line in comparable_metrics(run.path):
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    assert {value.dtype for value in newest(run.path).model.values()} == {torch.float32}
