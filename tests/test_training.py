"""The loop: what one step does, what a stopped and resumed run does, and when it must stop by itself.

Resumed means bit-equal: every test of it compares weights, averages, optimiser and metrics exactly.
"""

import json
import math
import re
import signal

import pytest
import torch
from meanflow.training.ema import Ema
from meanflow.training.guard import Guard
from running import CLOCK, comparable_metrics, steps_of, tiny_config, write_images

from meanflow.data import Dataset, load_dataset
from meanflow.errors import ConfigError, NumericsError
from meanflow.training import loop
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from meanflow.training.config import EmaConfig, OptimConfig
from meanflow.training.loop import train
from meanflow.training.metrics import MetricsLog, StepSums, read_metrics, rewind_metrics
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.run_folder import RunFolder
from meanflow.training.signals import StopRequest
from meanflow.training.state import fresh_state, learning_rate, make_optimizer
from meanflow.training.step import accumulate, make_loss, update

# Everything that could break the equality of a resumed run is on: dropout, augmentation, labels, accumulation in
# uneven parts (3 + 3 + 3 + 1), epochs of 22 images that batches of 10 cross, averages every third step, clipping.
RICH = {
    "model__channels": 3,
    "model__multipliers": [1, 2],
    "model__attention": [4],
    "model__dropout": 0.2,
    "model__augment_labels": 6,
    "model__classes": 2,
    "data__augment_p": 0.5,
    "data__anisotropy": "official",
    "data__flip": True,
    "data__flip_unlabelled": True,
    "optim__weight_decay": 0.01,
    "optim__clip": 1.0,
    "ema__decays": [0.9, 0.5],
    "ema__every": 3,
    "train__batch": 10,
    "train__microbatch": 3,
    "checkpoint__every": 4,
}
STEPS = 10


@pytest.fixture(scope="module")
def rich(tmp_path_factory):
    """RICH with its images: `rich(group__key=value, …)`."""
    images = str(write_images(tmp_path_factory.mktemp("data") / "images"))
    return lambda **changes: {**RICH, "data__path": images, **changes}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, rich) -> RunFolder:
    run, config = RunFolder(tmp_path_factory.mktemp("unbroken")), tiny_config(**rich(train__steps=STEPS))
    run.open_for(config)
    assert train(config, run, DistributedContext(0, 1, torch.device("cpu")), say=lambda line: None) == 0
    return run


def final(run: RunFolder):
    return load_checkpoint(list_checkpoints(run.checkpoints)[-1])


def differences(a, b, path: str = "") -> list[str]:
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


def assert_equal_runs(a: RunFolder, b: RunFolder) -> None:
    one, two = final(a), final(b)
    assert one.meta["step"] == two.meta["step"] and one.meta["images"] == two.meta["images"]
    for part in ("model", "ema", "optimizer"):
        assert differences(getattr(one, part), getattr(two, part), part) == []
    assert comparable_metrics(a.path) == comparable_metrics(b.path)


class StopAt:
    """The evaluation hook as a trigger: raises a real signal after a step; the loop then stops after the next."""

    def __init__(self, step: int, number: int = signal.SIGINT):
        self.step, self.number = step, number

    def __call__(self, run, config, state, ctx) -> None:
        if state.step == self.step:
            signal.raise_signal(self.number)


# --- a stopped and resumed run ---------------------------------------------------------------------------------


@pytest.mark.parametrize("stops", [[4], [9], [1, 2, 3], [3, 6, 8]], ids=str)
def test_a_resumed_run_is_bit_equal_to_an_unbroken_one(train_tiny, rich, unbroken, stops):
    for steps in [*stops, STEPS]:
        run = train_tiny(**rich(train__steps=steps))
    assert steps_of(run.path) == list(range(1, STEPS + 1))
    assert_equal_runs(run, unbroken)


def test_ctrl_c_saves_and_the_same_command_ends_bit_equal(tmp_path, alone, rich, unbroken):
    config, run, said = tiny_config(**rich(train__steps=STEPS, eval__every=1)), RunFolder(tmp_path), []
    run.open_for(config)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert train(config, run, alone, said.append, StopAt(5)) == 130
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert said == ["stopped and saved at step 6 of 10; the same command continues"]
    assert load_checkpoint(checkpoint_path(run.checkpoints, 6)).meta["step"] == 6 and steps_of(tmp_path)[-1] == 6
    assert train(config, run, alone, said.append, StopAt(7, signal.SIGTERM)) == 143
    assert said[1].startswith("continuing from step 6 (")
    assert train(config, run, alone, said.append) == 0
    assert_equal_runs(run, unbroken)


def test_a_signal_in_the_last_step_is_not_swallowed(tmp_path, alone):
    """It is finished and saved, but what comes after training (sampling, scoring) must not start."""
    config, run, said = tiny_config(train__steps=3, eval__every=3), RunFolder(tmp_path), []
    assert train(config, run, alone, said.append, StopAt(3)) == 130
    assert said == ["stopped and saved at step 3 of 3; the same command continues"]
    assert train(config, run, alone, said.append) == 0 and steps_of(tmp_path) == [1, 2, 3]


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


def test_a_finished_run_started_again_changes_nothing(train_tiny, rich, unbroken):
    run = train_tiny(**rich(train__steps=STEPS))
    before = {path: path.read_bytes() for path in run.checkpoints.iterdir()}
    run = train_tiny(**rich(train__steps=STEPS))
    assert {path: path.read_bytes() for path in run.checkpoints.iterdir()} == before
    assert_equal_runs(run, unbroken)


def test_a_finished_run_can_be_prolonged(train_tiny):
    once, twice = train_tiny("once", train__steps=8), train_tiny("twice", train__steps=5)
    twice = train_tiny("twice", train__steps=8, logging__flush_every=7, checkpoint__every=3, description="longer")
    assert_equal_runs(once, twice)


def test_steps_after_the_newest_checkpoint_are_done_again(train_tiny, rich, unbroken):
    """As after a kill: metrics run ahead of the checkpoint, and the last line is torn."""
    run = train_tiny(**rich(train__steps=6))
    for kind in (".json", ".pt"):
        checkpoint_path(run.checkpoints, 6).with_suffix(kind).unlink()
    with open(run.metrics_file, "a") as file:
        file.write('{"step": 7, "imag')
    run = train_tiny(**rich(train__steps=STEPS))
    assert_equal_runs(run, unbroken)


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path, alone, rich, unbroken):
    config, run, said = tiny_config(**rich(train__steps=6)), RunFolder(tmp_path), []
    train(config, run, alone, said.append)
    newest = checkpoint_path(run.checkpoints, 6)
    newest.write_bytes(newest.read_bytes()[:-1000])
    train(tiny_config(**rich(train__steps=STEPS)), run, alone, said.append)
    assert said[0].startswith(f"warning: {newest}: is damaged") and said[0].endswith("; using the one before")
    assert said[1].startswith("continuing from step 4 (")
    assert_equal_runs(run, unbroken)


def test_seconds_go_on_where_they_stopped(train_tiny):
    run = train_tiny(train__steps=3)
    before = read_metrics(run.metrics_file)[-1]["seconds"]
    run = train_tiny(train__steps=5)
    seconds = [line["seconds"] for line in read_metrics(run.metrics_file)]
    assert seconds == sorted(seconds) and seconds[2] == before < seconds[3]


def test_other_images_are_refused(train_tiny, rich, tmp_path):
    train_tiny(**rich(train__steps=1))
    other = write_images(tmp_path / "other", count=24)
    with pytest.raises(ConfigError, match=r"trained on other images \(22, now 24\)") as caught:
        train_tiny(**rich(train__steps=2, data__path=str(other)))
    assert "\n" not in str(caught.value) and "--out" in str(caught.value)


def test_the_same_images_elsewhere_are_accepted(train_tiny, rich, tmp_path):
    train_tiny(**rich(train__steps=1))
    moved = write_images(tmp_path / "moved")
    assert steps_of(train_tiny(**rich(train__steps=2, data__path=str(moved))).path) == [1, 2]


def test_the_course_depends_on_the_seed(train_tiny):
    runs = [train_tiny(f"seed{seed}", seed=seed, train__steps=2) for seed in (1, 2)]
    assert comparable_metrics(runs[0].path) != comparable_metrics(runs[1].path)


def test_evaluation_is_called_on_schedule_with_a_saved_checkpoint(tmp_path, alone):
    calls = []

    def evaluate(run, config, state, ctx):
        assert load_checkpoint(checkpoint_path(run.checkpoints, state.step)).meta["step"] == state.step
        calls.append((state.step, state.network.training))
        state.network.eval()
        torch.manual_seed(0)  # a careless hook

    config = tiny_config(train__steps=7, eval__every=3, checkpoint__every=5, model__dropout=0.2)
    runs = [RunFolder(tmp_path / name) for name in ("with", "without")]
    for run, hook in zip(runs, (evaluate, None), strict=True):
        run.open_for(config)
        train(config, run, alone, lambda line: None, hook)
    assert calls == [(3, True), (6, True)]
    assert_equal_runs(*runs)


# --- numbers that are not finite -------------------------------------------------------------------------------


def assert_finite(checkpoint) -> None:
    for part in (checkpoint.model, *checkpoint.ema.values(), *checkpoint.optimizer.values()):
        for name, value in part.items():
            assert torch.isfinite(value).all(), name


def poison_at(step: int, value: float, kept: dict):
    """After `step` was saved, spoil one weight; keep what the others and the optimiser were."""

    def evaluate(run, config, state, ctx):
        if state.step == step:
            with torch.no_grad():
                next(state.network.parameters()).view(-1)[0] = value
            kept["state"] = state
            kept["before"] = [p.detach().clone() for p in state.network.parameters()]
            kept["moments"] = {
                p: {k: v.clone() for k, v in values.items()} for p, values in state.optimizer.state.items()
            }

    return evaluate


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_loss_that_is_not_finite_stops_the_run_before_any_update(tmp_path, alone, value, clip):
    config, run, kept = tiny_config(train__steps=9, eval__every=4, optim__clip=clip), RunFolder(tmp_path), {}
    with pytest.raises(NumericsError) as caught:
        train(config, run, alone, lambda line: None, poison_at(4, value, kept))
    message, newest = str(caught.value), checkpoint_path(run.checkpoints, 4)
    assert caught.value.exit_code == 4 and "\n" not in message
    assert message.startswith("step 5: ") and f"the last good checkpoint is {newest}" in message
    assert "optim.lr" in message and "optim.clip" in message
    assert list_checkpoints(run.checkpoints)[-1] == newest
    assert_finite(load_checkpoint(newest))
    assert steps_of(tmp_path) == [1, 2, 3, 4]
    for before, after in zip(kept["before"], kept["state"].network.parameters(), strict=True):
        torch.testing.assert_close(after, before, rtol=0, atol=0, equal_nan=True)
    for p, moments in kept["moments"].items():
        assert differences(moments, dict(kept["state"].optimizer.state[p])) == []


def test_a_learning_rate_that_explodes(train_tiny, tmp_path):
    with pytest.raises(NumericsError, match=r"^step [2-9]: .*not finite.*last good checkpoint is .*\.pt") as caught:
        train_tiny(train__steps=9, optim__lr=1e25, optim__warmup_steps=0, checkpoint__every=1)
    bad = int(re.search(r"step (\d+)", str(caught.value))[1])
    run = RunFolder(tmp_path / "run")
    assert final(run).meta["step"] == bad - 1 == steps_of(run.path)[-1]
    assert_finite(final(run))
    for line in run.metrics_file.read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_before_the_first_checkpoint_the_message_says_so(tmp_path, alone, monkeypatch):
    def spoilt(config, device):
        state = fresh_state(config, device)
        with torch.no_grad():
            next(state.network.parameters()).fill_(math.nan)
        return state

    monkeypatch.setattr(loop, "fresh_state", spoilt)
    with pytest.raises(NumericsError, match=r"^step 1: .*there is no checkpoint yet"):
        train(tiny_config(), RunFolder(tmp_path), alone, lambda line: None)
    assert not list_checkpoints(tmp_path / "checkpoints")


# --- one step --------------------------------------------------------------------------------------------------


def one_parameter(*values: float) -> torch.nn.Module:
    module = torch.nn.Module()
    module.p = torch.nn.Parameter(torch.tensor(values))
    return module


OPTIM = OptimConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, warmup_steps=0, clip=None)


def test_the_warm_up_is_linear_and_then_constant():
    config = OptimConfig(lr=2.0, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, warmup_steps=4, clip=None)
    assert [learning_rate(config, step) for step in range(6)] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert learning_rate(OPTIM, 0) == 0.1


@pytest.mark.parametrize("clip", [None, 0.5])
def test_update_is_adam_with_clipping(clip):
    """Against PyTorch's plain Adam and its own clipping, over several steps and a warm-up."""
    config = OptimConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0, warmup_steps=3, clip=clip)
    ours, theirs = one_parameter(1.0, -2.0, 3.0), one_parameter(1.0, -2.0, 3.0)
    optimizer, guard = make_optimizer(ours, config), Guard(None, torch.device("cpu"))
    plain = torch.optim.Adam(theirs.parameters(), lr=1.0, betas=config.betas, eps=config.eps, foreach=False)
    for step in range(6):
        gradient = torch.randn(3, generator=torch.Generator().manual_seed(step))
        ours.p.grad, theirs.p.grad = gradient.clone(), gradient.clone()
        norm = update(optimizer, [ours.p], config, step, guard)
        if clip:
            torch.nn.utils.clip_grad_norm_(theirs.parameters(), clip)
        plain.param_groups[0]["lr"] = learning_rate(config, step)
        plain.step()
        torch.testing.assert_close(norm, gradient.norm())
        torch.testing.assert_close(ours.p, theirs.p, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("clip", [None, 0.5])
def test_a_bad_gradient_leaves_no_trace(bad, clip):
    """Weights, moments and Adam's own step count: the next good gradient acts as if the bad one had never been."""
    config = OptimConfig(lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1, warmup_steps=0, clip=clip)
    with_bad, without = one_parameter(1.0, 2.0), one_parameter(1.0, 2.0)
    optimizers = [make_optimizer(module, config) for module in (with_bad, without)]
    for gradient in ([0.3, 0.1], [bad, 0.1], [0.2, -5.0]):
        for module, optimizer in zip((with_bad, without), optimizers, strict=True):
            if module is without and not all(map(math.isfinite, gradient)):
                continue
            module.p.grad = torch.tensor(gradient)
            update(optimizer, [module.p], config, 0, Guard(None, torch.device("cpu")))
    assert torch.equal(with_bad.p, without.p)
    states = [optimizer.state[module.p] for module, optimizer in zip((with_bad, without), optimizers, strict=True)]
    assert differences(dict(states[0]), dict(states[1])) == []


def test_averages_follow_their_closed_form():
    """Every 2 steps with decay²: after the updates at 2 and 4, from e₀ = 1 towards the weights 3 and 5."""
    module = one_parameter(1.0)
    ema = Ema(module, EmaConfig(decays=(0.9, 0.5), every=2, eval=0.9, store="device"))
    for step in range(1, 6):
        with torch.no_grad():
            module.p.fill_(step + 1.0)
        ema.update(step)
    for decay in (0.9, 0.5):
        d = decay**2
        assert ema.averages[decay]["p"].item() == pytest.approx(d * (d * 1 + (1 - d) * 3) + (1 - d) * 5, rel=1e-6)


def parts_of_step(config, dataset: Dataset, ctx: DistributedContext, step: int):
    return list(BatchStream(dataset, config, ctx).micro_batches(step))


@pytest.mark.parametrize(("world", "microbatch"), [(1, None), (1, 3), (2, None), (2, 2), (5, 1)])
def test_a_step_sees_the_same_samples_however_it_is_divided(rich, world, microbatch):
    config = tiny_config(**rich(train__microbatch=microbatch))
    dataset = load_dataset(config.data, 8, 3)
    whole = parts_of_step(
        tiny_config(**rich(train__microbatch=None)), dataset, DistributedContext(0, 1, torch.device("cpu")), 2
    )
    divided = [
        part
        for rank in range(world)
        for part in parts_of_step(config, dataset, DistributedContext(rank, world, torch.device("cpu")), 2)
    ]
    if microbatch:
        assert all(len(part.t) <= microbatch for part in divided)

    def rows(parts):
        columns = [
            torch.cat([getattr(part, name).flatten(1) for part in parts], 0).double() for name in ("x", "eps")
        ] + [torch.cat([torch.stack([part.t, part.r], 1).double() for part in parts])]
        columns += [torch.cat([part.cond["augment_labels"].double() for part in parts])]
        columns += [torch.cat([part.cond["class_labels"].double()[:, None] for part in parts])]
        table = torch.cat(columns, 1)
        return table[torch.argsort(table[:, -9 - 1])]  # by t, which is unique

    assert torch.equal(rows(whole), rows(divided))
    for part in divided:
        moving = (part.t != part.r).tolist()
        assert moving == sorted(moving, reverse=True), "samples with r ≠ t come first"


def test_batches_are_a_function_of_the_step_alone(rich):
    config = tiny_config(**rich())
    dataset, alone = load_dataset(config.data, 8, 3), DistributedContext(0, 1, torch.device("cpu"))
    stream = BatchStream(dataset, config, alone)
    first = list(stream.micro_batches(3))
    list(stream.micro_batches(0))
    again = list(BatchStream(dataset, config, alone).micro_batches(3))
    other = list(stream.micro_batches(4))
    for a, b, c in zip(first, again, other, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.eps, b.eps) and torch.equal(a.t, b.t)
        assert not torch.equal(a.eps, c.eps)


def test_images_reach_the_network_in_its_range_without_augmentation(alone):
    config = tiny_config(train__batch=1797)
    dataset = load_dataset(config.data, 8, 1)
    (part,) = BatchStream(dataset, config, alone).micro_batches(0)
    assert part.x.min() == -1 and part.x.max() == 1 and part.cond == {}
    values = ((part.x + 1) * 127.5).round().to(torch.uint8)
    assert torch.equal(values.flatten().sort()[0], dataset.images.flatten().sort()[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model__classes": 3}, r"model\.classes is 3, .* 2 classes; set model\.classes=2"),
        ({"model__classes": 0}, None),
    ],
)
def test_labels_must_fit_the_data(rich, alone, change, message):
    config = tiny_config(**rich(**change))
    dataset = load_dataset(config.data, 8, 3)
    if message is None:
        assert "class_labels" not in next(BatchStream(dataset, config, alone).micro_batches(0)).cond
        return
    with pytest.raises(ConfigError, match=message):
        BatchStream(dataset, config, alone)


def test_labels_of_a_flat_folder(rich, alone):
    flat = Dataset(torch.zeros(30, 3, 8, 8, dtype=torch.uint8), None, ())
    with pytest.raises(ConfigError, match=r"no class folders"):
        BatchStream(flat, tiny_config(**rich()), alone)


@pytest.mark.parametrize("microbatch", [1, 3, 4, 7])
def test_accumulation_gives_the_gradient_of_the_whole_batch(rich, alone, microbatch):
    def gradients(**change):
        config = tiny_config(**rich(model__dropout=0.0, **change))
        state = fresh_state(config, alone.device)
        sums, total = StepSums(alone.device, False), GradientSum(state.network, alone)
        stream = BatchStream(load_dataset(config.data, 8, 3), config, alone)
        loss = make_loss(state.network, config, alone.device)
        accumulate(loss, stream.micro_batches(1), stream.micro_steps, config.train.batch, total, sums)
        return [p.grad for p in state.network.parameters()], sums.total

    whole, sums = gradients(train__microbatch=None)
    parts, part_sums = gradients(train__microbatch=microbatch)
    torch.testing.assert_close(part_sums, sums, rtol=1e-5, atol=1e-6)
    scale = max(g.abs().max() for g in whole)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a / scale, b / scale, rtol=0, atol=1e-6)


# --- metrics ---------------------------------------------------------------------------------------------------


def test_a_line_of_metrics_is_what_it_says(train_tiny):
    """Recomputed from the first batch and the initial network, by hand."""
    run = train_tiny(train__steps=1)
    config, alone = tiny_config(train__steps=1), DistributedContext(0, 1, torch.device("cpu"))
    network = fresh_state(config, alone.device).network
    (part,) = BatchStream(load_dataset(config.data, 8, 1), config, alone).micro_batches(0)
    out = make_loss(network, config, alone.device)(part)
    out.weighted.mean().backward()
    norm = torch.sqrt(sum(p.grad.square().sum() for p in network.parameters())).item()
    error, still = out.squared_error, part.t == part.r
    (line,) = read_metrics(run.metrics_file)
    assert line["step"] == 1 and line["images"] == 8 and line["lr"] == pytest.approx(1e-3 / 5)
    assert line["loss"] == pytest.approx((error / (error + 1e-3) ** 0.75).mean().item(), rel=1e-5)
    assert line["error"] == pytest.approx(error.mean().item(), rel=1e-5)
    assert line["error_r_eq_t"] == pytest.approx(error[still].mean().item(), rel=1e-5) and still.sum() == 2
    assert line["error_r_lt_t"] == pytest.approx(error[~still].mean().item(), rel=1e-5)
    assert line["grad_norm"] == pytest.approx(norm, rel=1e-4)
    assert set(line) == {
        *("step", "images", "loss", "error", "error_r_eq_t", "error_r_lt_t", "grad_norm", "lr", *CLOCK)
    }
    assert line["images_per_s"] > 0 and line["seconds"] > 0 and line["memory_mb"] > 1


@pytest.mark.parametrize(("ratio", "missing"), [(0.0, "error_r_lt_t"), (1.0, "error_r_eq_t")])
def test_an_error_without_samples_is_null_not_zero(train_tiny, ratio, missing):
    run = train_tiny(train__steps=2, objective__times__ratio=ratio)
    for line in comparable_metrics(run.path):
        assert line[missing] is None
        assert line[{"error_r_lt_t": "error_r_eq_t", "error_r_eq_t": "error_r_lt_t"}[missing]] == line["error"]


def sums_with(loss: float, stop: bool = False) -> StepSums:
    sums = StepSums(torch.device("cpu"), stop)
    sums.add(torch.tensor([loss, loss]), torch.tensor([loss, loss]), 1)
    return sums


def test_the_log_keeps_what_came_before_a_bad_step(tmp_path, alone):
    """As on a GPU, where the log is read once in many steps."""
    log = MetricsLog(tmp_path / "metrics.jsonl", alone, 50, 0.0)
    log.flush_every = 50
    for step, loss in enumerate([1.0, 2.0, math.nan, 4.0], 1):
        log.record(step, step * 2, 2, 0.1, sums_with(loss), torch.tensor(1.0))
    with pytest.raises(NumericsError, match=r"^step 3: loss nan"):
        log.flush()
    assert [line["loss"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [1.0, 2.0]


def test_a_request_to_stop_is_seen_at_the_next_reading(tmp_path, alone):
    log = MetricsLog(tmp_path / "metrics.jsonl", alone, 50, 0.0)
    log.record(1, 2, 2, 0.1, sums_with(1.0), torch.tensor(1.0))
    assert log.flush() is False
    log.record(2, 4, 2, 0.1, sums_with(1.0, stop=True), torch.tensor(1.0))
    log.record(3, 6, 2, 0.1, sums_with(1.0), torch.tensor(1.0))
    assert log.flush() is True and log.flush() is False


def test_the_wait_for_the_device_counts_as_training_time_and_pauses_do_not(tmp_path, monkeypatch):
    """A device works on after the host has issued its steps: their time is known when the log is read."""
    clock = [0.0]
    monkeypatch.setattr("meanflow.training.metrics.time.perf_counter", lambda: clock[0])

    class Busy(DistributedContext):
        def all_reduce(self, x):
            clock[0] += 3.0  # the device is done
            return x

    log = MetricsLog(tmp_path / "metrics.jsonl", Busy(0, 1, torch.device("cpu")), 50, 10.0)
    for step in range(1, 5):
        clock[0] += 0.25  # the host issues a step
        log.record(step, step * 2, 2, 0.1, sums_with(1.0), torch.tensor(1.0))
    log.flush()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["seconds"] for line in lines] == [11.0, 12.0, 13.0, 14.0] and log.seconds == 14.0
    assert [line["images_per_s"] for line in lines] == [2.0] * 4
    clock[0] += 1000  # a checkpoint, an evaluation
    log.pause()
    clock[0] += 1
    log.record(5, 10, 2, 0.1, sums_with(1.0), torch.tensor(1.0))
    log.flush()
    assert read_metrics(tmp_path / "metrics.jsonl")[-1]["seconds"] == 18.0


def test_metrics_of_a_loop_leave_out_evaluations(tmp_path, alone):
    import time

    config, run = tiny_config(train__steps=3, eval__every=2), RunFolder(tmp_path)
    train(config, run, alone, lambda line: None, lambda *ignored: time.sleep(2.0))
    assert read_metrics(run.metrics_file)[-1]["seconds"] < 2.0


@pytest.mark.parametrize(
    "torn", ['{"step": 4, "los', '{"step"', "\x00\x00\x00", "null", "[4]", '{"loss": 1}', '"4"', "4"]
)
def test_torn_and_foreign_lines_are_left_out(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    good = [{"step": step, "loss": float(step)} for step in (1, 2, 3)]
    file.write_text("".join(json.dumps(line) + "\n" for line in good) + torn)
    assert read_metrics(file) == good
    rewind_metrics(file, 2)
    assert file.read_text() == "".join(json.dumps(line) + "\n" for line in good[:2])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_no_metrics_yet(tmp_path):
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_tensorboard_without_the_package_is_one_line(tmp_path, alone, monkeypatch):
    monkeypatch.setattr(loop.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        train(tiny_config(logging__tensorboard=True), RunFolder(tmp_path), alone, lambda line: None)


# --- the loop's words ------------------------------------------------------------------------------------------


def test_the_progress_bar_does_not_flood_a_log(tmp_path, alone, capsys):
    """Where stderr is no terminal, twenty steps are a handful of lines, not one or two each."""
    train(tiny_config(train__steps=20, checkpoint__every=20), RunFolder(tmp_path), alone, lambda line: None)
    shown = capsys.readouterr().err
    assert 1 <= shown.count("step/s") + shown.count("s/step") <= 3


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
@pytest.mark.parametrize("jvp", ["dual", "func"])
def test_every_precision_and_derivative_trains(train_tiny, precision, jvp):
    run = train_tiny(train__steps=2, train__precision=precision, train__jvp=jvp, train__deterministic=True)
    torch.use_deterministic_algorithms(False)
    for line in comparable_metrics(run.path):
        assert math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
    assert {value.dtype for value in final(run).model.values()} == {torch.float32}
