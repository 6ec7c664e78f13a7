"""The objective against closed forms and against Algorithm 1 written down plainly."""

import pytest
import torch
from gaussian import example

from meanflow.jvp import JVPS
from meanflow.objectives.meanflow import TANGENTS, LossConfig, interval_first, meanflow_loss
from unet import UNet, UNetConfig

SQUARED_L2 = LossConfig(p=0.0, c=1e-3, tangent="(v, 0, 1)", jvp="func")


def small_unet(dtype, dropout=0.0) -> UNet:
    """A real U-net with attention and resampling whose output layers are far from zero."""
    torch.manual_seed(0)
    net = UNet(UNetConfig("unet", 8, 3, 8, (1, 2), 1, (4,), dropout, "t,t-r", 6, 0)).to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return net


def batch(dtype, n=8, still=3):
    g = torch.Generator().manual_seed(1)
    x, eps = (torch.randn(n, 3, 8, 8, generator=g, dtype=dtype) for _ in range(2))
    pair = torch.rand(n, 2, generator=g, dtype=dtype).sort(1).values
    r, t = pair[:, 0].clone(), pair[:, 1].clone()
    r[torch.randperm(n, generator=g)[:still]] = float("nan")
    r = torch.where(r.isnan(), t, r)
    return x, eps, t, r, torch.randn(n, 6, generator=g, dtype=dtype)


def algorithm_1(net, x, eps, t, r, labels, p, c, tangent=(0.0, 1.0)):
    """Algorithm 1 with Eq. (22), no shortcuts: one full-batch torch.func.jvp in the paper's order (z, r, t)."""
    b = (-1, 1, 1, 1)
    z = (1 - t.view(b)) * x + t.view(b) * eps
    v = eps - x
    tangents = (v, torch.full_like(r, tangent[0]), torch.full_like(t, tangent[1]))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, dudt = torch.func.jvp(lambda z, r, t: net(z, t, r, augment_labels=labels), (z, r, t), tangents)
    u_tgt = v - (t - r).view(b) * dudt
    delta = ((u - u_tgt.detach()) ** 2).sum(dim=(1, 2, 3))
    return (delta / ((delta + c) ** p).detach()).mean()


def loss_and_gradient(net, loss):
    net.zero_grad()
    loss.backward()
    return loss.detach(), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_equals_plain_algorithm_1(jvp, dtype, tolerance):
    net, (x, eps, t, r, labels) = small_unet(dtype), batch(dtype)
    plain = loss_and_gradient(net, algorithm_1(net, x, eps, t, r, labels, p=0.75, c=1e-3))
    config = LossConfig(0.75, 1e-3, "(v, 0, 1)", jvp)
    ours = loss_and_gradient(net, meanflow_loss(net, x, eps, t, r, config, augment_labels=labels).mean)
    for a, b in zip(ours, plain, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("tangent", TANGENTS)
def test_each_tangent_of_table_1b(tangent):
    net, (x, eps, t, r, labels) = small_unet(torch.float64), batch(torch.float64)
    written = {"v": None, "0": 0.0, "1": 1.0}
    dr, dt = (written[part.strip()] for part in tangent.strip("()").split(",")[1:])
    expected = algorithm_1(net, x, eps, t, r, labels, 0.5, 1e-3, tangent=(dr, dt))
    losses = [
        meanflow_loss(net, x, eps, t, r, LossConfig(0.5, 1e-3, tangent, jvp), augment_labels=labels).mean
        for jvp in JVPS
    ]
    assert losses[0].item() == pytest.approx(expected.item(), rel=1e-10)
    assert losses[1].item() == pytest.approx(expected.item(), rel=1e-10)


def test_tangents_differ():
    net, (x, eps, t, r, labels) = small_unet(torch.float64), batch(torch.float64)
    values = {
        meanflow_loss(net, x, eps, t, r, LossConfig(0.5, 1e-3, name, "dual"), augment_labels=labels).mean.item()
        for name in TANGENTS
    }
    assert len(values) == 4


def test_target_of_gaussian_data_is_the_true_average_velocity():
    """With the marginal velocity in place of the conditional one, u is a fixed point: the error vanishes."""
    data, g = example(), torch.Generator().manual_seed(0)
    x, eps = (torch.randn(64, 3, generator=g, dtype=torch.float64) for _ in range(2))
    t = torch.rand(64, generator=g, dtype=torch.float64) * 0.98 + 0.02
    r = t * torch.rand(64, generator=g, dtype=torch.float64)
    r[::4] = t[::4]
    v = data.velocity((1 - t)[:, None] * x + t[:, None] * eps, t)
    right = meanflow_loss(data.average_velocity, x, eps, t, r, SQUARED_L2, v=v)
    assert right.squared_error.max() < 1e-18
    wrong_tangent = LossConfig(0.0, 1e-3, "(v, 0, 0)", "func")
    wrong = meanflow_loss(data.average_velocity, x, eps, t, r, wrong_tangent, v=v).squared_error
    assert (wrong[t == r] < 1e-18).all()
    assert wrong[t != r].median() > 1e-3


def test_gradient_vanishes_on_average_at_the_true_field():
    """With the conditional velocity the loss is noisy, but the true field is its stationary point: at r = t the mean
    of u − u_tgt over ε, x given z is zero, so a constant added to u has no mean effect on the loss."""
    data, g = example(), torch.Generator().manual_seed(0)
    n = 200_000
    eps = torch.randn(n, 3, generator=g, dtype=torch.float64)
    x = data.mean + data.std * torch.randn(n, 3, generator=g, dtype=torch.float64)
    t = torch.full((n,), 0.6, dtype=torch.float64)
    shift = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    for r in (t, t * 0.3):
        loss = meanflow_loss(lambda z, t, r: data.average_velocity(z, t, r) + shift, x, eps, t, r, SQUARED_L2).mean
        (gradient,) = torch.autograd.grad(loss, shift)
        assert gradient.abs().max() < 0.03  # ±3 standard errors of the mean are about 0.02


@pytest.mark.parametrize("jvp", JVPS)
def test_r_equal_t_is_flow_matching_to_the_last_bit(jvp):
    net, (x, eps, t, _, labels) = small_unet(torch.float32), batch(torch.float32)
    z = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * eps
    flow_matching = (net(z, t, t, augment_labels=labels) - (eps - x)).square().flatten(1).sum(1)
    a = loss_and_gradient(net, flow_matching.mean())
    config = LossConfig(0.0, 1e-3, "(v, 0, 1)", jvp)
    b = loss_and_gradient(net, meanflow_loss(net, x, eps, t, t.clone(), config, augment_labels=labels).mean)
    assert torch.equal(a[0], b[0])
    assert torch.equal(a[1], b[1])


def test_flow_matching_takes_no_derivative():
    calls = []

    def u(z, t, r):
        calls.append(type(z))
        return 0 * z

    x, eps, t, _, _ = batch(torch.float32)
    meanflow_loss(u, x, eps, t, t.clone(), LossConfig(1.0, 1e-3, "(v, 0, 1)", "dual"))
    assert calls == [torch.Tensor]


@pytest.mark.parametrize("jvp", JVPS)
def test_order_of_samples_does_not_matter(jvp):
    net, (x, eps, t, r, labels) = small_unet(torch.float64), batch(torch.float64)
    config = LossConfig(1.0, 1e-3, "(v, 0, 1)", jvp)
    loss = meanflow_loss(net, x, eps, t, r, config, augment_labels=labels)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(3))
    mixed = meanflow_loss(net, x[order], eps[order], t[order], r[order], config, augment_labels=labels[order])
    assert torch.allclose(mixed.squared_error, loss.squared_error[order], rtol=1e-12)
    assert torch.allclose(mixed.weighted, loss.weighted[order], rtol=1e-12)


def test_interval_first():
    t = torch.tensor([0.5, 0.6, 0.7, 0.8])
    r = torch.tensor([0.5, 0.1, 0.7, 0.2])
    order, n = interval_first(t, r)
    assert (order.tolist(), n) == ([1, 3, 0, 2], 2)


@pytest.mark.parametrize("p", [0.0, 0.5, 0.75, 1.0, 2.0])
def test_adaptive_weight_is_a_constant_factor(p):
    """Eq. (22): value w·‖Δ‖², gradient w·∇‖Δ‖², with ‖Δ‖² summed over C, H, W."""
    x, eps, t, _, _ = batch(torch.float64)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)
    loss = meanflow_loss(lambda z, t, r: scale * z, x, eps, t, t.clone(), LossConfig(p, 1e-2, "(v, 0, 1)", "func"))
    z = (1 - t.view(-1, 1, 1, 1)) * x + t.view(-1, 1, 1, 1) * eps
    delta = scale.detach() * z - (eps - x)
    error = torch.tensor([(d**2).sum().item() for d in delta], dtype=torch.float64)
    weight = 1 / (error + 1e-2) ** p
    assert torch.allclose(loss.squared_error, error)
    assert torch.allclose(loss.weighted, weight * error)
    (gradient,) = torch.autograd.grad(loss.mean, scale)
    expected = (weight * (2 * delta * z).flatten(1).sum(1)).mean()
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-12)


def test_the_target_has_no_gradient_and_the_tangent_no_graph():
    """The dual pass saves for backward what a Flow Matching pass saves: nothing of the tangent."""
    net, (x, eps, t, r, labels) = small_unet(torch.float32), batch(torch.float32)

    def saved(r, jvp):
        count = 0

        def pack(tensor):
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = meanflow_loss(net, x, eps, t, r, LossConfig(1.0, 1e-3, "(v, 0, 1)", jvp), augment_labels=labels)
        assert out.weighted.requires_grad
        assert not out.squared_error.requires_grad
        return count

    flow_matching, dual, func = saved(t.clone(), "dual"), saved(r, "dual"), saved(r, "func")
    assert dual <= 1.25 * flow_matching
    assert func > 1.5 * flow_matching


def test_bf16_autocast_is_near_float32_and_the_target_stays_float32():
    net, (x, eps, t, r, labels) = small_unet(torch.float32), batch(torch.float32, n=64, still=16)
    config = LossConfig(0.75, 1e-3, "(v, 0, 1)", "dual")

    def autocast(*args, **kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return net(*args, **kwargs)

    exact = loss_and_gradient(net, meanflow_loss(net, x, eps, t, r, config, augment_labels=labels).mean)
    out = meanflow_loss(autocast, x, eps, t, r, config, augment_labels=labels)
    assert out.squared_error.dtype == torch.float32
    rough = loss_and_gradient(net, out.mean)
    for a, b in zip(rough, exact, strict=True):
        assert 0 < (a - b).norm() <= 3e-2 * b.norm()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("jvp", JVPS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_on_a_gpu_it_is_what_it_is_on_the_cpu(jvp, memory_format):
    """The CUDA kernels take other memory layouts than the CPU's; t and r stay on the CPU, as in training."""
    net, (x, eps, t, r, labels) = small_unet(torch.float64), batch(torch.float64)
    config = LossConfig(0.75, 1e-3, "(v, 0, 1)", jvp)
    here = loss_and_gradient(net, meanflow_loss(net, x, eps, t, r, config, augment_labels=labels).mean)
    net = net.to(device="cuda", memory_format=memory_format)
    x, eps = (y.cuda().contiguous(memory_format=memory_format) for y in (x, eps))
    there = loss_and_gradient(net, meanflow_loss(net, x, eps, t, r, config, augment_labels=labels.cuda()).mean)
    for a, b in zip(there, here, strict=True):
        assert (a.cpu() - b).norm() <= 1e-9 * b.norm()


def test_works_in_any_shape():
    x, eps = torch.randn(5, 2), torch.randn(5, 2)
    t, r = torch.full((5,), 0.5), torch.zeros(5)
    loss = meanflow_loss(lambda z, t, r: z * t[:, None], x, eps, t, r, LossConfig(0.0, 1e-3, "(v, 0, 1)", "func"))
    z, v = 0.5 * (x + eps), eps - x
    target = v - 0.5 * (0.5 * v + z)  # d/dt (z t) = v t + z
    assert torch.allclose(loss.squared_error, (0.5 * z - target).square().sum(1))


@pytest.mark.parametrize(("field", "value"), [("p", -0.1), ("c", 0.0), ("tangent", "(v, 0, 2)"), ("jvp", "forward")])
def test_bad_settings_name_themselves(field, value):
    settings = {"p": 1.0, "c": 1e-3, "tangent": "(v, 0, 1)", "jvp": "dual"}
    with pytest.raises(ValueError, match=field):
        LossConfig(**{**settings, field: value})
