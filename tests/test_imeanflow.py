"""The iMF objective against closed forms, against MeanFlow and against its specification, the paper's algorithm."""

import functools
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from guided_helpers import guided_batch, two_heads
from method_helpers import (
    DIT,
    assert_close,
    backbones,
    batch,
    loss_of,
    perturbed,
    precisions,
    selected,
    small,
    with_gradient,
)

from dit import IMF, IMFConfig
from meanflow.dual import value_of
from meanflow.jvp import METHODS, take_jvp, value_and_jvp
from meanflow.objectives.base import interpolate, squared_norm
from meanflow.objectives.imeanflow import BOUNDARY, IMeanFlow
from meanflow.objectives.meanflow import MeanFlow, meanflow_loss

UNGUIDED = IMeanFlow(omega_max=1.0, velocity=BOUNDARY)
OBJECTIVES = {
    "v_head": IMeanFlow(label_drop=0.3),
    "boundary": IMeanFlow(velocity=BOUNDARY, omega_beta=0.0, p=0.5),
    "v_head without guidance": IMeanFlow(omega_max=1.0),
    "boundary without guidance": UNGUIDED,
}
methods = pytest.mark.parametrize("method", METHODS)


@methods
@precisions
@pytest.mark.parametrize("name", OBJECTIVES)
def test_equals_the_plain_algorithm(name, dtype, tolerance, method):
    objective, net = OBJECTIVES[name], two_heads(dtype)
    b = guided_batch(objective, dtype)
    expected = with_gradient(net, loss_of(net, b, objective, plain=True))
    assert_close(with_gradient(net, loss_of(net, b, objective, jvp=take_jvp(method))), expected, tolerance)


@methods
@precisions
def test_the_network_of_the_paper_does_too(dtype, tolerance, method):
    """As training calls it: the branch for v takes no tangents."""
    torch.manual_seed(0)
    config = IMFConfig("imf", 8, 3, 2, width=32, depth=3, heads=4, head_depth=2, classes=10)
    net, objective = perturbed(IMF(config).to(dtype)), IMeanFlow(label_drop=0.3)
    b = guided_batch(objective, dtype)
    u = functools.partial(net, primal=value_of)
    expected = with_gradient(net, loss_of(net, b, objective, plain=True))
    assert_close(with_gradient(net, loss_of(u, b, objective, jvp=take_jvp(method))), expected, tolerance)


@methods
@precisions
@backbones
def test_the_reduced_form_is_meanflow_along_the_networks_own_velocity(config, dtype, tolerance, method):
    """Both backbones, without guidance: MeanFlow's residual and gradient with the tangent u(z, t, t) in place of v."""
    net, b = small(config, dtype), batch(config, dtype)
    with torch.no_grad():
        v_hat = net(interpolate(b.x, b.eps, b.t), b.t, b.t, **b.cond)

    def along(u, primals, tangents, **how):
        return value_and_jvp(u, primals, (v_hat, *tangents[1:]), **how)

    expected = with_gradient(net, loss_of(net, b, MeanFlow(), jvp=along))
    assert_close(with_gradient(net, loss_of(net, b, UNGUIDED, jvp=take_jvp(method))), expected, tolerance)
    assert_close(with_gradient(net, loss_of(net, b, UNGUIDED, plain=True)), expected, tolerance)


def test_omega_1_is_no_guidance():
    """The scale 1 gives the loss of the same network trained without guidance, whatever the unconditional velocity."""
    objective, net = IMeanFlow(p=0.0), two_heads()
    b = guided_batch(objective)
    ones = torch.ones(len(b.t), dtype=torch.float64)
    inputs = {"omega": ones, "t_min": 0 * ones, "t_max": ones, "unconditional": ones < 0}
    found = loss_of(net, replace(b, cond=b.cond | inputs), objective)
    plain = {key: b.cond[key] for key in ("class_labels",)} | {key: inputs[key] for key in ("omega", "t_min", "t_max")}
    assert torch.allclose(found, loss_of(net, replace(b, cond=plain), IMeanFlow(p=0.0, omega_max=1.0)), rtol=1e-12)
    assert not torch.allclose(found, loss_of(net, b, objective), rtol=1e-2)


def test_samples_without_a_label_learn_the_unguided_velocity_of_no_class():
    objective, net = IMeanFlow(label_drop=0.6, p=0.0), two_heads()
    b = guided_batch(objective, n=32, r_eq_t=24)
    dropped = b.cond["unconditional"]
    assert 0 < dropped.sum() < 24 and (b.r == b.t)[dropped].all()
    z, cond = interpolate(b.x, b.eps, b.t), {key: b.cond[key].double() for key in ("omega", "t_min", "t_max")}
    null = torch.full((32,), DIT.classes)
    u, v = net(z, b.r, b.t, class_labels=null, head="both", **cond)
    expected = squared_norm(u - (b.eps - b.x)) + squared_norm(v - (b.eps - b.x))
    assert torch.allclose(loss_of(net, b, objective)[dropped], expected[dropped], rtol=1e-10)
    assert not torch.isclose(loss_of(net, b, objective), expected, rtol=1e-3)[~dropped].any()


# --- closed forms ----------------------------------------------------------------------------------------------------


CLASSES = [Gaussian(*torch.tensor([[m], [s]], dtype=torch.float64)) for m, s in ((0.6, 0.3), (-0.4, 0.5))]


class TwoClasses:
    """The true guided functions of two equally likely Gaussian classes in one dimension.

    v(z, t | ω, c) = v_∅ + ω (v_c − v_∅), where v_∅ averages v_c over the classes by their probability given z. u is the
    average over the flow of the guided velocity, integrated by Runge and Kutta's method.
    """

    NULL = 2

    def __init__(self, steps: int = 32):
        self.steps = steps

    def of_class(self, z, t, labels):
        """v_c, or v_∅ where the label is NULL."""
        velocities, densities = [], []
        for data in CLASSES:
            mean, std = data.moments(t)
            velocities.append(data.velocity(z, t))
            densities.append(torch.exp(-(((z - mean) / std) ** 2) / 2) / std)
        v, p = torch.stack(velocities), torch.stack(densities)
        v_null = (v * p).sum(0) / p.sum(0)
        one = (labels == 1)[:, None]
        return torch.where((labels == self.NULL)[:, None], v_null, torch.where(one, v[1], v[0])), v_null

    def velocity(self, z, t, labels, omega, t_min, t_max):
        v_c, v_null = self.of_class(z, t, labels)
        scale = torch.where((t_min <= t) & (t <= t_max), omega, 1.0)[:, None]
        return v_null + scale * (v_c - v_null)

    def __call__(self, z, r, t, class_labels, omega, t_min, t_max, head="u", primal=None):
        cond = (class_labels, omega, t_min, t_max)
        v = self.velocity(z, t, *cond)
        if head == "v":
            return v
        h, x, time = (t - r) / self.steps, z, t
        for _ in range(self.steps):
            half, step = time - h / 2, h[:, None]
            k1 = self.velocity(x, time, *cond)
            k2 = self.velocity(x - step / 2 * k1, half, *cond)
            k3 = self.velocity(x - step / 2 * k2, half, *cond)
            k4 = self.velocity(x - step * k3, time - h, *cond)
            x, time = x - step * (k1 + 2 * k2 + 2 * k3 + k4) / 6, time - h
        interval = (t - r)[:, None]
        u = torch.where(interval == 0, v, (z - x) / torch.where(interval == 0, 1, interval))
        return (u, v) if head == "both" else u


def gaussian_case(n: int):
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 2
    eps, x = (torch.randn(n, 1, generator=g, dtype=torch.float64) for _ in range(2))
    x = torch.stack([data.mean + data.std * x for data in CLASSES])[labels, torch.arange(n)]
    return g, labels, x, eps


@pytest.mark.parametrize("velocity", ["v_head", BOUNDARY])
def test_guided_gaussian_classes_are_a_fixed_point(velocity):
    """With the marginal velocity of each class in place of ε − x every error vanishes at the true guided functions."""
    objective, n, truth = IMeanFlow(velocity=velocity, p=0.0, label_drop=0.2), 64, TwoClasses()
    g, labels, x, eps = gaussian_case(n)
    t = 0.2 + 0.75 * torch.rand(n, generator=g, dtype=torch.float64)
    r = t * torch.rand(n, generator=g, dtype=torch.float64)
    r[::2] = t[::2]
    cond = objective.sample_cond(r, t, TwoClasses.NULL, g)
    cond |= {key: cond[key].double() for key in ("omega", "t_min", "t_max")}
    # The guided velocity jumps at the ends of the interval, which Runge-Kutta steps do not see: [r, t] has none inside.
    inside = (cond["t_min"] <= t) & (t <= cond["t_max"])
    start = torch.where(inside, cond["t_min"], torch.where(t > cond["t_max"], cond["t_max"], 0)) + 1e-6
    r = torch.minimum(torch.maximum(r, start), t)
    z, seen = interpolate(x, eps, t), torch.where(cond["unconditional"], TwoClasses.NULL, labels)
    v = truth.of_class(z, t, seen)[0]
    loss = objective.loss(truth, x, eps, r, t, v=v, jvp=take_jvp("func"), class_labels=labels, **cond)
    assert loss.per_sample.max() < 1e-8
    assert (r < t).sum() >= 25 and (~inside).sum() > 5 and inside[r < t].sum() > 5 and cond["unconditional"].sum() > 5
    wrong = objective.loss(truth, x, eps, r, t, v=v, class_labels=1 - labels, jvp=take_jvp("func"), **cond)
    assert wrong.per_sample.median() > 1e-2


def test_the_gradient_vanishes_on_average_at_the_true_guided_functions():
    n, omega, truth = 100_000, 3.0, TwoClasses(steps=8)
    _, labels, x, eps = gaussian_case(n)
    t = torch.full((n,), 0.6, dtype=torch.float64)
    cond = {"omega": omega + 0 * t, "t_min": 0 * t, "t_max": 1 + 0 * t, "unconditional": t < 0}
    cond |= {"class_labels": labels, "null_labels": torch.full((n,), TwoClasses.NULL)}
    shift = torch.zeros(1, dtype=torch.float64, requires_grad=True)

    def u(*args, head="u", **how):
        out = truth(*args, head=head, **how)
        return tuple(y + shift for y in out) if head == "both" else out + (0 if head == "v" else shift)

    for r in (t, t * 0.4):
        loss = IMeanFlow(p=0.0).loss(u, x, eps, r, t, jvp=take_jvp("func"), **cond).mean
        (gradient,) = torch.autograd.grad(loss, shift)
        assert gradient.abs() < 0.03  # ±3 standard errors


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("beta", "median"), [(1.0, 8**0.5), (0.0, 4.5), (2.0, 1 / (1 - 0.5 * (1 - 1 / 8)))])
def test_scales_and_intervals(beta, median):
    """The density of ω is ∝ ω^−β on [1, 8]: its median is known."""
    n, objective = 40_000, IMeanFlow(omega_beta=beta)
    r, t = objective.sample_times(n, torch.Generator().manual_seed(0))
    drawn = objective.sample_cond(r, t, 10, torch.Generator().manual_seed(1))
    omega, t_min, t_max, r_eq_t = drawn["omega"], drawn["t_min"], drawn["t_max"], r == t
    assert omega.min() >= 1 and omega.max() <= 8 and omega.median().item() == pytest.approx(median, rel=0.02)
    assert (t_min[r_eq_t] == 0).all() and (t_max[r_eq_t] == 1).all() and r_eq_t.float().mean() == 0.5
    low, high = t_min[~r_eq_t], t_max[~r_eq_t]
    assert low.min() >= 0 and low.max() <= 0.5 <= high.min() and high.max() <= 1
    assert low.mean().item() == pytest.approx(0.25, abs=0.01) and high.mean().item() == pytest.approx(0.75, abs=0.01)
    assert drawn["unconditional"].float().mean().item() == pytest.approx(0.1, abs=0.01)
    assert r_eq_t[drawn["unconditional"]].all() and (drawn["null_labels"] == 10).all()


def test_guidance_without_what_is_drawn_for_it_is_refused():
    b = batch(DIT)
    with pytest.raises(ValueError, match=r"needs omega, .*: pass what sample_cond draws, or set omega_max=1"):
        loss_of(two_heads(), b, IMeanFlow())
    assert loss_of(two_heads(), b, IMeanFlow(omega_max=1.0)).isfinite().all()


def test_nothing_is_drawn_without_guidance():
    assert UNGUIDED.sample_cond(torch.zeros(4), torch.ones(4), 10, None) == {}


# --- the derivative of a network with two outputs --------------------------------------------------------------------


@methods
@pytest.mark.parametrize("r_eq_t", [0, 3, 8])
def test_order_of_samples_does_not_matter(r_eq_t, method):
    objective, net = IMeanFlow(), two_heads()
    b, order = guided_batch(objective, r_eq_t=r_eq_t), torch.randperm(8, generator=torch.Generator().manual_seed(3))
    jvp = take_jvp(method)
    assert torch.allclose(
        loss_of(net, selected(b, order), objective, jvp=jvp), loss_of(net, b, objective, jvp=jvp)[order], rtol=1e-12
    )


def test_the_tangent_stays_out_of_the_v_head():
    net, b = two_heads(), guided_batch(IMeanFlow())
    seen = []
    net.v.register_forward_hook(lambda module, args, out: seen.append(type(out)))
    loss_of(functools.partial(net, primal=value_of), b, IMeanFlow())
    assert seen == [torch.Tensor, torch.Tensor]  # without gradient, and beside u


def test_settings_out_of_range():
    for settings, message in [
        ({"p": -1.0}, "p must be ≥ 0"),
        ({"c": 0.0}, "c must be > 0"),
        ({"velocity": "head"}, "velocity must be v_head or boundary, got 'head'"),
        ({"omega_max": 0.5}, "omega_max must be ≥ 1, got 0.5"),
        ({"omega_beta": -1.0}, r"omega_beta must be in \[0, 10\]"),
        ({"t_split": 1.5}, r"t_split must be in \[0, 1\]"),
        ({"label_drop": 1.0}, r"label_drop must be in \[0, 1\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            IMeanFlow(**settings)
    with pytest.raises(ValueError, match="guidance as an input needs classes"):
        meanflow_loss(lambda z, r, t, **cond: z, torch.ones(2, 2), IMeanFlow())
