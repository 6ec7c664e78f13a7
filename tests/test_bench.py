"""`eval.bench` on tiny recipes; and what a step costs, in counts: network passes by kind, tensors kept, host waits."""

import json
from collections import Counter

import pytest
import torch
from guided_helpers import GUIDED
from report_helpers import refused
from running import guided_latent_changes, tiny_config, write_recipe
from torch.utils._python_dispatch import TorchDispatchMode

from eval import bench
from eval.benchmark import FLOW_MATCHING, PLAIN, SEPARATE, clock, rows
from eval.benchmark.clock import Spread, ratio, take_turns
from eval.benchmark.steps import WAYS, Setting, Step, peak_memory
from meanflow import jvp
from meanflow.errors import AssetError, UserError
from meanflow.objectives.meanflow import MeanFlow
from meanflow.training import config as config_module
from meanflow.training.batches import BatchStream
from meanflow.training.metrics import MetricsLog, StepSums
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.setup import open_data
from meanflow.training.state import fresh_state
from meanflow.training.step import accumulate, configure_numerics, make_loss, update

CPU = torch.device("cpu")
B, N = 8, 6  # rows of a batch, and those with r ≠ t: the recipe's 75 %


@pytest.fixture
def step(recipe):
    """`step(way, …)` is one step of the tiny recipe."""
    path = recipe(model__attention=[8], model__dropout=0.2)
    return lambda way, *overrides: Step(Setting(path, overrides, B, way, "fp32", None), CPU)


class Passes(TorchDispatchMode):
    """Counts convolutions by (kind, rows). As many as the network has with the same rows are one pass of that kind."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("convolution", "convolution_backward"):
            grad_output = name == "convolution_backward"
            kind = "backward" if grad_output else "with graph" if torch.is_grad_enabled() else "without"
            self.seen[kind, args[0].shape[0]] += 1
        return function(*args, **(kwargs or {}))


def passes(step: Step) -> dict[tuple[str, int], float]:
    convolutions = sum(isinstance(m, torch.nn.Conv2d) for m in step.state.network.modules())
    with Passes() as counter:
        step.backward()
    return {what: count / convolutions for what, count in counter.seen.items()}


@pytest.mark.parametrize(
    ("way", "ratio", "without_graph"),
    [(FLOW_MATCHING, 0.75, {}), ("dual", 0.75, {N: 1}), ("dual", 0.25, {2: 1}), ("dual", 1.0, {B: 1})],
)
def test_dual_numbers_add_one_pass_without_graph_of_the_rows_with_r_neq_t(step, way, ratio, without_graph):
    """To one pass forward and one backward, which are all of Flow Matching."""
    expected = {("with graph", B): 1, ("backward", B): 1}
    expected |= {("without", count): times for count, times in without_graph.items()}
    assert passes(step(way, f"objective.times.ratio={ratio}")) == expected


def test_the_other_ways_cost_what_they_are_said_to(step):
    separate = passes(step(SEPARATE))
    assert separate[("with graph", B)] == separate[("backward", B)] == 1
    assert separate[("without", N)] >= 2  # value and tangent once more
    assert passes(step(PLAIN))["with graph", B] >= 2  # the tangent, of all rows, with a graph that nothing uses


def saved_bytes(step: Step) -> int:
    storages = {}

    def pack(x):
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = step.loss(step.batch)
    assert out.per_sample.requires_grad
    return sum(storages.values())


def test_no_graph_is_kept_for_the_tangent(step):
    """What waits for the backward pass is what Flow Matching keeps: the tangent adds nothing."""
    assert saved_bytes(step("dual")) <= 1.01 * saved_bytes(step(FLOW_MATCHING))


@pytest.mark.gpu
def test_the_host_never_waits_for_the_gpu_between_reads_of_the_metrics(tmp_path):
    config = tiny_config(model__attention=[8], model__dropout=0.2, logging__flush_every=50)
    alone = DistributedContext(0, 1, torch.device("cuda"))
    configure_numerics(config.train)
    state, data = fresh_state(config, alone.device), open_data(config, alone)
    stream, loss = BatchStream(data, config, alone), make_loss(state.network, config, alone.device)
    gradients, log = GradientSum(state.network, alone), MetricsLog(tmp_path / "metrics.jsonl", alone, 50, 0.0)
    for k in range(6):
        torch.cuda.set_sync_debug_mode("error" if k > 2 else "default")
        sums = StepSums()
        accumulate(loss, stream.micro_batches(k), stream.micro_steps, config.train.batch, gradients, sums)
        norm = update(state.optimizer, gradients.parameters, config.optim, k, state.guard)
        state.ema.update(k + 1)
        log.record(k + 1, config.train.batch, 0.0, sums, norm, state.guard.skipped)
    torch.cuda.set_sync_debug_mode("default")


def test_contenders_take_turns_and_drift_cancels():
    called = []
    contenders = {name: lambda name=name: called.append(name) for name in "ab"}
    seconds = take_turns(contenders, 3, CPU)
    assert "".join(called) == "ab" + "ab" + "ba" + "ab"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 3, "b": 3}
    drifting = [1.0, 2.0, 4.0]
    assert ratio([3 * x for x in drifting], drifting) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_command_prints_and_writes_all_figures(recipe, tmp_path, monkeypatch, capsys, bf16):
    monkeypatch.setattr(clock, "cpu_has_bf16", lambda: bf16)  # on any machine
    monkeypatch.setattr(rows, "peak_memory", lambda setting, device: 200.0 + len(setting.way))
    out = tmp_path / "bench.json"
    how = ["--batch", "8", "--repeats", "2", "--jvp", "dual,func,separate", "--device", "cpu", "--out", str(out)]
    assert bench.main([str(recipe(model__width=4)), *how]) == 0
    text, tree = capsys.readouterr().out, json.loads(out.read_text())
    (report,) = tree["reports"]
    assert tree["machine"]["torch"] == torch.__version__ and "--repeats 2" in tree["command"]
    ours = [f"{way}, {kind}" for kind in ("fp32", "bf16")[: 1 + bf16] for way in WAYS if way != PLAIN]
    names = [*ours, f"{PLAIN}, fp32"]
    assert [step["name"] for step in report["steps"]] == names
    assert all(name in text for name in names)
    assert all(len(step["rounds"]) == 2 and step["flops"] > 0 for step in report["steps"])
    by_name = {row["name"]: row for row in report["rows"]}
    memory = by_name["peak memory, MeanFlow / Flow Matching step"]
    assert memory["figure"]["median"] == pytest.approx(204 / 213)
    assert by_name["MeanFlow / Flow Matching step, r≠t 75%"]["figure"]["median"] > 0
    assert "images/s in fp32 against the plain, fp32 step" in by_name
    assert ("images/s in bf16 against the plain, fp32 step" in by_name) == bf16 and len(by_name) == 5 + bf16


def test_latent_recipes_and_objectives_without_a_plain_form(tmp_path, recipe, capsys, monkeypatch, caplog):
    path = recipe(**guided_latent_changes(tmp_path / "latents"))
    monkeypatch.setattr(MeanFlow, "plain", None)
    with caplog.at_level("INFO", "meanflow"):
        assert (
            bench.main([str(path), "--repeats", "1", "--rows", "step,plain,outside,sampling", "--device", "cpu"]) == 0
        )
    assert "tiny: objective meanflow has no plain form to compare with" in caplog.messages
    out = capsys.readouterr().out
    assert "share of the step" in out and "images/s in" not in out


def test_the_steps_of_another_recipe_take_turns_with_these(recipe, tmp_path, capsys):
    other, out = recipe(model__width=4).rename(tmp_path / "other.yaml"), tmp_path / "bench.json"
    how = ["--batch", "8", "--repeats", "1", "--rows", "step,outside", "--precisions", "fp32", "--device", "cpu"]
    guided = write_recipe(tmp_path / "guided.yaml", **GUIDED)
    assert bench.main([str(guided), "--against", str(other), *how, "--out", str(out)]) == 0
    (report,) = json.loads(out.read_text())["reports"]
    flops = {step["name"]: step["flops"] for step in report["steps"]}
    figures = {row["name"]: row["figure"]["median"] for row in report["rows"]}
    for name, step in (("step", "dual"), ("Flow Matching step", FLOW_MATCHING)):
        counted = flops["dual, fp32"] / flops[f"other: {step}, fp32"]
        assert figures[f"guided / other {name}, counted operations"] == pytest.approx(counted)
        assert figures[f"guided / other {name}, seconds"] > 0
    # Forward and backward pass of u and of v, a tangent for half of the samples, and v twice without gradient, as a
    # class's and as no class's; of two blocks each branch has one of its own.
    assert 5 < figures["guided step, counted in forward passes of u"] < 8
    assert "guided / other step, seconds" in capsys.readouterr().out


def test_memory_is_that_of_a_separate_process(recipe):
    peak = peak_memory(Setting(recipe(model__width=4), (), 2, "dual", "fp32", None), CPU, steps=1)
    assert 50 < peak < 5000


@pytest.mark.parametrize(
    "arguments",
    [["--batch", "0"], ["--rows", "speed"], ["--precisions", "fp16"], ["--jvp", "dual,dual"], ["--compile", "fast"]],
)
def test_bad_arguments_are_one_line(arguments):
    assert arguments[0] in refused(UserError, bench.main, *arguments)


def test_recipes_and_files_that_are_not_there(tmp_path, recipe):
    assert "no such recipe" in refused(UserError, bench.main, "nothing")
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path, tmp_path / "file" / "out.json"):
        assert str(out) in refused(AssetError, bench.main, recipe(), "--out", out)


def test_the_names_that_it_takes_are_those_of_the_settings():
    theirs = (config_module.PRECISIONS, config_module.COMPILE_MODES, jvp.METHODS)
    assert theirs == (bench.PRECISIONS, bench.COMPILE_MODES, bench.METHODS)


def test_flops_of_a_step(step):
    """A tangent of N rows costs N/B of a forward pass, of which a step without it makes about three."""
    flow_matching, dual = (step(way, "model.attention=[]", "model.width=32").flops() for way in (FLOW_MATCHING, "dual"))
    assert dual / flow_matching == pytest.approx(1 + N / B / 3, rel=0.1)
