"""u and du/dt in one graph. `aot_eager` traces as torch.compile does and runs the graph as it stands."""

import pytest
import torch
import torch.nn.functional as F
from meanflow.training.compiled import compiled_derivative
from running import comparable_metrics
from torch import nn

from meanflow.jvp import value_and_tangent
from meanflow.objectives.meanflow import LossConfig, meanflow_loss
from unet.layers import GroupNorm


@pytest.fixture
def graphs(monkeypatch):
    """torch.compile without its code generator; the list of what it is given."""
    given, compile = [], torch.compile

    def counted(function, **how):
        given.append(function)
        return compile(function, backend="aot_eager", **how)

    monkeypatch.setattr(torch, "compile", counted)
    return given


class Network(nn.Module):
    """A little of everything: convolution, norm, dropout, a shift by the times."""

    def __init__(self):
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(2, 8, 3, padding=1), GroupNorm(8), nn.Conv2d(8, 2, 3, padding=1)
        self.times = nn.Linear(2, 8)

    def forward(self, z, t, r):
        x = self.first(z) + self.times(torch.cat([t[:, None], r[:, None]], dim=1))[:, :, None, None]
        return self.last(F.dropout(F.silu(self.norm(x)), 0.2, self.training))


def loss_and_gradient(net, u, derivative, moving):
    torch.manual_seed(1)
    x, eps = torch.randn(2, 8, 2, 4, 4)
    t = torch.rand(8)
    r = torch.where(torch.arange(8) < moving, t / 2, t)
    net.zero_grad()
    loss = meanflow_loss(u, x, eps, t, r, LossConfig(0.75, 1e-3, "(v, 0, 1)", "dual"), derivative=derivative)
    loss.mean.backward()
    return torch.cat([loss.weighted.detach(), *(p.grad.flatten() for p in net.parameters())])


@pytest.mark.parametrize(("bf16", "moving"), [(False, 6), (True, 6), (False, 0)])
def test_dual_numbers_compile_and_give_the_same(graphs, bf16, moving):
    net = Network()

    def u(z, t, r, **cond):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            return net(z, t, r, **cond)

    compiled = compiled_derivative(net, "dual", "default")
    for _ in range(2):
        eager, traced = (loss_and_gradient(net, u, d, moving) for d in (value_and_tangent, compiled))
        assert (eager - traced).norm() <= 1e-5 * eager.norm()
        with torch.no_grad():  # the graph holds the parameters themselves
            for p in net.parameters():
                p.mul_(1.1)
    assert len(graphs) == 1


def test_a_varying_number_of_moving_rows_needs_few_graphs(graphs, monkeypatch):
    monkeypatch.setattr("meanflow.training.compiled.PARTS", 2)
    net = Network().eval()
    compiled = compiled_derivative(net, "dual", "default")
    for moving in (1, 3, 4, 5):
        eager, traced = (loss_and_gradient(net, net, d, moving) for d in (value_and_tangent, compiled))
        assert (eager - traced).norm() <= 1e-5 * eager.norm()
    assert len(graphs) == 2


def test_a_compiled_run_is_the_eager_one(graphs, train_tiny):
    config = {"model__width": 4, "model__dropout": 0.1, "train__steps": 3}
    runs = [
        train_tiny(name, train__compile="default" if name == "compiled" else None, **config)
        for name in ("eager", "compiled")
    ]
    assert comparable_metrics(runs[0].path) == comparable_metrics(runs[1].path)
    assert len(graphs) == 1


@pytest.mark.parametrize("jvp", ["dual", "func"])
def test_the_mode_of_the_recipe_is_torch_compiles(jvp, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "compile", lambda function, **how: asked.append(how["mode"]) or function)
    net = Network().eval()
    loss_and_gradient(net, net, compiled_derivative(net, jvp, "reduce-overhead"), 3)
    assert asked == ["reduce-overhead"]
