"""Each tangent rule against torch.func.jvp in float64, and what must not happen silently."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from meanflow.dual import Dual, NoTangentRule
from meanflow.jvp import value_and_tangent

B, N = 5, 3  # batch, and the rows that have a tangent


def g(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


W3, W1, WL = g(6, 4, 3, 3, seed=11), g(4, 4, 4, 4, seed=12), g(7, 4, seed=13)
GAIN4, BIAS4, ROW, MAP = g(4, seed=14), g(4, seed=15), g(B, 4, 6, 6, seed=16), g(B, 6, seed=17)

# name: (function of one tensor (B, 4, 6, 6), the rules it exercises)
CASES = {
    "conv2d": lambda x: F.conv2d(x, W3, BIAS4.repeat(2)[:6], padding=1),
    "conv2d strided, grouped": lambda x: F.conv2d(x, W1[:, :1], None, stride=2, padding=1, groups=4),
    "conv_transpose2d": lambda x: F.conv_transpose2d(x, W1[:, :1], None, stride=2, padding=1, groups=4),
    "linear": lambda x: F.linear(x.flatten(2).transpose(1, 2), WL, g(7)),
    "group_norm": lambda x: F.group_norm(x, 2, GAIN4, BIAS4, 1e-6),
    "group_norm, plain": lambda x: F.group_norm(x, 1),
    "group_norm, 3-D": lambda x: F.group_norm(x.flatten(2), 4, GAIN4, BIAS4),
    "layer_norm": lambda x: F.layer_norm(x, (6,), g(6), g(6, seed=1), 1e-6),
    "layer_norm, plain": lambda x: F.layer_norm(x, (6, 6)),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "sin, cos": lambda x: torch.cat([torch.sin(x), torch.cos(2 * x)], dim=1),
    "cat with a constant": lambda x: torch.cat([ROW[: x.shape[0]], x], dim=-1),
    "add": lambda x: 3 + x + ROW[: x.shape[0]] + x + BIAS4[:, None, None],
    "add, broadcast": lambda x: x[:, :, :1] + ROW[: x.shape[0]],
    "sub": lambda x: 1 - (x - ROW[: x.shape[0]]) - 2 * (F.silu(x) - x),
    "rsub of a tensor": lambda x: ROW[: x.shape[0]] - x,
    "mul": lambda x: x * x * ROW[: x.shape[0]] * BIAS4[:, None, None] * 0.5,
    "neg, div": lambda x: -x / 3 + x / (1 + ROW[: x.shape[0]] ** 2),
    "modulate": lambda x: x * (1 + x.flatten(2)[:, :, :1, None]) + x[:, :, :1],
    "shapes": lambda x: x.permute(0, 2, 3, 1).reshape(x.shape[0], 9, 2, 8).unbind(2)[1].contiguous(),
    "chunk": lambda x: x.chunk(2, dim=1)[0] * x.chunk(2, dim=1)[1],
    "to": lambda x: x.to(torch.float64) * ROW[: x.shape[0]],
    "unsqueeze, unflatten": lambda x: x.unsqueeze(1).unflatten(3, (2, 3)),
    "attention": lambda x: F.scaled_dot_product_attention(x, F.silu(x), torch.sin(x)),
    "attention, scale": lambda x: F.scaled_dot_product_attention(x, x, x, scale=0.3),
}


@pytest.mark.parametrize("name", CASES)
def test_rule(name):
    function, x, dx = CASES[name], g(B, 4, 6, 6, seed=2), g(N, 4, 6, 6, seed=3)
    ours = function(Dual(x, dx))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        expected = function(x)
        _, tangent = torch.func.jvp(function, (x[:N],), (dx,))
    assert torch.allclose(ours.value, expected, rtol=1e-12, atol=1e-12)
    assert torch.allclose(ours.tangent, tangent, rtol=1e-10, atol=1e-12)


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


def test_parameters_get_the_gradient_of_the_value_alone():
    layer = nn.Linear(4, 4).double()
    out = layer(Dual(g(B, 4), g(N, 4, seed=1)))
    out.value.sum().backward()
    assert torch.allclose(layer.weight.grad, g(B, 4).sum(0).expand(4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: torch.relu(x), "relu has no tangent rule"),
        (lambda x: x.cumsum(1), "cumsum has no tangent rule"),
        (lambda x: F.linear(g(2, 4), x), "linear"),
        (lambda x: x[0], "batch dimension"),
        (lambda x: x[:2], "batch dimension"),
        (lambda x: x.flatten(), "batch dimension"),
        (lambda x: x.transpose(0, 1), "batch dimension"),
        (lambda x: x.permute(1, 0), "batch dimension"),
        (lambda x: x.reshape(-1), "batch dimension"),
        (lambda x: x.unbind(0), "batch dimension"),
        (lambda x: torch.cat([x, x]), "batch dimension"),
        (lambda x: 1 / x, "no tangent rule|unsupported"),
        (lambda x: x / x, "no rule"),
    ],
)
def test_what_has_no_rule_fails_loudly(call, message):
    with pytest.raises(TypeError, match=message):
        call(Dual(g(B, 4), g(N, 4)))


def test_an_unknown_operation_inside_a_network_names_the_way_out():
    def u(z, t, r):
        return torch.tanh(z)

    z = g(B, 4)
    with pytest.raises(NoTangentRule, match=r"loss\.jvp: func"):
        value_and_tangent(u, z, g(B), g(B), (g(N, 4), 1.0, 0.0), N, "dual", {})
    value, tangent = value_and_tangent(u, z, g(B), g(B), (g(N, 4), 1.0, 0.0), N, "func", {})
    assert torch.allclose(value, torch.tanh(z))
    assert torch.allclose(tangent, (1 - torch.tanh(z[:N]) ** 2) * g(N, 4))


@pytest.mark.parametrize(
    "u",
    [
        lambda z: torch.zeros_like(z.value).add_(z),
        lambda z: z.mul_(2),
        lambda z: F.silu(z, inplace=True),
        lambda z: F.dropout(z, 0.5, True, inplace=True),
        lambda z: nn.SiLU(inplace=True)(z),
    ],
)
def test_what_works_in_place_is_refused(u):
    with pytest.raises(NoTangentRule):
        u(Dual(g(B, 4), g(N, 4)))


def test_rsub_is_the_other_minus_this_one():
    z = Dual(g(B, 4), g(N, 4, seed=1))
    for turned in (torch.rsub(z, 1), 1 - z):
        assert torch.equal(turned.value, 1 - z.value) and torch.equal(turned.tangent, -z.tangent)


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
