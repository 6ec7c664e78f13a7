"""Rules of operations that move, select or join entries, or that depend on shapes and comparisons alone."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from meanflow.dual.number import Dual, as_tuple, dual, inner, linear, no_rule, rule, value_of


def _dims(dims: tuple) -> tuple[int, ...]:
    """Dimensions given one by one or as one tuple."""
    return tuple(dims[0]) if len(dims) == 1 and not isinstance(dims[0], int) else dims


# Methods of Tensor, each with whether its arguments leave the batch first and whole.
LINEAR = {
    "flatten": lambda x, start_dim=0, end_dim=-1: inner(x, start_dim),
    "unflatten": lambda x, dim, sizes: inner(x, dim),
    "transpose": lambda x, dim0, dim1: inner(x, dim0, dim1),
    "swapaxes": lambda x, axis0, axis1: inner(x, axis0, axis1),
    "swapdims": lambda x, dim0, dim1: inner(x, dim0, dim1),
    "movedim": lambda x, source, destination: inner(x, *as_tuple(source), *as_tuple(destination)),
    "moveaxis": lambda x, source, destination: inner(x, *as_tuple(source), *as_tuple(destination)),
    "permute": lambda x, *dims: _dims(dims)[0] % x.ndim == 0,
    "chunk": lambda x, chunks, dim=0: inner(x, dim),
    "split": lambda x, split_size, dim=0: inner(x, dim),
    "unbind": lambda x, dim=0: inner(x, dim),
    "select": lambda x, dim, index: inner(x, dim),
    "narrow": lambda x, dim, start, length: inner(x, dim),
    "index_select": lambda x, dim, index: inner(x, dim),
    "squeeze": lambda x, dim=None: inner(x, *as_tuple(dim)),
    "unsqueeze": lambda x, dim: dim % (x.ndim + 1) > 0,
    "flip": lambda x, *dims: inner(x, *_dims(dims)),
    "roll": lambda x, shifts, dims=None: inner(x, *as_tuple(dims)),
    "repeat": lambda x, *sizes: len(_dims(sizes)) == x.ndim and _dims(sizes)[0] == 1,
    "repeat_interleave": lambda x, repeats, dim=None: inner(x, dim),
    "tril": lambda x, diagonal=0: x.ndim > 2,
    "triu": lambda x, diagonal=0: x.ndim > 2,
}
for _name, _keeps_batch in LINEAR.items():
    rule(_name)(linear(getattr(Tensor, _name), _keeps_batch))
for _name in ("contiguous", "clone", "float", "double", "half", "bfloat16"):
    rule(_name)(linear(getattr(Tensor, _name)))


def _resizing(name: str) -> Callable:
    """view, expand and the like: the sizes are the value's, of which the tangent has fewer rows."""
    operation = getattr(Tensor, name)
    resize = Tensor.expand if name in ("expand", "expand_as", "broadcast_to") else Tensor.reshape

    def apply(x: Dual | Tensor, *sizes: Any) -> Dual | Tensor:
        value = operation(value_of(x), *map(value_of, sizes))
        if not isinstance(x, Dual):  # a constant that takes the shape of a Dual
            return value
        batch_moves = value.shape[:1] != x.shape[:1] or (resize is Tensor.expand and value.ndim > x.ndim)
        if batch_moves or value.dtype != x.dtype:
            raise no_rule(f"{name} that changes the batch dimension or the dtype")
        return dual(value, lambda: resize(x.tangent, x.rows, *value.shape[1:]))

    return apply


for _name in ("reshape", "view", "expand", "broadcast_to"):
    rule(_name)(_resizing(_name))
for _name in ("reshape_as", "view_as", "expand_as"):
    rule(_name, any_operand=True)(_resizing(_name))


@rule("to", "type_as", any_operand=True)
def to(x: Dual | Tensor, *args: Any, **kwargs: Any) -> Dual | Tensor:
    args = tuple(map(value_of, args))
    value = value_of(x).to(*args, **kwargs)
    if not isinstance(x, Dual) or not value.is_floating_point():  # rounding has derivative zero
        return value
    return dual(value, lambda: x.tangent.to(*args, **kwargs))


@rule("getitem")
def getitem(x: Dual, index: Any) -> Dual:
    parts = index if isinstance(index, tuple) else (index,)
    taken = sum(_dims_taken(part) for part in parts)
    whole = isinstance(parts[0], slice) and parts[0] == slice(None)
    if not whole and not (parts[0] is ... and taken < x.ndim):
        raise no_rule("indexing of the batch dimension")
    lists = sum(isinstance(part, Tensor | list) for part in parts)
    if lists > 1 or (lists and any(isinstance(part, int) for part in parts)):
        raise no_rule("indexing with several lists, which may move the batch dimension,")
    return dual(x.value[index], lambda: x.tangent[index])


def _dims_taken(part: Any) -> int:
    """How many dimensions an entry of an index consumes."""
    if isinstance(part, Tensor) and part.dtype == torch.bool:
        return part.ndim
    return int(part is not None and part is not ...)


@rule("gather")
def gather(x: Dual, dim: int, index: Tensor) -> Dual:
    if not inner(x, dim) or index.shape[0] != x.shape[0]:
        raise no_rule("gather along the batch dimension")
    return dual(x.value.gather(dim, index), lambda: x.tangent.gather(dim, index[: x.rows]))


def _join(name: str, operation: Callable, more_dims: bool) -> None:
    @rule(name, any_operand=True)
    def apply(tensors: list, dim: int = 0) -> Dual:
        like = next(x for x in tensors if isinstance(x, Dual))
        if dim % (like.ndim + more_dims) == 0:
            raise no_rule(f"{name} along the batch dimension")

        def tangent() -> Tensor:
            parts = [x.tangent if isinstance(x, Dual) else torch.zeros_like(x[: like.rows]) for x in tensors]
            return operation(parts, dim)

        return dual(operation([value_of(x) for x in tensors], dim), tangent)


for _name in ("cat", "concat", "concatenate", "stack"):
    _join(_name, getattr(torch, _name), more_dims=_name == "stack")


# Operations with zero derivative, or whose result is not a tensor. `detach` has zero derivative in torch.func.jvp too.
CONSTANT = (
    *("dim", "numel", "stride", "is_contiguous", "is_floating_point", "is_complex"),
    *("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like"),
    *("new_zeros", "new_ones", "new_full", "new_empty", "new_tensor"),
    *("lt", "le", "gt", "ge", "eq", "ne", "isnan", "isinf", "isfinite", "argmax", "argmin"),
    *("sign", "floor", "ceil", "round", "trunc", "int", "long", "bool", "detach"),
)


def _of_value(name: str) -> Callable:
    operation = getattr(Tensor, name, None) or getattr(torch, name)
    return lambda *args, **kwargs: operation(*map(value_of, args), **kwargs)


for _name in CONSTANT:
    rule(_name, any_operand=True)(_of_value(_name))
