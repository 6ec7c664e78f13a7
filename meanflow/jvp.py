"""u and du/dt: for which rows, by which method, compiled or not.

An objective calls `jvp(u, (z, r, t), (dz, dr, dt), rows=…, **cond)`. Rows that need no derivative are moved behind the
others, so that tangents cover the first n rows of a batch only.
"""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from meanflow.dual import Dual, value_of

Network = Callable[..., Tensor]  # u(z, r, t, **cond); with several heads it may return a tuple (u, …)
Value = Tensor | tuple[Tensor, ...]
METHODS = ("dual", "func")
PARTS = 8  # of a batch: on GPUs and in compiled code the number of rows with a derivative is rounded up to eighths


def value_and_jvp(
    u: Network,
    primals: tuple[Tensor, Tensor, Tensor],
    tangents: tuple[Tensor, float, float],
    *,
    rows: Tensor,
    take: Callable | None = None,
    **cond: Tensor | str | None,
) -> tuple[Value, Tensor]:
    """u(z, r, t, **cond) with its graph, and its derivative along `tangents` without one, both (B, …).

    primals (z, r, t): (B, …), (B,), (B,). tangents (dz, dr, dt): (B, …) and two numbers. rows (B,) bool, best on the
    CPU: where the derivative is needed; elsewhere it is zero and costs nothing. take: `dual_jvp`, `func_jvp`, or one of
    them compiled. A network with several heads returns a tuple (u, …): so does this, as ((u, …), du/dt). What is no
    tensor in `cond`, such as the name of a head, reaches the network as it is.
    """
    (z, r, t), (dz, dr, dt) = primals, tangents
    r, t = r.to(z, non_blocking=True), t.to(z, non_blocking=True)
    order, n = rows_first(rows)
    if order is not None:
        z, r, t, dz = (_select(y, order) for y in (z, r, t, dz))
        cond = {key: _select(y, order) for key, y in cond.items()}
    take = take or dual_jvp
    few_shapes = z.device.type != "cpu" or isinstance(take, CompiledDual)
    dz = _padded(dz, n, rounded_rows(n, len(z)) if few_shapes else n)
    value, tangent = take(u, z, r, t, (dz, dr, dt), cond)
    u_out = value[0] if isinstance(value, tuple) else value
    dudt = torch.zeros_like(u_out.detach(), dtype=tangent.dtype)
    dudt[:n] = tangent[:n]
    if order is None:
        return value, dudt
    back = torch.argsort(order)
    if isinstance(value, tuple):
        return tuple(_select(y, back) for y in value), _select(dudt, back)
    return _select(value, back), _select(dudt, back)


def take_jvp(method: str) -> Callable:
    """`value_and_jvp` by a method: "dual" (`meanflow.dual`: explicit rules, one pass, no second graph) or "func"
    (`torch.func.jvp`: any differentiable network, more memory). Raises ValueError for another name."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    return functools.partial(value_and_jvp, take=dual_jvp if method == "dual" else func_jvp)


def rows_first(rows: Tensor) -> tuple[Tensor | None, int]:
    """A stable order (B,) that puts the rows where `rows` is true first, None if they are already; their number."""
    n = int(rows.sum())
    if rows[:n].all():
        return None, n
    return torch.argsort((~rows).to(torch.uint8), stable=True), n


def rounded_rows(n: int, batch: int) -> int:
    """n rounded up to eighths of the batch. Where it varies, each new shape costs time: cuDNN searches for the fastest
    algorithms again, about a second, and compiled code is compiled again."""
    part = -(-batch // PARTS)
    return min(-(-n // part) * part, batch)


def _padded(dz: Tensor, n: int, rows: int) -> Tensor:
    """The first n rows of dz (B, …), and zeros: (rows, …)."""
    if rows == n:
        return dz[:n]
    dz = dz[:rows].clone()
    dz[n:] = 0
    return dz


def _select(x: Tensor | str | None, order: Tensor) -> Tensor | str | None:
    return x[order.to(x.device)] if isinstance(x, Tensor) else x


# --- the two methods: (u, z, r, t, (dz (n, …), dr, dt), cond) → value (B, …), tangent (n, …) ----------------------


def dual_jvp(u, z, r, t, tangents, cond) -> tuple[Value, Tensor]:
    dz, dr, dt = tangents
    if len(dz) == 0:
        return u(z, r, t, **cond), dz

    def along(x: Tensor, speed: float) -> Tensor | Dual:
        return Dual(x, torch.full_like(x[: len(dz)], speed)) if speed else x

    out = u(Dual(z, dz), along(r, dr), along(t, dt), **cond)
    first = out[0] if isinstance(out, tuple) else out
    tangent = first.tangent if isinstance(first, Dual) else torch.zeros_like(dz)  # zero: a function of none of them
    return tuple(map(value_of, out)) if isinstance(out, tuple) else value_of(out), tangent


def func_jvp(u, z, r, t, tangents, cond) -> tuple[Value, Tensor]:
    """`torch.func.jvp` on the rows that need it, a plain pass on the rest."""
    dz, dr, dt = tangents
    n = len(dz)
    if n == 0:
        return u(z, r, t, **cond), dz

    def split(part: slice) -> dict:
        return {key: x[part] if isinstance(x, Tensor) else x for key, x in cond.items()}

    first, rest = slice(None, n), slice(n, None)
    where = (z[first], r[first].clone(), t[first].clone())  # views fail under torch.compile (2.14)
    speeds = (dz, torch.full_like(where[1], dr), torch.full_like(where[2], dt))

    def heads(*zrt: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        out = u(*zrt, **split(first))
        return (out[0], out[1:]) if isinstance(out, tuple) else (out, ())

    with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
        value, tangent, others = torch.func.jvp(heads, where, speeds, has_aux=True)
    values = (value, *others)
    if n < len(z):
        out = u(z[rest], r[rest], t[rest], **split(rest))
        values = tuple(map(torch.cat, zip(values, out if isinstance(out, tuple) else (out,), strict=True)))
    return values if others else values[0], tangent.detach()


# --- compiled --------------------------------------------------------------------------------------------------


def compiled_jvp(network: nn.Module, method: str, mode: str) -> Callable:
    """`value_and_jvp` of `network` alone, compiled at its first call; one more graph for each shape of batch.

    Value and derivative are one graph: PyTorch runs a compiled *network* eagerly, without a warning, inside its jvp.
    """
    if method == "dual":
        return functools.partial(value_and_jvp, take=CompiledDual(network, mode))
    return functools.partial(value_and_jvp, take=torch.compile(func_jvp, dynamic=False, fullgraph=True, mode=mode))


class CompiledDual:
    """`dual_jvp` of one function, compiled.

    torch.compile cannot trace dual numbers. torch.export runs the network on them once and records the plain operations
    that they turn into; that graph is compiled, one for each shape, and for training and evaluation mode.
    """

    def __init__(self, network: nn.Module, mode: str):
        self.network, self.mode = network, mode
        self.u: Network | None = None
        self.graphs: dict[tuple, Callable] = {}

    def __call__(self, u, z, r, t, tangents, cond) -> tuple[Value, Tensor]:
        if self.u is None:
            self.u = u
        if u is not self.u:
            raise ValueError("a compiled derivative is that of one function; set train.compile to null")
        dz, dr, dt = tangents
        # What is no tensor is part of the graph and no input of it.
        fixed = {name: y for name, y in cond.items() if not isinstance(y, Tensor | None)}
        cond = {name: y for name, y in cond.items() if name not in fixed}
        key = (tuple(z.shape), len(dz), dr, dt, self.network.training, *sorted(cond), *sorted(fixed.items()))
        if key not in self.graphs:
            module = _ValueAndTangent(self.network, functools.partial(u, **fixed) if fixed else u, dr, dt)
            self.graphs[key] = _compile(module, (z, r, t, dz, cond), self.mode)
        return self.graphs[key](z, r, t, dz, cond)


class _ValueAndTangent(nn.Module):
    """The module to export: `u` on dual numbers. Its parameters are those of `network`."""

    def __init__(self, network: nn.Module, u: Network, dr: float, dt: float):
        super().__init__()
        self.network, self.u, self.speeds = network, u, (dr, dt)

    def forward(self, z: Tensor, r: Tensor, t: Tensor, dz: Tensor, cond: dict[str, Tensor]) -> tuple[Value, Tensor]:
        return dual_jvp(self.u, z, r, t, (dz, *self.speeds), cond)


def _compile(module: nn.Module, inputs: tuple, mode: str) -> Callable:
    return torch.compile(plain_operations(module, inputs), dynamic=False, fullgraph=True, mode=mode)


def plain_operations(module: nn.Module, inputs: tuple) -> nn.Module:
    """`module` traced on these inputs into plain tensor operations; it shares the parameters of `module`."""
    exported = torch.export.export(module, inputs, strict=False)
    checked = "check_guards" in inspect.signature(exported.module).parameters  # not in PyTorch 2.8
    return exported.module(check_guards=False) if checked else exported.module()


# --- activation checkpointing ------------------------------------------------------------------------------------


def checkpointed(block: Callable, *inputs: Tensor | Dual) -> Tensor | Dual:
    """`block(*inputs)`, of which only the inputs are kept; the backward pass computes the rest again.

    Tangents are computed once: the second time each has no rows. Dropout masks are the same both times. The second time
    ends at the last tensor that the backward pass needs: a last layer, which needs its input alone, is not run again.
    """
    tangents = [x.tangent if isinstance(x, Dual) else None for x in inputs]

    def run(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        duals = [v if d is None else Dual(v, d) for v, d in zip(values, tangents, strict=True)]
        # The second time there are none, and they are not kept until then.
        tangents[:] = [None if d is None else d.new_empty(0, *d.shape[1:]) for d in tangents]
        out = block(*duals)
        return (out.value, out.tangent) if isinstance(out, Dual) else out

    out = checkpoint(run, *map(value_of, inputs), use_reentrant=False)
    return Dual(*out) if isinstance(out, tuple) else out
