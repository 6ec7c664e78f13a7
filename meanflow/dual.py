"""Forward-mode derivatives as two plain tensors: a value that keeps its graph, a tangent that has none.

The MeanFlow target (Eq. 10) needs the *number* du/dt, never its gradient. `torch.func.jvp` records the tangent's
operations all the same and keeps forward gradients alive in every tensor saved for the backward pass: more than
twice the memory of Flow Matching. Here a `Dual` walks through an unchanged network by `__torch_function__`; each
operation computes its value as usual and advances the tangent beside it, under `no_grad`, from detached operands.

The tangent may cover only the first n rows of the batch (n ≤ B): samples with r = t need none. An operation without
a rule raises `NoTangentRule`; nothing is ever silently treated as constant.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

aten = torch.ops.aten
RULES: dict[str, Callable] = {}


class NoTangentRule(TypeError):
    """The network uses an operation (or a form of it) that `meanflow.dual` cannot differentiate."""


class Dual:
    """`value` (B, …) and the `tangent` (n, …) of its first n ≤ B rows. Dimension 0 is the batch, always."""

    __slots__ = ("tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor):
        if value.shape[1:] != tangent.shape[1:] or tangent.shape[0] > value.shape[0]:
            raise ValueError(f"a tangent {tuple(tangent.shape)} does not fit the value {tuple(value.shape)}")
        self.value, self.tangent = value, tangent

    @property
    def rows(self) -> int:
        """n, the number of leading rows that have a tangent."""
        return self.tangent.shape[0]

    @property
    def head(self) -> Tensor:
        """The rows of the value that have a tangent, without their graph."""
        return self.value.detach()[: self.rows]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        name = func.__name__
        name = name.strip("_") if name.startswith("__") else name  # add_ is not add
        if name not in RULES or (kwargs or {}).get("inplace"):
            what = f"{name} in place" if name in RULES else name
            raise NoTangentRule(f"{what} has no tangent rule in meanflow.dual; use loss.jvp: func for this network")
        return RULES[name](*args, **(kwargs or {}))

    # What networks ask of a tensor.
    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    ndim = property(lambda self: self.value.ndim)

    def __getattr__(self, name: str):
        if name not in RULES:
            raise NoTangentRule(f"Tensor.{name} has no tangent rule in meanflow.dual; use loss.jvp: func")
        rule = RULES[name]
        return lambda *args, **kwargs: rule(self, *args, **kwargs)

    def size(self, dim: int | None = None):
        return self.value.shape if dim is None else self.value.shape[dim]

    def __getitem__(self, index) -> "Dual":
        return RULES["getitem"](self, index)

    def __add__(self, other) -> "Dual":
        return RULES["add"](self, other)

    def __sub__(self, other) -> "Dual":
        return RULES["sub"](self, other)

    def __rsub__(self, other) -> "Dual":
        return RULES["sub"](other, self)

    def __mul__(self, other) -> "Dual":
        return RULES["mul"](self, other)

    def __truediv__(self, other) -> "Dual":
        return RULES["div"](self, other)

    def __neg__(self) -> "Dual":
        return RULES["mul"](self, -1)

    __radd__, __rmul__ = __add__, __mul__


def rule(*names: str) -> Callable:
    """Register a function as the rule of the named operations."""

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def dual(value: Tensor, tangent: Callable[[], Tensor]) -> Dual:
    """Pair a value, computed by the caller with its graph, with a tangent that is computed without one."""
    with torch.no_grad():
        return Dual(value, tangent())


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def leading(x: Any, like: Dual) -> Any:
    """What of a constant operand meets the first rows of `like`, without graph; scalars and broadcast tensors pass."""
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return x[: like.rows] if x.ndim == like.ndim and x.shape[0] == like.shape[0] else x


# --- linear in one operand -------------------------------------------------------------------------------------


def _shape_rule(name: str, keeps_batch: Callable[..., bool]) -> None:
    operation = getattr(Tensor, name)

    def apply(x: Dual, *args, **kwargs):
        if not keeps_batch(x, *args, **kwargs):
            raise NoTangentRule(f"{name}{args} moves or splits the batch dimension; meanflow.dual keeps it first")
        value = operation(x.value, *args, **kwargs)
        if not isinstance(value, tuple):
            return dual(value, lambda: operation(x.tangent, *args, **kwargs))
        with torch.no_grad():
            tangents = operation(x.tangent, *args, **kwargs)
        return tuple(Dual(v, d) for v, d in zip(value, tangents, strict=True))

    RULES[name] = apply


def _inner(x: Dual, *dims: int) -> bool:
    return all(dim % x.ndim > 0 for dim in dims)


_shape_rule("flatten", lambda x, start_dim=0, end_dim=-1: _inner(x, start_dim))
_shape_rule("unflatten", lambda x, dim, sizes: _inner(x, dim))
_shape_rule("transpose", lambda x, dim0, dim1: _inner(x, dim0, dim1))
_shape_rule("chunk", lambda x, chunks, dim=0: _inner(x, dim))
_shape_rule("unbind", lambda x, dim=0: _inner(x, dim))
_shape_rule("permute", lambda x, *dims: (dims if len(dims) > 1 else dims[0])[0] == 0)
_shape_rule("unsqueeze", lambda x, dim: dim % (x.ndim + 1) > 0)
_shape_rule("contiguous", lambda x, memory_format=None: True)
_shape_rule("to", lambda x, dtype: isinstance(dtype, torch.dtype))


@rule("reshape")
def reshape(x: Dual, *sizes) -> Dual:
    value = x.value.reshape(*sizes)
    if value.shape[0] != x.shape[0]:
        raise NoTangentRule(f"reshape{sizes} changes the batch dimension; meanflow.dual keeps it first")
    return dual(value, lambda: x.tangent.reshape(x.rows, *value.shape[1:]))


@rule("getitem")
def getitem(x: Dual, index) -> Dual:
    first = index[0] if isinstance(index, tuple) else index
    if not isinstance(first, slice) or first != slice(None):
        raise NoTangentRule("indexing the batch dimension has no tangent rule; meanflow.dual keeps it whole")
    return dual(x.value[index], lambda: x.tangent[index])


@rule("cat")
def cat(tensors, dim: int = 0) -> Dual:
    like = next(x for x in tensors if isinstance(x, Dual))
    if dim % like.ndim == 0:
        raise NoTangentRule("cat along the batch dimension has no tangent rule")

    def tangent() -> Tensor:
        parts = [x.tangent if isinstance(x, Dual) else torch.zeros_like(x[: like.rows]) for x in tensors]
        return torch.cat(parts, dim)

    return dual(torch.cat([value_of(x) for x in tensors], dim), tangent)


def _weighted(operation: Callable) -> Callable:
    """y = operation(x, weight, bias, …), linear in x: the tangent takes the same operation without bias."""

    def apply(input: Dual, weight: Tensor, bias: Tensor | None = None, *args, **kwargs) -> Dual:
        if isinstance(weight, Dual) or isinstance(bias, Dual):
            raise NoTangentRule(f"{operation.__name__} with a weight that has a tangent has no rule")
        value = operation(input.value, weight, bias, *args, **kwargs)
        return dual(value, lambda: operation(input.tangent, weight.detach(), None, *args, **kwargs))

    return apply


for _operation in (F.linear, F.conv2d, F.conv_transpose2d):
    RULES[_operation.__name__] = _weighted(_operation)


# --- arithmetic ------------------------------------------------------------------------------------------------


@rule("add", "radd")
def add(x, y) -> Dual:
    if not isinstance(x, Dual):
        x, y = y, x
    value = x.value + value_of(y)
    if isinstance(y, Dual):
        return dual(value, lambda: x.tangent + y.tangent)
    return dual(value, lambda: x.tangent.expand(x.rows, *value.shape[1:]))


@rule("sub")
def sub(x, y) -> Dual:
    return add(x, mul(y, -1) if isinstance(y, Dual) else -y)


@rule("rsub")
def rsub(x, y) -> Dual:
    return sub(y, x)


@rule("mul", "rmul")
def mul(x, y) -> Dual:
    if not isinstance(x, Dual):
        x, y = y, x
    value = x.value * value_of(y)
    if isinstance(y, Dual):
        return dual(value, lambda: x.tangent * y.head + x.head * y.tangent)
    return dual(value, lambda: x.tangent * leading(y, x))


@rule("div", "truediv")
def div(x: Dual, y) -> Dual:
    if isinstance(y, Dual):
        raise NoTangentRule("division by a value that has a tangent has no rule")
    return dual(x.value / y, lambda: x.tangent / leading(y, x))


# --- element-wise functions: the kernel of the backward pass, applied to the tangent ------------------------------


@rule("sin")
def sin(x: Dual) -> Dual:
    return dual(torch.sin(x.value), lambda: x.tangent * torch.cos(x.head))


@rule("cos")
def cos(x: Dual) -> Dual:
    return dual(torch.cos(x.value), lambda: -x.tangent * torch.sin(x.head))


@rule("silu")
def silu(input: Dual, inplace: bool = False) -> Dual:
    return dual(F.silu(input.value), lambda: aten.silu_backward(input.tangent, input.head))


@rule("gelu")
def gelu(input: Dual, approximate: str = "none") -> Dual:
    value = F.gelu(input.value, approximate=approximate)
    return dual(value, lambda: aten.gelu_backward(input.tangent, input.head, approximate=approximate))


@rule("dropout")
def dropout(input: Dual, p: float = 0.5, training: bool = True, inplace: bool = False) -> Dual:
    """The tangent meets the value's own mask, which is the one that F.dropout draws from the same seed."""
    if not training or p == 0:
        return input
    value, mask = torch.native_dropout(input.value, p, True)
    return dual(value, lambda: aten.native_dropout_backward(input.tangent, mask[: input.rows], 1 / (1 - p)))


# --- normalisation and attention -------------------------------------------------------------------------------
# The Jacobian of x ↦ (x − mean)/std is symmetric, so the fused kernel that pulls gradients back through it also
# pushes tangents forward; the affine weight comes after. Statistics are float32 under autocast.


def _float32_under_autocast(x: Tensor) -> Tensor:
    return x.float() if torch.is_autocast_enabled(x.device.type) else x


def _kernel_format(x: Tensor) -> torch.memory_format:
    """The memory format that the fused group norm takes `x` in: channels_last on CPUs alone (as F.group_norm does)."""
    channels_last = x.ndim == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@rule("group_norm")
def group_norm(input: Dual, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Dual:
    x, rows = _float32_under_autocast(input.value), input.rows
    memory_format = _kernel_format(x)
    x = x.contiguous(memory_format=memory_format)
    channels, positions = x.shape[1], x[0, 0].numel()
    value, mean, rstd = torch.native_group_norm(x, weight, bias, len(x), channels, positions, num_groups, eps)

    def tangent() -> Tensor:
        dx = input.tangent.to(x.dtype).contiguous(memory_format=memory_format)
        sizes = (rows, channels, positions, num_groups)
        operands = (dx, *(part.detach()[:rows] for part in (x, mean, rstd)), None)
        out = aten.native_group_norm_backward(*operands, *sizes, [True, False, False])[0]
        return out if weight is None else out.mul_(weight.detach().view(-1, *[1] * (x.ndim - 2)))

    return dual(value, tangent)


@rule("layer_norm")
def layer_norm(input: Dual, normalized_shape, weight=None, bias=None, eps: float = 1e-5) -> Dual:
    x, rows = _float32_under_autocast(input.value).contiguous(), input.rows
    value, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)

    def tangent() -> Tensor:
        dx = input.tangent.to(x.dtype).contiguous()
        rest = list(normalized_shape), *(part.detach()[:rows] for part in (mean, rstd)), None, None
        out = aten.native_layer_norm_backward(dx, x.detach()[:rows], *rest, [True, False, False])[0]
        return out if weight is None else out.mul_(weight.detach())

    return dual(value, tangent)


@rule("scaled_dot_product_attention")
def attention(query: Dual, key: Dual, value: Dual, scale: float | None = None) -> Dual:
    """The value may use any fused kernel; the tangent recomputes the n rows' attention matrix.

    P = softmax(S), S = q kᵀ·scale:  dP = P ⊙ (dS − Σ P ⊙ dS),  dO = dP v + P dv.
    """

    def tangent() -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = query.head, key.head, value.head
        p = torch.softmax((q @ k.mT) * factor, dim=-1)  # (n, …, T, T)
        ds = (query.tangent @ k.mT + q @ key.tangent.mT) * factor
        dp = p * (ds - (p * ds).sum(-1, keepdim=True))
        return (dp.to(v.dtype) @ v + p.to(v.dtype) @ value.tangent).to(v.dtype)

    return dual(F.scaled_dot_product_attention(query.value, key.value, value.value, scale=scale), tangent)
