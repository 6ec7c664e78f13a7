"""u and du/dt in one graph. `aot_eager` traces as torch.compile does and runs the graph as it is."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from guided_helpers import guided_batch, two_heads
from method_helpers import DIT, UNET, assert_close, batch, loss_of, small, with_gradient
from running import ROOT, comparable_metrics, in_processes, newest, tiny_config, train_run
from torch import nn
from torch._functorch.aot_autograd import aot_module_simplified

from meanflow.jvp import METHODS, compiled_jvp, take_jvp, value_and_jvp
from meanflow.objectives.imeanflow import IMeanFlow
from meanflow.training import compiling
from meanflow.training.config import load_config
from meanflow.training.run_folder import RunFolder
from unet.layers import GroupNorm

TINY_UNET = replace(UNET, image_size=4, width=4, multipliers=(1,), attention=(), augment_labels=0, classes=0)
TINY_DIT = replace(DIT, image_size=4, width=16, depth=1)


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without its code generator; the list of what it is given."""
    given, compile = [], torch.compile

    def counted(function, **how):
        given.append(function)
        return compile(function, backend="aot_eager", **{key: how[key] for key in how if key != "mode"})

    monkeypatch.setattr(torch, "compile", counted)
    return given


class Network(nn.Module):
    """A little of everything: convolution, norm, dropout, a shift by the times."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3, padding=1), GroupNorm(8), nn.Conv2d(8, 3, 3, padding=1)
        self.times = nn.Linear(2, 8)

    def forward(self, z, r, t):
        x = self.first(z) + self.times(torch.cat([r[:, None], t[:, None]], dim=1))[:, :, None, None]
        return self.last(F.dropout(F.silu(self.norm(x)), 0.2, self.training))


def compared(net, u, compiled, b, eager=value_and_jvp):
    """Losses and gradient, eager and compiled, with the same dropout masks."""
    results = []
    for jvp in (eager, compiled):
        torch.manual_seed(5)
        results.append(with_gradient(net, loss_of(u, b, jvp=jvp)))
    assert_close(*results, 1e-5)


def tiny_batch(r_eq_t: int, config=TINY_UNET):
    return batch(config, torch.float32, r_eq_t=r_eq_t)


@pytest.mark.parametrize(("bf16", "r_eq_t"), [(False, 2), (True, 2), (False, 8)])
def test_dual_numbers_compile_and_give_the_same(graphs, bf16, r_eq_t):
    net, b = Network(), tiny_batch(r_eq_t)

    def u(z, r, t):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return net(z, r, t)

    compiled = compiled_jvp(net, "dual", "default")
    for _ in range(2):
        compared(net, u, compiled, b)
        with torch.no_grad():  # the graph holds the parameters themselves
            for p in net.parameters():
                p.mul_(1.1)
    assert len(graphs) == 1
    with pytest.raises(ValueError, match="one function"):
        loss_of(functools.partial(u), b, jvp=compiled)


@pytest.mark.parametrize("config", [TINY_UNET, TINY_DIT], ids=["unet", "dit"])
def test_func_compiles_and_gives_the_same(graphs, config):
    net = small(config, torch.float32)
    compared(net, net, compiled_jvp(net, "func", "default"), tiny_batch(2, config), eager=take_jvp("func"))
    assert len(graphs) == 1


@pytest.mark.parametrize("method", METHODS)
def test_a_network_with_two_outputs_compiles_and_gives_the_same(graphs, method):
    net, objective = two_heads(torch.float32, TINY_DIT), IMeanFlow()
    b, compiled = guided_batch(objective, torch.float32, 8, 3, TINY_DIT), compiled_jvp(net, method, "default")
    for _ in range(2):
        found, expected = (with_gradient(net, loss_of(net, b, objective, jvp=j)) for j in (compiled, take_jvp(method)))
        assert_close(found, expected, 1e-5)
    assert len(graphs) == 1


def test_a_varying_number_of_rows_needs_few_graphs(graphs, monkeypatch):
    monkeypatch.setattr("meanflow.jvp.PARTS", 2)
    net = Network().eval()
    compiled = compiled_jvp(net, "dual", "default")
    for r_eq_t in (7, 5, 4, 3):
        compared(net, net, compiled, tiny_batch(r_eq_t))
    assert len(graphs) == 2


def test_a_compiled_run_is_the_eager_one(graphs, train_tiny):
    config = {"model__width": 4, "model__dropout": 0.1, "train__steps": 3}
    runs = [train_tiny(str(mode), train__compile=mode, **config) for mode in (None, "default")]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    assert len(graphs) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_mode_of_the_recipe_is_torch_compiles(method, monkeypatch):
    asked, net = [], Network().eval()
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how["mode"]) or function)
    loss_of(net, tiny_batch(3), jvp=compiled_jvp(net, method, "reduce-overhead"))
    assert asked == ["reduce-overhead"]


# --- in training: automatic, in several processes, with memory that is used again ------------------------------------

RUN = {"model__width": 4}
ONE_SHAPE = {**RUN, "objective__times__ratio": 1.0}  # and so one graph


def reusing(graph, inputs):
    """A backend like CUDA graphs: each call's outputs lie in the memory of the outputs of the call before."""

    def compiled(module, _):
        memory = []

        def run(*arguments):
            outputs = module(*arguments)
            if not memory:
                memory.extend(y.clone() if isinstance(y, torch.Tensor) else y for y in outputs)
            for kept, y in zip(memory, outputs, strict=True):
                if isinstance(y, torch.Tensor):
                    kept.copy_(y)
            return [kept.detach() if isinstance(kept, torch.Tensor) else kept for kept in memory]

        return make_boxed_func(run)

    return aot_module_simplified(graph, inputs, fw_compiler=compiled, bw_compiler=compiled)


@pytest.fixture
def backend(monkeypatch):
    """`backend(name or function)`: torch.compile with it."""
    compile = torch.compile

    def use(backend):
        monkeypatch.setattr(torch, "compile", lambda function, mode, **how: compile(function, backend=backend, **how))

    return use


def losses(run) -> list[float]:
    return [line["loss"] for line in comparable_metrics(run.path)]


def test_memory_that_the_next_call_overwrites_changes_nothing(backend, train_tiny):
    """Gradients are added up where they are the run's own, and what is logged is read before the next call."""
    backend(reusing)
    runs = [train_tiny(str(mode), train__compile=mode, train__microbatch=4, **RUN) for mode in (None, "default")]
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), rel=1e-5)
    a, b = (newest(run.path).model for run in runs)
    assert all(torch.allclose(a[name], b[name], rtol=1e-4, atol=1e-6) for name in a)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_auto_compiles_where_it_is_worth_it(train_tiny, monkeypatch, logged, dropout):
    """With dropout once more, for the comparison in evaluation mode. The run is that of compile=default."""
    graphs = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: graphs.append(how["mode"]) or function)
    config = {**RUN, "model__dropout": dropout}
    expected = losses(train_tiny("named", **config, train__compile="default"))
    train_tiny("cpu", **config)
    assert graphs == ["default"]  # auto is eager on a CPU
    monkeypatch.setattr(compiling, "chosen_mode", lambda *args: "reduce-overhead")
    assert losses(train_tiny("auto", **config)) == pytest.approx(expected, rel=1e-5)
    assert graphs == ["default"] + ["reduce-overhead"] * (2 if dropout else 1)
    assert "train.compile=auto: reduce-overhead" in logged.text and "not compiled" not in logged.text


@pytest.mark.parametrize("fault", ["raises", "wrong", "nan"])
def test_auto_stays_eager_where_compiling_fails_or_is_wrong(train_tiny, monkeypatch, logged, fault):
    def compile(function, **how):
        if fault == "raises":
            raise RuntimeError("no C++ compiler\nin this image")

        def wrong(*args):
            value, tangent = function(*args)
            return value, tangent * (float("nan") if fault == "nan" else 1.1)

        return wrong

    eager = train_tiny("eager", **RUN, model__dropout=0.3)
    monkeypatch.setattr(compiling, "chosen_mode", lambda *args: "default")
    monkeypatch.setattr(torch, "compile", compile)
    found = train_tiny("auto", **RUN, model__dropout=0.3)
    assert losses(found) == pytest.approx(losses(eager), rel=1e-6)
    (warning,) = [line for line in logged.messages if "not compiled" in line]
    assert ("RuntimeError: no C++ compiler)" if fault == "raises" else "numbers are off by") in warning


def test_what_auto_chooses():
    gpu, config = torch.device("cuda"), load_config(ROOT / "recipes" / "cifar10.yaml")
    assert compiling.chosen_mode(config, gpu, 128) == "default"
    assert compiling.chosen_mode(config, torch.device("cpu"), 128) is None
    for change in ({"steps": 500}, {"activation_checkpointing": "blocks"}):
        assert compiling.chosen_mode(replace(config, train=replace(config.train, **change)), gpu, 128) is None


def trained_compiled(ctx, folder):
    """In each of two processes: the losses of a compiled run."""
    compile, run = torch.compile, RunFolder(folder)
    torch.compile = lambda function, mode, **how: compile(function, backend="aot_eager", **how)
    train_run(tiny_config(**ONE_SHAPE, train__compile="default", train__microbatch=2), run, ctx)
    ctx.barrier()
    return losses(run)


def test_compiled_steps_in_two_processes(tmp_path, train_tiny):
    eager = losses(train_tiny("eager", **ONE_SHAPE))
    for compiled in in_processes(2, trained_compiled, tmp_path / "compiled"):
        assert compiled == pytest.approx(eager, rel=1e-5) and len(eager) == 6
