"""The MeanFlow objective against closed forms and against its specification, Algorithm 1 as printed."""

from dataclasses import replace

import pytest
import torch
from gaussian import example
from method_helpers import UNET, assert_close, backbones, batch, loss_of, precisions, selected, small, with_gradient

from meanflow import meanflow_loss
from meanflow.jvp import METHODS, rows_first, take_jvp
from meanflow.objectives.base import interpolate
from meanflow.objectives.meanflow import TANGENTS, MeanFlow

SQUARED_L2 = MeanFlow(p=0.0, c=1e-3)
methods = pytest.mark.parametrize("method", METHODS)


@methods
@precisions
@backbones
def test_equals_plain_algorithm_1(config, dtype, tolerance, method):
    net, b = small(config, dtype), batch(config, dtype)
    expected = with_gradient(net, loss_of(net, b, plain=True))
    assert_close(with_gradient(net, loss_of(net, b, jvp=take_jvp(method))), expected, tolerance)


def test_each_tangent_of_table_1b():
    """Both, and the specification itself, against central differences along the tangent as its name spells it."""
    net, b, h = small(), batch(), 1e-5
    z, v, values = interpolate(b.x, b.eps, b.t), b.eps - b.x, set()
    for tangent in TANGENTS:
        dr, dt = (float(part) for part in tangent.strip("()").split(",")[1:])
        with torch.no_grad():
            ahead, behind = (net(z + s * v, b.r + s * dr, b.t + s * dt, **b.cond) for s in (h, -h))
            target = v - (b.t - b.r)[:, None, None, None] * (ahead - behind) / (2 * h)
            error = (net(z, b.r, b.t, **b.cond) - target).square().sum((1, 2, 3))
        expected = error / (error + 1e-3) ** 0.5
        objective = MeanFlow(p=0.5, c=1e-3, tangent=tangent)
        for how in ({"plain": True}, *({"jvp": take_jvp(method)} for method in METHODS)):
            assert torch.allclose(loss_of(net, b, objective, **how), expected, rtol=1e-6)
        values.add(expected.mean().item())
    assert len(values) == 4


def gaussian_points():
    """Data, x, ε, r and t (every fourth r = t), and the marginal velocity at z_t."""
    data, g = example(), torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(64, generator=g, dtype=torch.float64) * 0.98 + 0.02
    r = t * torch.rand(64, generator=g, dtype=torch.float64)
    r[::4] = t[::4]
    return data, x, eps, r, t, data.velocity(interpolate(x, eps, t), t)


def test_target_of_gaussian_data_is_the_true_average_velocity():
    """With the marginal velocity in place of the conditional one, u is a fixed point: the error vanishes."""
    data, x, eps, r, t, v = gaussian_points()
    u, func = data.average_velocity, take_jvp("func")
    assert SQUARED_L2.loss(u, x, eps, r, t, v=v, jvp=func).per_sample.max() < 1e-18
    assert SQUARED_L2.plain(u, x, eps, r, t, v=v).max() < 1e-18
    wrong = MeanFlow(p=0.0, tangent="(v, 0, 0)").loss(u, x, eps, r, t, v=v, jvp=func)
    error, (error_r_eq_t, r_eq_t), (error_r_lt_t, r_lt_t) = wrong.logged.values()
    assert torch.equal(r_eq_t, r == t) and torch.equal(r_lt_t, r < t) and torch.equal(error, wrong.per_sample)
    assert error_r_eq_t[r_eq_t].max() < 1e-18
    assert error_r_lt_t[r_lt_t].median() > 1e-3


def test_gradient_vanishes_on_average_at_the_true_field():
    """With the conditional velocity the loss is noisy, but the true field is its stationary point: at r = t the mean
    of u − u_tgt over ε, x given z is zero, so a constant added to u has no mean effect on the loss."""
    data, g = example(), torch.Generator().manual_seed(0)
    n = 200_000
    eps = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = data.mean + data.std * torch.randn(n, 3, generator=g, dtype=torch.float64)
    t = torch.full((n,), 0.6, dtype=torch.float64)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)

    def u(z, r, t):
        return data.average_velocity(z, r, t) + shift

    for r in (t, t * 0.3):
        loss = SQUARED_L2.loss(u, x, eps, r, t, jvp=take_jvp("func")).mean
        (gradient,) = torch.autograd.grad(loss, shift)
        assert gradient.abs().max() < 0.03  # ±3 standard errors of the mean are about 0.02


@methods
@backbones
def test_r_equal_t_is_flow_matching_to_the_last_bit(config, method):
    net, b = small(config, torch.float32), batch(config, torch.float32, r_eq_t=8)
    v = net(interpolate(b.x, b.eps, b.t), b.t, b.t, **b.cond)
    expected = with_gradient(net, (v - (b.eps - b.x)).square().flatten(1).sum(1))
    found = with_gradient(net, loss_of(net, b, SQUARED_L2, jvp=take_jvp(method)))
    assert all(map(torch.equal, found, expected))


def test_flow_matching_takes_no_derivative():
    calls, b = [], batch(r_eq_t=8)
    MeanFlow().loss(lambda z, r, t: calls.append(type(z)) or 0 * z, b.x, b.eps, b.r, b.t)
    assert calls == [torch.Tensor]


@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0, 2.0])
def test_adaptive_weight_is_a_constant_factor(p):
    """Eq. (22): value w·‖Δ‖², gradient w·∇‖Δ‖², with ‖Δ‖² summed over C, H, W."""
    b = batch(r_eq_t=8)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = MeanFlow(p=p).loss(lambda z, r, t: scale * z, b.x, b.eps, b.r, b.t)
    z = interpolate(b.x, b.eps, b.t)
    delta = scale.detach() * z - (b.eps - b.x)
    error = torch.tensor([(d**2).sum().item() for d in delta], dtype=torch.float64)
    weight = 1 / (error + 1e-2) ** p
    assert torch.allclose(loss.logged["error"], error)
    assert torch.allclose(loss.per_sample, weight * error)
    (gradient,) = torch.autograd.grad(loss.mean, scale)
    assert gradient.item() == pytest.approx((weight * (2 * delta * z).flatten(1).sum(1)).mean().item(), rel=1e-12)


def test_the_target_has_no_gradient_and_the_tangent_no_graph():
    """The dual pass saves for backward what a Flow Matching pass saves: nothing of the tangent."""

    def saved(r_eq_t, method="dual"):
        net, b, sizes = small(), batch(r_eq_t=r_eq_t), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            out = MeanFlow().loss(net, b.x, b.eps, b.r, b.t, jvp=take_jvp(method), **b.cond)
        assert out.per_sample.requires_grad and not out.logged["error"].requires_grad
        return sum(sizes)

    assert saved(3) <= 1.25 * saved(8)
    assert saved(3, "func") > 1.5 * saved(8)


def test_works_in_any_shape():
    x, eps = torch.randn(5, 2), torch.randn(5, 2)
    t, r = torch.full((5,), 0.5), torch.zeros(5)
    loss = SQUARED_L2.loss(lambda z, r, t: z * t[:, None], x, eps, r, t, jvp=take_jvp("func"))
    z, v = 0.5 * (x + eps), eps - x
    target = v - 0.5 * (0.5 * v + z)  # d/dt (z t) = v t + z
    assert torch.allclose(loss.per_sample, (0.5 * z - target).square().sum(1))


@methods
def test_the_loss_for_any_network(method):
    """`meanflow_loss` draws times and noise from the generator, and takes the mean."""
    net, b = small(), batch()
    found = meanflow_loss(net, b.x, generator=torch.Generator().manual_seed(3), method=method, **b.cond)
    g = torch.Generator().manual_seed(3)
    r, t = MeanFlow().sample_times(8, g)
    eps = torch.randn(b.x.shape, generator=g, dtype=torch.float64)
    expected = MeanFlow().plain(net, b.x, eps, r, t, **b.cond).mean()
    assert (r != t).sum() == 2 and found.item() == pytest.approx(expected.item(), rel=1e-10)


# --- value_and_jvp, which the objective leaves the cost of the derivative to ------------------------------------------


@methods
@pytest.mark.parametrize("r_eq_t", [0, 3, 8])
@pytest.mark.parametrize("arrangement", ["as it comes", "r ≠ t first", "r = t first"])
def test_order_of_samples_does_not_matter(r_eq_t, arrangement, method):
    net, b = small(), batch(r_eq_t=r_eq_t)
    order = torch.arange(8)
    if arrangement != "as it comes":
        order = torch.argsort((b.r == b.t).int(), descending=arrangement.startswith("r = t"))
    assert torch.allclose(
        loss_of(net, selected(b, order), jvp=take_jvp(method)), loss_of(net, b, plain=True)[order], rtol=1e-12
    )


def test_labels_that_are_none_reach_the_network_as_none():
    net, b = small(), batch()
    tangents, rows = (b.eps, 0.0, 1.0), b.r != b.t
    for method in METHODS:
        jvp = take_jvp(method)
        given = jvp(net, (b.x, b.r, b.t), tangents, rows=rows, class_labels=None, augment_labels=None)
        assert all(map(torch.equal, given, jvp(net, (b.x, b.r, b.t), tangents, rows=rows)))


def test_rows_first():
    order, n = rows_first(torch.tensor([False, True, False, True]))
    assert (order.tolist(), n) == ([1, 3, 0, 2], 2)
    assert rows_first(torch.tensor([True, True, False])) == (None, 2)
    assert rows_first(torch.zeros(3, dtype=torch.bool)) == (None, 0)


def test_bf16_autocast_is_near_float32_and_the_target_stays_float32():
    net, b = small(UNET, torch.float32), batch(UNET, torch.float32, n=64, r_eq_t=16)

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(*args, **kwargs)

    exact, rough = (with_gradient(net, loss_of(u, b)) for u in (net, autocast))
    assert rough[0].dtype == torch.float32
    assert_close(rough, exact, 3e-2)
    assert not torch.equal(rough[0], exact[0])


@pytest.mark.gpu
@pytest.mark.parametrize("times_on", ["cpu", "cuda"])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@methods
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(method, memory_format, times_on):
    """The CUDA kernels take other memory layouts than the CPU's; r and t stay on the CPU in training."""
    net, b = small(), batch()
    here = with_gradient(net, loss_of(net, b))
    net = net.to(device="cuda", memory_format=memory_format)
    x, eps = (y.cuda().contiguous(memory_format=memory_format) for y in (b.x, b.eps))
    cond = {key: y.cuda() for key, y in b.cond.items()}
    b = replace(b, x=x, eps=eps, r=b.r.to(times_on), t=b.t.to(times_on), cond=cond)
    there = with_gradient(net, loss_of(net, b, jvp=take_jvp(method)))
    assert_close([y.cpu() for y in there], here, 1e-9)
