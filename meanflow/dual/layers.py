"""Rules of linear layers and products of matrices, of pooling and resampling, of attention."""

import math
from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from meanflow.dual.number import (
    Dual,
    broadcast_dual,
    dual,
    linear,
    lowered,
    matching_rows,
    no_rule,
    rule,
    value_of,
)

aten = torch.ops.aten


# --- linear maps -------------------------------------------------------------------------------------------------


def _weighted(operation: Callable) -> Callable:
    """y = operation(x, weight, bias, …), linear in x: the tangent takes the same operation without bias."""

    def apply(input: Dual, weight: Tensor, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> Dual:
        if input.ndim < 2 or (operation is not F.linear and input.ndim != weight.ndim):
            raise no_rule(f"{operation.__name__} of an input without a batch dimension")
        value = operation(input.value, weight, bias, *args, **kwargs)
        return dual(value, lambda: operation(lowered(input.tangent), lowered(weight.detach()), None, *args, **kwargs))

    return apply


CONVOLUTIONS = F.conv1d, F.conv2d, F.conv3d, F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d
for _operation in (F.linear, *CONVOLUTIONS):
    rule(_operation.__name__)(_weighted(_operation))

# A pool of an input without a batch dimension takes ours for channels, and channels do not mix.
POOLS = F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d
for _operation in (*POOLS, F.interpolate, F.channel_shuffle):
    rule(_operation.__name__)(linear(_operation))


def _pixels(operation: Callable) -> Callable:
    def apply(x: Dual, factor: int) -> Dual:
        if x.ndim < 4:
            raise no_rule(f"{operation.__name__} of an input without a batch dimension")
        value = operation(x.value, factor)  # PyTorch (2.14) leaves the shape of a tangent without rows as it is
        return dual(value, lambda: operation(x.tangent, factor).reshape(x.rows, *value.shape[1:]))

    return apply


for _operation in (F.pixel_shuffle, F.pixel_unshuffle):
    rule(_operation.__name__)(_pixels(_operation))


@rule("pad")
def pad(input: Dual, pad: tuple[int, ...], mode: str = "constant", value: float | None = None) -> Dual:
    if len(pad) // 2 >= input.ndim:
        raise no_rule("pad of the batch dimension")
    return dual(F.pad(input.value, pad, mode, value), lambda: F.pad(input.tangent, pad, mode, 0 if value else value))


def _products(operation: Callable, operands: tuple, primals: Callable[[], list]) -> Dual:
    """operation(*operands), linear in each operand: a sum with the tangent of one Dual in each term."""

    def tangent() -> Tensor:
        rows = [lowered(x) for x in primals()]
        with_tangent = [i for i, x in enumerate(operands) if isinstance(x, Dual)]
        return reduce(add, (operation(*rows[:i], lowered(operands[i].tangent), *rows[i + 1 :]) for i in with_tangent))

    return dual(operation(*map(value_of, operands)), tangent)


@rule("matmul", "bmm", "mm", any_operand=True)
def matmul(x, y) -> Dual:
    if isinstance(x, Dual) and not isinstance(y, Dual) and y.ndim < 3:  # a matrix or vector of weights
        if x.ndim < 2:
            raise no_rule("matmul that sums over the batch dimension")
        return dual(x.value @ y, lambda: lowered(x.tangent) @ lowered(y.detach()))
    like = broadcast_dual("matmul", x, y)
    if like.ndim < 3:
        raise no_rule("matmul that sums over the batch dimension")
    return _products(torch.matmul, (x, y), lambda: [matching_rows(z, like) for z in (x, y)])


@rule("einsum", any_operand=True)
def einsum(equation: str, *operands: Any) -> Dual:
    operands = tuple(operands[0]) if len(operands) == 1 and isinstance(operands[0], list | tuple) else operands
    terms, output = _subscripts(equation, operands)
    like, batch = next(x for x in operands if isinstance(x, Dual)), output[:1]
    for term, x in zip(terms, operands, strict=True):
        if not batch or term.count(batch) > 1 or (isinstance(x, Dual) and term[:1] != batch):
            raise no_rule(f"einsum {equation!r}, in which the batch is not the first dimension throughout,")

    def rows(term: str, x: Any) -> Tensor:
        if isinstance(x, Dual):
            return x.primal_rows
        dim = term.find(batch)
        return x.detach().narrow(dim, 0, like.rows) if dim >= 0 and x.shape[dim] == like.shape[0] else x.detach()

    return _products(lambda *xs: torch.einsum(equation, *xs), operands, lambda: list(map(rows, terms, operands)))


def _subscripts(equation: str, operands: tuple) -> tuple[list[str], str]:
    """The letters of each operand and of the output. The dimensions under an ellipsis get Greek ones."""
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    if not arrow:
        raise no_rule(f"einsum {equation!r} without an arrow")
    terms = inputs.split(",")
    hidden = [x.ndim - len(term.replace("...", "")) for term, x in zip(terms, operands, strict=True)]
    most = max((n for n, term in zip(hidden, terms, strict=True) if "..." in term), default=0)
    greek = "αβγδεζηθ"[:most]
    terms = [term.replace("...", greek[most - n :]) for term, n in zip(terms, hidden, strict=True)]
    return terms, output.replace("...", greek)


# --- pooling and attention -----------------------------------------------------------------------------------------


def _max_pool(name: str, spatial: int) -> None:
    """The tangent is taken where the value's maximum was."""
    operation = getattr(F, f"{name}_with_indices")

    @rule(name, f"{name}_with_indices")
    def apply(x: Dual, *args: Any, return_indices: bool = False, **kwargs: Any) -> Dual | tuple[Dual, Tensor]:
        value, indices = operation(x.value, *args, **kwargs)

        def tangent() -> Tensor:
            places = indices[: x.rows].flatten(-spatial)
            return x.tangent.flatten(-spatial).gather(-1, places).view(x.rows, *value.shape[1:])

        out = dual(value, tangent)
        return (out, indices) if return_indices else out


for _spatial in (1, 2, 3):
    _max_pool(f"max_pool{_spatial}d", _spatial)
    _max_pool(f"adaptive_max_pool{_spatial}d", _spatial)


@rule("scaled_dot_product_attention", any_operand=True)
def attention(
    query: Dual | Tensor,
    key: Dual | Tensor,
    value: Dual | Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Dual:
    """The value may use any fused kernel; the tangent recomputes the n rows' attention matrix.

    P = softmax(S), S = q kᵀ·scale + mask:  dP = P ⊙ (dS − Σ P ⊙ dS),  dO = dP v + P dv.
    """
    like = broadcast_dual("attention", query, key, value)
    if like.ndim < 3 or any(x.ndim != like.ndim for x in (query, key, value)):
        raise no_rule("attention without a batch dimension in query, key and value")
    if dropout_p or enable_gqa or isinstance(attn_mask, Dual):
        raise no_rule("attention with dropout_p, enable_gqa or a mask that has a tangent")
    how = {"attn_mask": attn_mask, "is_causal": is_causal, "scale": scale}
    out = F.scaled_dot_product_attention(*map(value_of, (query, key, value)), **how)

    def tangent() -> Tensor:
        factor = query.shape[-1] ** -0.5 if scale is None else scale
        q, k, v = (matching_rows(x, like) for x in (query, key, value))
        p = _attention_matrix((q @ k.mT) * factor, matching_rows(attn_mask, like), is_causal)  # (n, …, T, T)
        ds = [lowered(query.tangent) @ lowered(k).mT] if isinstance(query, Dual) else []
        ds += [lowered(q) @ lowered(key.tangent).mT] if isinstance(key, Dual) else []
        parts = []
        if ds:
            ds = reduce(add, ds) * factor
            dp = p * (ds - (p * ds).sum(-1, keepdim=True))
            parts.append(lowered(dp.to(v.dtype)) @ lowered(v))
        if isinstance(value, Dual):
            parts.append(lowered(p.to(v.dtype)) @ lowered(value.tangent))
        return reduce(add, parts).to(v.dtype)

    return dual(out, tangent)


def _attention_matrix(scores: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """softmax(scores + mask); rows that may attend to nothing are 0, as in PyTorch."""
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is None:
        return torch.softmax(scores, dim=-1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    return aten._safe_softmax(scores, -1)
