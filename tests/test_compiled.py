"""u and du/dt in one graph. `aot_eager` traces as torch.compile does and runs the graph as it is."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_helpers import DIT, UNET, assert_close, batch, loss_of, small, with_gradient
from running import comparable_metrics
from torch import nn

from meanflow.jvp import METHODS, compiled_jvp, take_jvp, value_and_jvp
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
    assert comparable_metrics(runs[0].path) == comparable_metrics(runs[1].path)
    assert len(graphs) == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_mode_of_the_recipe_is_torch_compiles(method, monkeypatch):
    asked, net = [], Network().eval()
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how["mode"]) or function)
    loss_of(net, tiny_batch(3), jvp=compiled_jvp(net, method, "reduce-overhead"))
    assert asked == ["reduce-overhead"]
