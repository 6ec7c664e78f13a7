"""Rules of arithmetic, of element-wise functions and of dropout."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meanflow.dual.number import (
    Dual,
    broadcast_dual,
    check_inner,
    dual,
    matching_rows,
    no_rule,
    rule,
    tangent_of,
    value_of,
)

aten = torch.ops.aten
SELU = 1.6732632423543772, 1.0507009873554805  # alpha and scale


# --- two and more operands, any of which may be a Dual ----------------------------------------------------------


@rule("add", any_operand=True)
def add(x, y, alpha: float = 1) -> Dual:
    if alpha != 1:
        y = mul(y, alpha) if isinstance(y, Dual) else y * alpha
    if not isinstance(x, Dual):
        x, y = y, x
    broadcast_dual("add", x, y)
    value = x.value + value_of(y)
    if isinstance(y, Dual):
        return dual(value, lambda: x.tangent + y.tangent)
    return dual(value, lambda: x.tangent.expand(x.rows, *value.shape[1:]))


@rule("sub", "subtract", any_operand=True)
def sub(x, y, alpha: float = 1) -> Dual:
    if alpha != 1:
        y = mul(y, alpha) if isinstance(y, Dual) else y * alpha
    return add(x, mul(y, -1) if isinstance(y, Dual) else -y)


@rule("rsub", any_operand=True)
def rsub(x, y) -> Dual:
    return sub(y, x)


@rule("mul", "multiply", any_operand=True)
def mul(x, y) -> Dual:
    if not isinstance(x, Dual):
        x, y = y, x
    broadcast_dual("mul", x, y)
    value = x.value * value_of(y)
    if isinstance(y, Dual):
        return dual(value, lambda: x.tangent * y.primal_rows + x.primal_rows * y.tangent)
    return dual(value, lambda: x.tangent * matching_rows(y, x))


@rule("div", "divide", "true_divide", any_operand=True)
def div(x, y) -> Dual:
    like = broadcast_dual("div", x, y)
    value = value_of(x) / value_of(y)
    if not isinstance(y, Dual):
        return dual(value, lambda: x.tangent / matching_rows(y, like))
    return dual(value, lambda: (tangent_of(x) - value.detach()[: like.rows] * y.tangent) / y.primal_rows)


@rule("pow", any_operand=True)
def pow(x, exponent) -> Dual:
    """d(xᵉ) = e xᵉ⁻¹ dx for a constant exponent, xᵉ log(x) de for a constant base."""
    if isinstance(x, Dual) and isinstance(exponent, Dual):
        raise no_rule("pow whose base and exponent both have a tangent")
    if not isinstance(x, Dual | Tensor) and x <= 0:
        raise no_rule(f"pow of the base {x}")
    like = broadcast_dual("pow", x, exponent)
    value = torch.pow(value_of(x), value_of(exponent))

    def tangent() -> Tensor:
        base, e = matching_rows(x, like), matching_rows(exponent, like)
        if isinstance(exponent, Dual):
            log = torch.where(base == 0, 0, torch.log(base)) if isinstance(base, Tensor) else math.log(base)
            return value.detach()[: like.rows] * log * exponent.tangent
        if isinstance(e, Tensor):
            return torch.where(e == 0, 0, e * base ** (e - 1)) * x.tangent
        return e * base ** (e - 1) * x.tangent if e else torch.zeros_like(x.tangent)

    return dual(value, tangent)


def _of_operands(name: str, tangent: Callable) -> None:
    """Any operand may be a Dual: `tangent(tangents, primals, **kwargs)`, where a constant has tangent 0."""
    operation = getattr(torch, name)

    @rule(name, any_operand=True)
    def apply(*operands: Any, **kwargs: Any) -> Dual:
        like = broadcast_dual(name, *operands)

        def rows() -> Tensor:
            tangents, primals = map(tangent_of, operands), [matching_rows(x, like) for x in operands]
            return tangent(list(tangents), primals, **kwargs).expand(like.rows, *value.shape[1:])

        value = operation(*map(value_of, operands), **kwargs)
        return dual(value, rows)


def _larger(d: list, p: list) -> Tensor:
    """Where both are equal the derivative is the mean of theirs, as in PyTorch."""
    return torch.where(p[0] == p[1], (d[0] + d[1]) / 2, torch.where(p[0] > p[1], d[0], d[1]))


def _addcmul(d: list, p: list, value: float = 1) -> Tensor:
    """One fused operation for each factor that has a tangent."""
    out = d[0]
    for a, b in ((d[1], p[2]), (p[1], d[2])):
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            out = torch.addcmul(out, a, b, value=value) if isinstance(out, Tensor) else value * a * b
    return out


OF_OPERANDS = {
    "where": lambda d, p: torch.where(p[0], d[1], d[2]),
    "maximum": _larger,
    "minimum": lambda d, p: _larger(d[::-1], p),
    "lerp": lambda d, p: d[0] + p[2] * (d[1] - d[0]) + d[2] * (p[1] - p[0]),
    "addcmul": _addcmul,
}
for _name, _tangent in OF_OPERANDS.items():
    _of_operands(_name, _tangent)


@rule("masked_fill")
def masked_fill(x: Dual, mask: Tensor, value: float | Tensor) -> Dual:
    broadcast_dual("masked_fill", x, mask)
    return dual(x.value.masked_fill(mask, value), lambda: x.tangent.masked_fill(matching_rows(mask, x), 0))


# --- functions of one operand -----------------------------------------------------------------------------------
# Each operation with its tangent from (dx, x, y) - the rows of the tangent, of the input and of the output - and the
# operation's settings. The kernel of the backward pass serves where there is one: the Jacobian is diagonal.

OF_ONE = {
    torch.neg: lambda dx, x, y: -dx,
    torch.abs: lambda dx, x, y: dx * torch.sign(x),
    torch.reciprocal: lambda dx, x, y: -dx * y * y,
    torch.square: lambda dx, x, y: 2 * dx * x,
    torch.sqrt: lambda dx, x, y: dx / (2 * y),
    torch.rsqrt: lambda dx, x, y: -0.5 * dx * y / x,
    torch.exp: lambda dx, x, y: dx * y,
    torch.expm1: lambda dx, x, y: dx * (y + 1),
    torch.log: lambda dx, x, y: dx / x,
    torch.log1p: lambda dx, x, y: dx / (x + 1),
    torch.sin: lambda dx, x, y: dx * torch.cos(x),
    torch.cos: lambda dx, x, y: -dx * torch.sin(x),
    torch.erf: lambda dx, x, y: dx * torch.exp(-x * x) * (2 / math.sqrt(math.pi)),
    torch.tanh: lambda dx, x, y: aten.tanh_backward(dx, y),
    torch.sigmoid: lambda dx, x, y: aten.sigmoid_backward(dx, y),
    torch.clamp: lambda dx, x, y, min=None, max=None: torch.where(x == y, dx, 0),
    torch.clip: lambda dx, x, y, min=None, max=None: torch.where(x == y, dx, 0),
    torch.clamp_min: lambda dx, x, y, min: torch.where(x == y, dx, 0),
    torch.clamp_max: lambda dx, x, y, max: torch.where(x == y, dx, 0),
    F.relu: lambda dx, x, y, inplace=False: aten.threshold_backward(dx, y, 0),
    F.relu6: lambda dx, x, y, inplace=False: aten.hardtanh_backward(dx, x, 0, 6),
    F.hardtanh: lambda dx, x, y, min_val=-1.0, max_val=1.0, inplace=False: aten.hardtanh_backward(
        dx, x, min_val, max_val
    ),
    F.hardsigmoid: lambda dx, x, y, inplace=False: aten.hardsigmoid_backward(dx, x),
    F.hardswish: lambda dx, x, y, inplace=False: aten.hardswish_backward(dx, x),
    F.leaky_relu: lambda dx, x, y, negative_slope=0.01, inplace=False: aten.leaky_relu_backward(
        dx, x, negative_slope, False
    ),
    F.elu: lambda dx, x, y, alpha=1.0, inplace=False: aten.elu_backward(dx, alpha, 1, 1, False, x),
    F.selu: lambda dx, x, y, inplace=False: aten.elu_backward(dx, *SELU, 1, False, x),
    F.celu: lambda dx, x, y, alpha=1.0, inplace=False: aten.elu_backward(dx, alpha, 1, 1 / alpha, False, x),
    F.softplus: lambda dx, x, y, beta=1, threshold=20: aten.softplus_backward(dx, x, beta, threshold),
    F.softsign: lambda dx, x, y: dx / (1 + x.abs()).square(),
    F.mish: lambda dx, x, y, inplace=False: aten.mish_backward(dx, x),
    F.silu: lambda dx, x, y, inplace=False: aten.silu_backward(dx, x),
    F.gelu: lambda dx, x, y, approximate="none": aten.gelu_backward(dx, x, approximate=approximate),
    F.logsigmoid: lambda dx, x, y: dx * torch.sigmoid(-x),
}


def _of_one(operation: Callable, tangent: Callable) -> Callable:
    def apply(x: Dual, *args: Any, **kwargs: Any) -> Dual:
        value = operation(x.value, *args, **kwargs)
        return dual(value, lambda: tangent(x.tangent, x.primal_rows, value.detach()[: x.rows], *args, **kwargs))

    return apply


for _operation, _tangent in OF_ONE.items():
    rule(_operation.__name__)(_of_one(_operation, _tangent))


@rule("prelu")
def prelu(x: Dual, weight: Tensor) -> Dual:
    def tangent() -> Tensor:
        slope = weight.detach()
        if slope.numel() > 1:  # one for each channel, dimension 1
            slope = slope.view(-1, *[1] * (x.ndim - 2))
        return torch.where(x.primal_rows > 0, x.tangent, slope * x.tangent)

    return dual(torch.prelu(x.value, weight), tangent)


@rule("glu")
def glu(x: Dual, dim: int = -1) -> Dual:
    """y = a σ(b) with a and b the two halves of x."""
    check_inner("glu", x, dim)

    def tangent() -> Tensor:
        (a, b), (da, db) = x.primal_rows.chunk(2, dim), x.tangent.chunk(2, dim)
        gate = torch.sigmoid(b)
        return gate * (da + a * (1 - gate) * db)

    return dual(F.glu(x.value, dim), tangent)


@rule("dropout")
def dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    """The tangent takes the value's mask, which is the one that F.dropout draws from the same seed."""
    if not training or p == 0:
        return input
    value, mask = torch.native_dropout(input.value, p, True)
    return dual(value, lambda: aten.native_dropout_backward(input.tangent, mask[: input.rows], 1 / (1 - p)))


def _dropout_of_channels(name: str, ndim: int) -> None:
    @rule(name)
    def apply(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
        if not training or p == 0:
            return input
        if input.ndim != ndim:
            raise no_rule(f"{name} of an input without a batch dimension")
        one_each = torch.ones_like(input.value[(slice(None), slice(None), *[slice(1)] * (ndim - 2))])  # (B, C, 1, …)
        return mul(input, torch.feature_dropout(one_each, p, True))


for _name, _ndim in {"dropout1d": 3, "dropout2d": 4, "dropout3d": 5}.items():
    _dropout_of_channels(_name, _ndim)
