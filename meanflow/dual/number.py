"""The dual number, the register of rules, and the parts that rules are built from."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor

from meanflow.errors import UserError

WAYS_OUT = (
    'set train.jvp: func for this network (as a library: method="func"), or register a rule (docs/own-network.md)'
)


class NoTangentRule(UserError, TypeError):
    """The network uses an operation, or a form of one, that `meanflow.dual` cannot differentiate."""


def no_rule(what: str) -> NoTangentRule:
    return NoTangentRule(f"{what} has no tangent rule in meanflow.dual; {WAYS_OUT}")


class Rule(NamedTuple):
    function: Callable
    any_operand: bool  # whether arguments other than the first may be Duals


RULES: dict[str, Rule] = {}
SEQUENCE = (list, tuple)


def rule(*names: str, any_operand: bool = False) -> Callable:
    """Register a function as the rule of the named operations. It takes what the operation takes.

    A name is that of the function or method (`func.__name__`), or "library.name" for one of `torch.ops`. The first
    argument is a Dual and the others are not, unless `any_operand`: then any of them may be, and the first may not.
    """

    def register(function: Callable) -> Callable:
        RULES.update(dict.fromkeys(names, Rule(function, any_operand)))
        return function

    return register


def apply_rule(name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Apply the rule of the operation `name`. Raises NoTangentRule if there is none for these arguments."""
    if name not in RULES:
        raise no_rule(name)
    if kwargs.get("inplace"):
        raise no_rule(f"{name} in place")
    function, any_operand = RULES[name]
    operands = (*args, *kwargs.values())
    given = _duals(operands)
    if not given or (not any_operand and (len(given) > 1 or given[0] is not operands[0])):
        raise no_rule(f"{name} with a tangent elsewhere than in its first argument")
    try:
        out = function(*args, **kwargs)
    except NoTangentRule:
        raise
    except TypeError as error:  # arguments that the rule does not know, such as `out`
        raise no_rule(f"{name} with these arguments ({str(error).partition(chr(10))[0]})") from error
    made = _duals((out,))
    first = given[0]
    if any(x.rows != first.rows or x.shape[:1] != first.shape[:1] for x in (*given[1:], *made)):
        raise no_rule(f"{name} that changes the number of samples")
    if made and not torch.is_grad_enabled() and any(x.requires_grad for x in given):
        raise no_rule(f"{name} under torch.no_grad or in an autograd.Function, where the value loses its graph,")
    return out


def _duals(args: tuple) -> list["Dual"]:
    """The Duals among `args` and in lists and tuples among them."""
    found = []
    for x in args:
        if isinstance(x, Dual):
            found.append(x)
        elif isinstance(x, SEQUENCE):
            found += [y for y in x if isinstance(y, Dual)]
    return found


def _operator(name: str, swapped: bool = False) -> Callable:
    def apply(self: "Dual", *others: Any) -> Any:
        return apply_rule(name, (*others, self) if swapped else (self, *others), {})

    return apply


class Dual:
    """`value` (B, …) and the `tangent` (n, …) of its first n = `rows` ≤ B rows. Dimension 0 is the batch, always."""

    __slots__ = ("rows", "tangent", "value")

    def __init__(self, value: Tensor, tangent: Tensor):
        (batch, *shape), (rows, *tangent_shape) = value.shape, tangent.shape
        if shape != tangent_shape or rows > batch:
            raise ValueError(
                f"a tangent of shape {tuple(tangent.shape)} does not fit a value of shape {tuple(value.shape)}"
            )
        self.value, self.tangent, self.rows = value, tangent, rows

    @property
    def primal_rows(self) -> Tensor:
        """The primal of the rows that have a tangent: (n, …), detached."""
        return self.value.detach()[: self.rows]

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if (getattr(func, "__module__", None) or "").startswith("torch._ops"):
            name = ".".join(str(func).split(".")[:2])  # library.name: another library's silu need not be silu
        else:
            name = func.__name__
            name = name.strip("_") if name.startswith("__") else name  # add_ is not add
        return apply_rule(name, args, kwargs or {})

    # Attributes of a tensor that networks use.
    shape = property(lambda self: self.value.shape)
    dtype = property(lambda self: self.value.dtype)
    device = property(lambda self: self.value.device)
    ndim = property(lambda self: self.value.ndim)
    requires_grad = property(lambda self: self.value.requires_grad)
    is_cuda = property(lambda self: self.value.is_cuda)
    mT = property(lambda self: self.transpose(-2, -1))

    def __getattr__(self, name: str):
        if name.startswith("__"):  # protocols that Python and libraries look for
            raise AttributeError(name)
        if name not in RULES:
            raise no_rule(f"Tensor.{name}")
        return lambda *args, **kwargs: apply_rule(name, (self, *args), kwargs)

    def size(self, dim: int | None = None):
        return self.value.shape if dim is None else self.value.shape[dim]

    def __len__(self) -> int:
        return len(self.value)

    __hash__ = object.__hash__
    __getitem__ = _operator("getitem")
    __add__ = __radd__ = _operator("add")
    __sub__, __rsub__ = _operator("sub"), _operator("sub", swapped=True)
    __mul__ = __rmul__ = _operator("mul")
    __truediv__, __rtruediv__ = _operator("div"), _operator("div", swapped=True)
    __pow__, __rpow__ = _operator("pow"), _operator("pow", swapped=True)
    __matmul__, __rmatmul__ = _operator("matmul"), _operator("matmul", swapped=True)
    __neg__, __abs__ = _operator("neg"), _operator("abs")
    __lt__, __le__, __gt__, __ge__ = _operator("lt"), _operator("le"), _operator("gt"), _operator("ge")
    __eq__, __ne__ = _operator("eq"), _operator("ne")
    # Without these Python would take x += y for x = x + y, and other names of the tensor x would keep the old value.
    __iadd__, __isub__, __imul__ = _operator("add_"), _operator("sub_"), _operator("mul_")
    __itruediv__, __ipow__, __setitem__ = _operator("div_"), _operator("pow_"), _operator("setitem")


# --- parts of rules ---------------------------------------------------------------------------------


def dual(value: Tensor | tuple, tangent: Callable[[], Tensor | tuple]) -> Any:
    """Pair a value, computed by the caller with its graph, with a tangent that is computed without one.

    `tangent()` takes detached operands: `x.tangent`, `x.primal_rows`, `matching_rows(constant, x)`. A tuple is paired
    with a tuple, entry by entry.
    """
    # Each change of the grad mode is a region of an exported graph, and an export's time grows with their square.
    with nullcontext() if torch.compiler.is_compiling() else torch.no_grad():
        tangents = tangent()
    if isinstance(value, SEQUENCE):
        return tuple(Dual(v, _matching(d, v)) for v, d in zip(value, tangents, strict=True))
    return Dual(value, _matching(tangents, value))


def _matching(tangent: Tensor, value: Tensor) -> Tensor:
    """Without a graph, in the precision of `value`: autocast may compute one of the two in another."""
    tangent = tangent.detach() if tangent.requires_grad else tangent
    return tangent if tangent.dtype == value.dtype else tangent.to(value.dtype)


_TANGENT_DTYPE: ContextVar[torch.dtype | None] = ContextVar("tangent_dtype", default=None)


@contextmanager
def tangents_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Inside, products in tangents are computed in `dtype`, values as ever. None: both alike."""
    token = _TANGENT_DTYPE.set(dtype)
    try:
        yield
    finally:
        _TANGENT_DTYPE.reset(token)


def lowered(x: Tensor) -> Tensor:
    """An operand of a product in a tangent, in the precision of `tangents_in`."""
    dtype = _TANGENT_DTYPE.get()
    return x if dtype is None else x.to(dtype)


def value_of(x: Any) -> Any:
    return x.value if isinstance(x, Dual) else x


def tangent_of(x: Any) -> Tensor | int:
    """The tangent of an operand, 0 of a constant."""
    return x.tangent if isinstance(x, Dual) else 0


def matching_rows(x: Any, like: Dual) -> Any:
    """The part of an operand that is combined with the first n rows of `like`, detached.

    A tensor that is broadcast over the batch passes whole, as numbers do.
    """
    if isinstance(x, Dual):
        return x.primal_rows
    if not isinstance(x, Tensor):
        return x
    x = x.detach()
    return x[: like.rows] if x.ndim == like.ndim and x.shape[0] == like.shape[0] else x


def broadcast_dual(name: str, *operands: Any) -> Dual:
    """One of the Duals among operands that are broadcast. Raises NoTangentRule if the batch would not stay first."""
    like = next(x for x in operands if isinstance(x, Dual))

    batch, ndim = like.value.shape[0], like.value.ndim

    def fits(x: Any) -> bool:
        if isinstance(x, Dual):
            return x is like or x.value.ndim == ndim
        if not isinstance(x, Tensor):
            return True
        return x.ndim < ndim or (x.ndim == ndim and x.shape[0] in (1, batch))

    if not all(map(fits, operands)):
        shapes = " and ".join(str(tuple(x.shape)) for x in operands if isinstance(x, Tensor | Dual))
        raise no_rule(f"{name} of shapes {shapes}, whose broadcasting would mix the samples of a batch,")
    return like


def as_tuple(dim: int | tuple | list | None) -> tuple:
    return tuple(dim) if isinstance(dim, tuple | list) else (dim,)


def inner(x: Dual, *dims: int | None) -> bool:
    """Whether `dims` are given and are not the batch dimension."""
    return bool(dims) and all(dim is not None and dim % x.ndim > 0 for dim in dims)


def check_inner(name: str, x: Dual, *dims: int | None) -> None:
    """Raises NoTangentRule unless `inner`."""
    if not inner(x, *dims):
        raise no_rule(f"{name} over the batch dimension")


def linear(operation: Callable, keeps_batch: Callable[..., bool] = lambda *_, **__: True) -> Callable:
    """The rule of an operation that is linear in its first argument: the tangent goes through the same operation.

    `keeps_batch` takes the arguments and says whether dimension 0 stays the batch and its samples apart.
    """

    def apply(x: Dual, *args: Any, **kwargs: Any) -> Any:
        if not keeps_batch(x, *args, **kwargs):
            raise no_rule(f"{operation.__name__} that moves, splits or mixes the batch dimension")
        return dual(operation(x.value, *args, **kwargs), lambda: operation(x.tangent, *args, **kwargs))

    return apply
