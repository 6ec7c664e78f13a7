"""Each tangent rule against torch.func.jvp and finite differences in float64, and what must not happen silently."""

import functools
import operator
import re

import pytest
import torch
import torch.nn.functional as F
from running import ROOT
from torch import nn

from meanflow.dual import RULES, Dual, NoTangentRule, shapes, tangents_in, value_of
from meanflow.dual.number import Rule, linear
from meanflow.errors import UserError
from meanflow.jvp import plain_operations, value_and_jvp

B, N = 5, 3  # batch, and the rows that have a tangent


def g(*shape, seed=0):
    return drawn(shape, seed).clone()


@functools.cache  # older versions of torch.export read no generators
def drawn(shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W3, W1, WL = g(6, 4, 3, 3, seed=11), g(4, 4, 4, 4, seed=12), g(7, 4, seed=13)
BATCH_NORM = nn.BatchNorm2d(4).double().eval()
GAIN4, BIAS4, ROW, MAP = g(4, seed=14), g(4, seed=15), g(B, 4, 6, 6, seed=16), g(B, 6, seed=17)


def row(x):
    """A constant that differs from sample to sample."""
    return ROW[: x.shape[0]]


def positive(x):
    return x.square() + 0.5


def columns(x):
    return x.flatten(2)  # (B, 4, 36)


def volume(x):
    return x.unsqueeze(2).repeat(1, 1, 2, 1, 1)  # (B, 4, 2, 6, 6)


ACTIVATIONS = (
    *("relu", "relu6", "leaky_relu", "elu", "selu", "celu", "softplus", "softsign", "mish", "hardswish", "hardsigmoid"),
    *("hardtanh", "logsigmoid", "silu", "gelu", "glu"),
)
FUNCTIONS = ("neg", "abs", "square", "exp", "expm1", "sin", "cos", "erf", "tanh", "sigmoid")


def after(prepare, function):
    return lambda x: function(prepare(x))


# name: function of one tensor (B, 4, 6, 6)
CASES = {
    **{name: after(lambda x: 3 * x, getattr(F, name)) for name in ACTIVATIONS},
    **{name: after(lambda x: x, getattr(torch, name)) for name in FUNCTIONS},
    **{name: after(positive, getattr(torch, name)) for name in ("sqrt", "rsqrt", "reciprocal", "log", "log1p")},
    "leaky_relu, slope": lambda x: F.leaky_relu(x, 0.3) + F.elu(x, 2.0) + F.celu(x, 0.5) + F.softplus(x, 2, 1),
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "prelu": lambda x: torch.prelu(x, GAIN4) + nn.functional.prelu(columns(x), GAIN4[:1]).unflatten(2, (6, 6)),
    "clamp": lambda x: x.clamp(-0.5, 0.7) + torch.clip(x, min=-0.2) + x.clamp_min(0) + x.clamp_max(row(x)),
    "softmax": lambda x: F.softmax(x, dim=1) + torch.softmax(x, -1) + x.softmax(dim=2),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    # arithmetic
    "add": lambda x: 3 + x + row(x) + x + BIAS4[:, None, None],
    "add, broadcast": lambda x: x[:, :, :1] + row(x),
    "sub": lambda x: 1 - (x - row(x)) - 2 * (F.silu(x) - x),
    "rsub of a tensor": lambda x: row(x) - x,
    "rsub, alpha": lambda x: torch.rsub(x, 1) + torch.add(x, x, alpha=2) + torch.subtract(x, row(x), alpha=3),
    "mul": lambda x: x * x * row(x) * BIAS4[:, None, None] * 0.5 * torch.multiply(x, 2),
    "neg, div": lambda x: -x / 3 + x / (1 + row(x) ** 2) + abs(x),
    "div by a Dual": lambda x: (
        1 / positive(x) + row(x) / positive(x) + x / positive(x[:, :1]) + torch.divide(torch.true_divide(x, 2), 2)
    ),
    "pow": lambda x: x**2 + x**3 + x**0 + positive(x) ** -0.5 + torch.pow(x, torch.arange(6.0)),
    "pow of a constant": lambda x: 2**x + row(x).clamp_min(0) ** positive(x),
    "where": lambda x: (
        torch.where(x > row(x), x, x.square()) + torch.where(row(x) > 0, 0.0, x) + x.masked_fill(x > 1, 3)
    ),
    "maximum": lambda x: (
        torch.maximum(x, row(x)) + torch.minimum(x.square(), x) + torch.max(x, -x) + torch.min(row(x), x)
    ),
    "lerp": lambda x: torch.lerp(x, row(x), 0.3) + torch.lerp(row(x), x.square(), x) + x.addcmul(x, row(x), value=0.5),
    "modulate": lambda x: x * (1 + columns(x)[:, :, :1, None]) + x[:, :, :1],
    "to": lambda x: x.to(torch.float64).to(row(x)).double().type_as(x) * row(x).type_as(x),
    "constant": lambda x: x * (x > 0) * x.detach() * torch.zeros_like(x).add(2) + x * x.sign() * x.argmax(1, True),
    # shapes
    "shapes": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], 9, 2, 8).unbind(2)[1].contiguous(),
    "view": lambda x: x.clone().view(-1, 4, 36).view_as(columns(row(x))).reshape_as(row(x)),
    "expand": lambda x: x[:, :1].expand(-1, 4, 6, 6) + x[:, 1:2].expand_as(row(x)) + x[:, 2:3].broadcast_to(x.shape),
    "chunk": lambda x: x.chunk(2, dim=1)[0] * x.split(2, dim=1)[1] + torch.split(x, [1, 3], 1)[0],
    "unsqueeze, unflatten": lambda x: x.unsqueeze(1).unflatten(3, (2, 3)).squeeze(1),
    "cat with a constant": lambda x: torch.cat([row(x), x], dim=-1),
    "concat, stack": lambda x: torch.stack([torch.concat([x, x], 1), torch.concatenate([x, row(x)], dim=1)], dim=2),
    "swap": lambda x: x.swapaxes(1, 2).swapdims(1, 2).movedim(1, 3).moveaxis((1, 2), (2, 1)).transpose(-1, 1).mT,
    "flip, roll": lambda x: x.flip(1).flip(2, 3) + x.roll(1, 2) + torch.roll(x, (1, 2), (2, 3)),
    "select": lambda x: x.narrow(2, 1, 3).select(3, 0) + x.index_select(2, torch.arange(3))[..., 0],
    "repeat": lambda x: x.repeat(1, 2, 1, 1) + x.repeat_interleave(2, dim=1),
    "gather": lambda x: x.gather(1, (row(x) > 0).long()) + x.tril() + x.triu(1),
    "getitem": lambda x: (
        x[..., ::2] + x[:, None, 1:2, [0, 2, 1, 0, 3, 5], 1:4][:, 0] + x[:, 0, :, None, :3][..., 0, :][:, None]
    ),
    # layers
    "linear": lambda x: F.linear(columns(x).mT, WL, g(7)) + F.linear(input=columns(x).mT, weight=WL),
    "conv2d": lambda x: F.conv2d(x, W3, BIAS4.repeat(2)[:6], padding=1),
    "conv2d strided, grouped": lambda x: F.conv2d(x, W1[:, :1], None, stride=2, padding=1, groups=4),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, W1[:, :1], None, stride=2, padding=1, groups=4),
    "conv1d": lambda x: F.conv1d(columns(x), W1[0], BIAS4) + F.conv_transpose1d(columns(x), W1[0])[..., 3:-3],
    "conv3d": lambda x: F.conv3d(volume(x), W1[..., None], padding=2),
    "conv_transpose3d": lambda x: F.conv_transpose3d(volume(x), W1[..., None], stride=2, groups=2),
    "matmul": lambda x: x @ row(x) + row(x) @ x + x @ x.mT + x @ g(6, 6) + g(6, 6) @ x + g(4, 6, 6).matmul(x),
    "matmul of vectors": lambda x: x @ MAP[0] + (MAP[0] @ x) + torch.mm(x[:, 0, 0], g(6, 6))[:, None],
    "bmm": lambda x: torch.bmm(columns(x), columns(row(x)).mT) + torch.bmm(columns(x), columns(x).mT),
    "einsum": lambda x: torch.einsum("bchw,bdhw->bcd", x, x) + torch.einsum("bchw,dc->bd", x, WL[:4])[:, None],
    "einsum, constants": lambda x: (
        torch.einsum("b...h, bhk, ...h -> b...k", x, x[:, 0], MAP[0])
        + torch.einsum("chwb,bchw->bchw", row(x).permute(1, 2, 3, 0), x)
    ),
    "einsum, ellipsis": lambda x: (
        torch.einsum("...ij,...kj->...ik", x, g(4, 6, 6)) + torch.einsum("...,...->...", x, row(x))
    ),
    "avg_pool": lambda x: F.avg_pool2d(x, 2) + F.adaptive_avg_pool2d(x, 3) + F.avg_pool3d(volume(x), 2)[:, :, 0],
    "avg_pool1d": lambda x: F.avg_pool1d(columns(x), 4) + F.adaptive_avg_pool1d(columns(x), 9),
    "adaptive_avg_pool3d": lambda x: F.adaptive_avg_pool3d(volume(x), (1, 3, 2)),
    "max_pool": lambda x: F.max_pool2d(x, 2) + F.adaptive_max_pool2d(x, 3) + F.max_pool3d(volume(x), 2)[:, :, 0],
    "max_pool1d": lambda x: F.max_pool1d(columns(x), 4) + F.adaptive_max_pool1d(columns(x), 9),
    "max_pool, indices": lambda x: (
        F.max_pool2d(x, 2, 2, return_indices=True)[0] + F.adaptive_max_pool3d(volume(x), 3)[:, :, 0]
    ),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, 12, mode="bilinear", antialias=True),
    "interpolate, bicubic, area": lambda x: F.interpolate(x, 4, mode="bicubic") + F.interpolate(x, 4, mode="area"),
    "pixel_shuffle": lambda x: F.channel_shuffle(F.pixel_unshuffle(F.pixel_shuffle(x, 2), 4), 2),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0)[..., :6] + F.pad(x, (1, 2, 0, 1), mode="reflect")[..., 1:, 3:],
    "attention": lambda x: F.scaled_dot_product_attention(x, F.silu(x), torch.sin(x)),
    "attention, scale": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
    "attention, causal": lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True),
    "attention, mask": lambda x: (
        F.scaled_dot_product_attention(x, x, x, row(x) > 0) + F.scaled_dot_product_attention(x, x, x, g(6, 6))
    ),
    "attention to a constant": lambda x: (
        F.scaled_dot_product_attention(x, row(x), row(x).sin()) + F.scaled_dot_product_attention(row(x), row(x), x)
    ),
    # reductions and normalisation
    "sum": lambda x: (
        x.sum((2, 3)) + x.mean([2, 3]) + torch.sum(x, dim=(1, 2))[:, :4] + x.mean(-1, keepdim=True)[:, :, 0, 0]
    ),
    "cumsum": lambda x: x.cumsum(1),
    "max": lambda x: x.max(1)[0] + x.max(dim=2).values[:, :1] + x.min(dim=1, keepdim=True).values[:, 0],
    "amax": lambda x: x.amax((2, 3), keepdim=True) + torch.amin(x, dim=1, keepdim=True) + x.logsumexp((1, 2), True),
    "var_mean": lambda x: (
        sum(torch.var_mean(x, 1, correction=0, keepdim=True)) + torch.var_mean(x, dim=2)[0][:, :1, None]
    ),
    "var": lambda x: (
        x.var((2, 3)) + x.var(1, False)[:, :4, 0] + x.std(2, unbiased=False)[..., 0] + x.std(1, correction=2)[:, :4, 0]
    ),
    "norm": lambda x: (
        x.norm(dim=1) + torch.linalg.vector_norm(x, dim=(1, 2))[:, None] + torch.linalg.norm(x, dim=2)[:, :1]
    ),
    "normalize": lambda x: F.normalize(x, dim=1),
    "group_norm": lambda x: F.group_norm(x, 2, GAIN4, BIAS4, 1e-6),
    "group_norm, plain": lambda x: F.group_norm(x, 1),
    "group_norm, 3-D": lambda x: F.group_norm(columns(x), 4, GAIN4, BIAS4),
    "layer_norm": lambda x: F.layer_norm(x, (6,), g(6), g(6, seed=1), 1e-6),
    "layer_norm, plain": lambda x: F.layer_norm(x, (6, 6)),
    "rms_norm": lambda x: F.rms_norm(x, (6, 6)) + F.rms_norm(x, (6,), g(6), 1e-3),
    "instance_norm": lambda x: F.instance_norm(x, weight=GAIN4, bias=BIAS4) + nn.InstanceNorm2d(4)(x),
    "instance_norm, running": lambda x: F.instance_norm(x, GAIN4, positive(BIAS4), GAIN4, BIAS4, use_input_stats=False),
    "batch_norm": lambda x: F.batch_norm(x, BIAS4, positive(GAIN4), GAIN4, BIAS4) + BATCH_NORM(x),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    function, x, dx = CASES[name], g(B, 4, 6, 6, seed=2), g(N, 4, 6, 6, seed=3)
    ours = function(Dual(x, dx))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, tangent = torch.func.jvp(function, (x[:N],), (dx,))
    difference = (function(x[:N] + 1e-6 * dx) - function(x[:N] - 1e-6 * dx)) / 2e-6
    assert torch.allclose(ours.value, function(x), rtol=1e-12, atol=1e-12)
    assert torch.allclose(ours.tangent, tangent, rtol=1e-10, atol=1e-12)
    assert torch.allclose(ours.tangent, difference, rtol=1e-6, atol=1e-6) or name == "constant"
    assert function(Dual(x, dx[:0])).tangent.shape == (0, *ours.shape[1:])


@pytest.mark.parametrize("name", CASES)
def test_value_keeps_its_graph_and_tangent_has_none(name):
    x = g(B, 4, 6, 6, seed=2).requires_grad_()
    ours = CASES[name](Dual(x, g(N, 4, 6, 6)))
    expected = CASES[name](x)
    probe = torch.randn_like(expected)
    (a,) = torch.autograd.grad((ours.value * probe).sum(), x)
    (b,) = torch.autograd.grad((expected * probe).sum(), x)
    assert torch.allclose(a, b, rtol=1e-10, atol=1e-12)
    assert not ours.tangent.requires_grad


def test_every_rule_is_among_the_cases(monkeypatch):
    used = {*shapes.CONSTANT, "float", "half", "bfloat16"}  # below
    used |= {name for name in RULES if name.startswith("dropout") or name.endswith("_with_indices")}

    def recording(name, function):
        return lambda *args, **kwargs: used.add(name) or function(*args, **kwargs)

    for name, (function, any_operand) in list(RULES.items()):
        monkeypatch.setitem(RULES, name, Rule(recording(name, function), any_operand))
    for case in CASES.values():
        case(Dual(g(B, 4, 6, 6), g(N, 4, 6, 6)))
    assert set(RULES) == used


def test_what_does_not_depend_on_the_entries_is_the_values():
    x = Dual(g(B, 4), g(N, 4))
    more = {"full_like": (2,), "new_full": ((2, 3), 2.0), "new_tensor": ([1.0],), "argmax": (1,), "argmin": (1,)}
    more |= dict.fromkeys(("new_zeros", "new_ones", "new_empty"), (2, 3))
    more |= dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), (x,))
    for name in shapes.CONSTANT:
        ours, args = getattr(x, name)(*more.get(name, ())), more.get(name, ())
        function = getattr(torch, name) if name.endswith("_like") else getattr(x.value, name)
        expected = function(*((x.value,) if name.endswith("_like") else ()), *map(value_of, args))
        assert type(ours) is type(expected)
        if isinstance(ours, torch.Tensor):
            assert ours.shape == expected.shape and ours.dtype == expected.dtype
            assert "empty" in name or "rand" in name or torch.equal(ours, expected)
        else:
            assert ours == expected
    for ours, expected in ((x < 0, x.value < 0), (x != x, x.value != x.value), (x >= x.value, x.value >= x.value)):
        assert torch.equal(ours, expected)
    assert len(x) == x.size(0) == B and x.size() == x.shape == (B, 4) and not x.requires_grad and not x.is_cuda


def test_conversion_keeps_value_and_tangent_in_one_dtype():
    x = Dual(g(B, 4), g(N, 4))
    for y, dtype in ((x.float(), torch.float32), (x.half(), torch.float16), (x.bfloat16(), torch.bfloat16)):
        assert y.value.dtype == y.tangent.dtype == dtype
    assert torch.equal(x.to(torch.long), x.value.long())  # a constant: rounding has derivative zero


def test_channels_last_gives_the_same():
    x, dx = g(B, 4, 6, 6, seed=2), g(N, 4, 6, 6, seed=3)

    def layers(x):
        return F.group_norm(F.conv2d(F.group_norm(x, 2, GAIN4, BIAS4), W3, padding=1), 3)

    def swap(tensor):
        return tensor.contiguous(memory_format=torch.channels_last)

    a, b = layers(Dual(x, dx)), layers(Dual(swap(x), swap(dx)))
    assert b.value.is_contiguous(memory_format=torch.channels_last)
    assert torch.allclose(a.value, b.value) and torch.allclose(a.tangent, b.tangent)


def test_any_memory_layout_gives_the_same():
    """Sliced and transposed inputs reach the fused kernels in the layout that they take."""
    x, dx = g(B, 6, 6, 8, seed=2)[..., ::2].permute(0, 3, 1, 2), g(N, 4, 6, 6, seed=3).transpose(2, 3)
    a = F.group_norm(Dual(x, dx), 2, GAIN4, BIAS4)
    b = F.group_norm(Dual(x.contiguous(), dx.contiguous()), 2, GAIN4, BIAS4)
    assert torch.allclose(a.value, b.value) and torch.allclose(a.tangent, b.tangent)
    a, b = F.layer_norm(Dual(x, dx), (6,)), F.layer_norm(Dual(x.contiguous(), dx.contiguous()), (6,))
    assert torch.allclose(a.value, b.value) and torch.allclose(a.tangent, b.tangent)


def test_dropout_uses_one_mask_for_both():
    x, dx = torch.ones(B, 1000, dtype=torch.float64), 3 * torch.ones(N, 1000, dtype=torch.float64)
    out = F.dropout(Dual(x, dx), 0.2, training=True)
    assert torch.equal(out.tangent, 3 * out.value[:N])
    assert sorted(out.value.unique().tolist()) == [0.0, 1.25]
    assert 0.15 < (out.value == 0).double().mean() < 0.25
    still = Dual(x, dx)
    assert F.dropout(still, 0.2, training=False) is still


@pytest.mark.parametrize(("name", "shape"), [("1d", (1,)), ("2d", (1, 1)), ("3d", (1, 1, 1))])
def test_dropout_of_channels(name, shape):
    function, x = getattr(F, f"dropout{name}"), torch.ones(B, 1000, *shape, dtype=torch.float64)
    torch.manual_seed(0)
    out = function(Dual(x, 3 * x[:N]), 0.2)
    torch.manual_seed(0)
    assert torch.equal(out.value, function(x, 0.2)) and torch.equal(out.tangent, 3 * out.value[:N])
    assert torch.equal(function(Dual(x, x[:N]), 0.2, training=False).value, x)


def test_parameters_get_the_gradient_of_the_value_alone():
    layer = nn.Linear(4, 4).double()
    out = layer(Dual(g(B, 4), g(N, 4, seed=1)))
    out.value.sum().backward()
    assert torch.allclose(layer.weight.grad, g(B, 4).sum(0).expand(4, 4))


def test_a_network_that_ignores_its_input_has_derivative_zero():
    z, t = g(B, 4), g(B)
    value, tangent = value_and_jvp(
        lambda z, r, t: torch.ones_like(z), (z, t, t), (g(B, 4), 0.0, 1.0), rows=torch.arange(B) < N
    )
    assert torch.equal(value, torch.ones_like(z)) and torch.equal(tangent, torch.zeros_like(z))


class TracedCases(nn.Module):
    def forward(self, x, dx):
        outs = [CASES[name](Dual(x, dx)) for name in ("attention, mask", "einsum", "max_pool", "instance_norm")]
        return [out.value for out in outs], [out.tangent for out in outs]


def test_torch_export_reads_the_rules():
    """As `train.compile` needs it."""
    x, dx = g(B, 4, 6, 6, seed=2), g(N, 4, 6, 6, seed=3)
    expected = TracedCases()(x, dx)
    torch.testing.assert_close(plain_operations(TracedCases(), (x, dx))(x, dx), expected)


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.special.i0(x), "special_i0 has no tangent rule"),
        (lambda x: x.cumprod(1), "Tensor.cumprod has no tangent rule"),
        (lambda x: torch.ops.aten.silu(x), "aten.silu has no tangent rule"),
        (lambda x: torch.sin(x, out=g(B, 4)), "sin with these arguments"),
        (lambda x: x.value[x], "getitem with a tangent elsewhere"),
        (lambda x: F.linear(g(2, 4), x), "linear with a tangent elsewhere"),
        (lambda x: F.linear(x, x), "linear with a tangent elsewhere"),
        (lambda x: F.linear(x[:, 0], g(2, B)), "without a batch"),
        (lambda x: F.conv1d(x, g(4, B, 1)), "without a batch"),
        (lambda x: F.pixel_shuffle(x[..., None], 2), "without a batch"),
        (lambda x: x[0], "batch dimension"),
        (lambda x: x[:2], "batch dimension"),
        (lambda x: x[..., 0, 0], "batch dimension"),
        (lambda x: x[None], "batch dimension"),
        (lambda x: x[..., x > 0], "batch dimension"),
        (lambda x: x[:, None, None][:, 0, :, [0, 1]], "batch dimension"),
        (lambda x: x.flatten(), "batch dimension"),
        (lambda x: x.transpose(0, 1), "batch dimension"),
        (lambda x: x.T, "Tensor.T has no"),
        (lambda x: x.mT, "batch dimension"),
        (lambda x: x.permute(1, 0), "batch dimension"),
        (lambda x: x.reshape(-1), "batch dimension"),
        (lambda x: x.view(2 * B, 2), "batch dimension"),
        (lambda x: x.expand(3, B, 4), "batch dimension"),
        (lambda x: x.repeat(2, 1), "batch dimension"),
        (lambda x: x.squeeze(), "batch dimension"),
        (lambda x: x.roll(1), "batch dimension"),
        (lambda x: x.unbind(0), "batch dimension"),
        (lambda x: torch.cat([x, x]), "batch dimension"),
        (lambda x: torch.stack([x, x]), "batch dimension"),
        (lambda x: x.gather(0, torch.zeros(1, 4).long()), "batch dimension"),
        (lambda x: F.pad(x, (0, 0, 1, 0)), "batch dimension"),
        (lambda x: x.sum(), "batch dimension"),
        (lambda x: x.mean(0), "batch dimension"),
        (lambda x: x.sum(()), "batch dimension"),
        (lambda x: x.max(), "batch dimension"),
        (lambda x: x.var(True), "batch dimension"),
        (lambda x: x.softmax(0), "batch dimension"),
        (lambda x: F.layer_norm(x, (B, 4)), "batch dimension"),
        (lambda x: x.norm(p=1, dim=1), "2-norm"),
        (lambda x: x @ x.value.mT @ x, "sums over the batch"),
        (lambda x: x[:, 0] @ g(B), "sums over the batch"),
        (lambda x: x[:, :, None] * x, "mix the samples"),
        (lambda x: x[:, 0] + g(B, B), "mix the samples"),
        (lambda x: x[:, None] @ g(2, B, 4, 4), "mix the samples"),
        (lambda x: torch.einsum("bi,bj->ij", x, x), "einsum"),
        (lambda x: torch.einsum("bi,ci->bci", x, x), "einsum"),
        (lambda x: torch.einsum("bi,bi", x, x), "arrow"),
        (lambda x: x**x, "both have a tangent"),
        (lambda x: 0**x, "the base 0"),
        (lambda x: nn.BatchNorm1d(4).double()(x), "batch_norm in training"),
        (lambda x: F.scaled_dot_product_attention(*[x[:, None]] * 3, dropout_p=0.1), "dropout_p"),
        (lambda x: F.scaled_dot_product_attention(x, x, x), "attention without a batch"),
    ],
)
def test_what_has_no_rule_fails_loudly(call, message):
    with pytest.raises(NoTangentRule, match=message) as caught:
        call(Dual(g(B, 4), g(N, 4)))
    line = str(caught.value)
    assert isinstance(caught.value, UserError) and isinstance(caught.value, TypeError)
    assert "train.jvp: func" in line and 'method="func"' in line and "docs/own-network.md" in line and "\n" not in line


@pytest.mark.parametrize(
    "u",
    [
        lambda z: torch.zeros_like(z.value).add_(z),
        lambda z: z.mul_(2),
        lambda z: F.silu(z, inplace=True),
        lambda z: F.dropout(z, 0.5, True, inplace=True),
        lambda z: nn.SiLU(inplace=True)(z),
        lambda z: operator.iadd(z, 1),
        lambda z: operator.imul(z, z),
        lambda z: operator.setitem(z, (slice(None), 0), 0),
    ],
)
def test_what_works_in_place_is_refused(u):
    with pytest.raises(NoTangentRule):
        u(Dual(g(B, 4), g(N, 4)))


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2


def test_a_lost_graph_of_the_value_is_refused():
    x = Dual(g(B, 4).requires_grad_(), g(N, 4))
    with pytest.raises(NoTangentRule, match=r"autograd\.Function"):
        Scaled.apply(x)
    with torch.no_grad():
        assert not x.detach().requires_grad  # as in any network
        assert Scaled.apply(Dual(g(B, 4), g(N, 4))).rows == N


def test_shapes_must_fit():
    for value, tangent in ((g(3, 4), g(4, 4)), (g(3, 4), g(3, 5))):
        with pytest.raises(ValueError, match="does not fit"):
            Dual(value, tangent)


def test_bf16_autocast_keeps_norms_in_float32():
    x, dx = g(B, 4, 6, 6).float(), g(N, 4, 6, 6, seed=1).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        conv = F.conv2d(Dual(x, dx), W3.float(), padding=1)
        norm = F.group_norm(conv, 2)
    assert conv.value.dtype == conv.tangent.dtype == torch.bfloat16
    assert norm.value.dtype == norm.tangent.dtype == torch.float32


def test_an_operation_of_another_library_is_known_by_its_own_name(monkeypatch):
    with torch.library._scoped_library("meanflow_test", "FRAGMENT") as library:
        library.define("silu(Tensor x) -> Tensor")
        library.impl("silu", lambda x: x * 3, "CompositeImplicitAutograd")
        x, silu = Dual(g(B, 4), g(N, 4)), torch.ops.meanflow_test.silu
        for operation in (silu, silu.default):
            with pytest.raises(NoTangentRule, match=r"meanflow_test\.silu has no tangent rule"):
                operation(x)
        monkeypatch.setitem(RULES, "meanflow_test.silu", Rule(linear(silu), any_operand=False))
        assert torch.equal(silu(x).tangent, 3 * x.tangent)


# --- docs/own-network.md -----------------------------------------------------------------------------------------

GUIDE = (ROOT / "docs" / "own-network.md").read_text(encoding="utf-8")


def test_the_guide_lists_what_has_a_rule():
    section = GUIDE.partition("## What has a rule")[2].partition("\n##")[0]
    listed = [name for line in re.findall(r"^    (.*)$", section, re.M) for name in line[14:].split()]
    assert sorted(listed) == sorted(RULES)


def test_the_guides_rule_works(monkeypatch):
    monkeypatch.setattr("meanflow.dual.number.RULES", dict(RULES))  # forgotten afterwards
    with pytest.raises(NoTangentRule, match="atan"):
        torch.atan(Dual(g(B, 4), g(N, 4)))
    scope = {}
    for code in re.findall(r"```python\n(.*?)```", GUIDE, re.S):
        exec(code, scope)
    assert len(scope["expected"]) == N


# --- tangents in another precision -------------------------------------------------------------------------------


def test_tangents_in_bf16_leave_values_alone():
    """Products in the tangent are rounded to bf16's 8 bits; the value and its gradient are the same to the bit."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Flatten(2), nn.Linear(36, 36), nn.Softmax(-1))
    x, dx = torch.randn(4, 3, 6, 6), torch.randn(3, 3, 6, 6)

    def attend(x):
        y = net(x)
        return F.scaled_dot_product_attention(y, y, y) @ torch.eye(36)

    exact = attend(Dual(x, dx))
    with tangents_in(torch.bfloat16):
        rounded = attend(Dual(x, dx))
    assert torch.equal(exact.value, rounded.value) and rounded.tangent.dtype == torch.float32
    error = ((exact.tangent - rounded.tangent).norm() / exact.tangent.norm()).item()
    assert 1e-4 < error < 2e-2
    assert torch.equal(attend(Dual(x, dx)).tangent, exact.tangent)  # the precision is that of the block above alone
