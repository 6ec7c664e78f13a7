"""Rules of reductions and normalisation: sums, extrema, norms, softmax, layers such as group norm."""

import math
from collections import namedtuple
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from meanflow.dual.number import Dual, as_tuple, check_inner, dual, inner, linear, no_rule, rule

aten = torch.ops.aten

LINEAR = {
    torch.sum: lambda x, dim=None, keepdim=False, dtype=None: inner(x, *as_tuple(dim)),
    torch.mean: lambda x, dim=None, keepdim=False, dtype=None: inner(x, *as_tuple(dim)),
    torch.cumsum: lambda x, dim, dtype=None: inner(x, dim),
}
for _operation, _keeps_batch in LINEAR.items():
    rule(_operation.__name__)(linear(_operation, _keeps_batch))

Extremum = namedtuple("Extremum", "values indices")


def _extremum(name: str, of_two: Callable) -> None:
    operation = getattr(torch, name)

    @rule(name, any_operand=True)
    def apply(x, dim=None, keepdim: bool = False) -> Dual | Extremum:
        if isinstance(dim, Tensor | Dual):
            return of_two(x, dim)
        check_inner(name, x, dim)
        value, indices = operation(x.value, dim, keepdim=True)

        def shape(y: Tensor) -> Tensor:
            return y if keepdim else y.squeeze(dim)

        out = dual(shape(value), lambda: shape(x.tangent.gather(dim, indices[: x.rows])))
        return Extremum(out, shape(indices))


for _name, _of_two in {"max": torch.maximum, "min": torch.minimum}.items():
    _extremum(_name, _of_two)


def _reduction(name: str, weight: Callable) -> None:
    """The tangent is a weighted sum over `dim`. `weight(x, y)`, where the output y (n, …) keeps the dimensions as 1."""
    operation = getattr(torch, name)

    @rule(name)
    def apply(x: Dual, dim: int | tuple | None = None, keepdim: bool = False) -> Dual:
        check_inner(name, x, *as_tuple(dim))
        value = operation(x.value, dim, keepdim)

        def tangent() -> Tensor:
            w = weight(x.primal_rows, operation(x.primal_rows, dim, True), dim)
            return (w * x.tangent).sum(dim, keepdim)

        return dual(value, tangent)


def _where_equal(x: Tensor, y: Tensor, dim: int | tuple) -> Tensor:
    """Equal maxima share the derivative equally, as in PyTorch."""
    equal = x == y
    return equal / equal.sum(dim, keepdim=True)


for _name, _weight in {
    "amax": _where_equal,
    "amin": _where_equal,
    "logsumexp": lambda x, y, dim: torch.exp(x - y),
}.items():
    _reduction(_name, _weight)


def _spread(name: str) -> None:
    operation = getattr(torch, name)

    @rule(name)
    def apply(
        x: Dual, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction: float | None = None
    ) -> Dual:
        if isinstance(dim, bool) or not inner(x, *as_tuple(dim)):
            raise no_rule(f"{name} over the batch dimension")
        correction = int(unbiased) if correction is None else correction
        value = operation(x.value, dim, correction=correction, keepdim=keepdim)

        def tangent() -> Tensor:
            centred = x.primal_rows - x.primal_rows.mean(dim, keepdim=True)
            freedom = math.prod(x.shape[d] for d in as_tuple(dim)) - correction
            dvar = 2 * (centred * x.tangent).sum(dim, keepdim) / freedom
            return dvar if name == "var" else _or_zero(dvar, 2 * value.detach()[: x.rows])

        return dual(value, tangent)


for _name in ("var", "std"):
    _spread(_name)


@rule("var_mean")
def var_mean(x: Dual, dim=None, unbiased: bool = True, keepdim: bool = False, *, correction=None) -> tuple[Dual, Dual]:
    if isinstance(dim, bool) or not inner(x, *as_tuple(dim)):
        raise no_rule("var_mean over the batch dimension")
    correction = int(unbiased) if correction is None else correction
    var, mean = torch.var_mean(x.value, dim, correction=correction, keepdim=True)

    def shape(y: Tensor) -> Tensor:
        return y if keepdim else y.squeeze(dim)

    def tangent() -> tuple[Tensor, Tensor]:
        centred = x.primal_rows - mean.detach()[: x.rows]
        freedom = math.prod(x.shape[d] for d in as_tuple(dim)) - correction
        return 2 * (centred * x.tangent).sum(dim, keepdim) / freedom, x.tangent.mean(dim, keepdim)

    return dual((shape(var), shape(mean)), tangent)


@rule("norm", "linalg_vector_norm", "linalg_norm")
def norm(x: Dual, p=2, dim=None, keepdim: bool = False, dtype=None, out=None, *, ord=None) -> Dual:
    order = p if ord is None else ord
    if order not in (2, "fro", None) or not inner(x, *as_tuple(dim)) or dtype is not None or out is not None:
        raise no_rule("norm other than the 2-norm over given dimensions, not the batch's,")
    value = torch.linalg.vector_norm(x.value, 2, dim, keepdim)

    def tangent() -> Tensor:
        return _or_zero((x.primal_rows * x.tangent).sum(dim, keepdim), value.detach()[: x.rows])

    return dual(value, tangent)


def _or_zero(dx: Tensor, y: Tensor) -> Tensor:
    """dx / y, and 0 where y is 0: what PyTorch takes for the derivative of a square root at 0."""
    return torch.where(y == 0, 0, dx / y)


@rule("normalize")
def normalize(input: Dual, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out=None) -> Dual:
    return input / input.norm(p, dim, keepdim=True).clamp_min(eps)


@rule("softmax")
def softmax(x: Dual, dim: int | None = None, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Dual:
    """The Jacobian diag(y) − y yᵀ is symmetric: the kernel of the backward pass serves."""
    check_inner("softmax", x, dim)
    value = torch.softmax(x.value, dim, dtype=dtype)

    def tangent() -> Tensor:
        return aten._softmax_backward_data(x.tangent.to(value.dtype), value.detach()[: x.rows], dim, value.dtype)

    return dual(value, tangent)


@rule("log_softmax")
def log_softmax(x: Dual, dim: int | None = None, dtype: torch.dtype | None = None, _stacklevel: int = 3) -> Dual:
    check_inner("log_softmax", x, dim)
    value = torch.log_softmax(x.value, dim, dtype=dtype)

    def tangent() -> Tensor:
        dx = x.tangent.to(value.dtype)
        return dx - (value.detach()[: x.rows].exp() * dx).sum(dim, keepdim=True)

    return dual(value, tangent)


# --- normalisation -----------------------------------------------------------------------------------------------
# The Jacobian of x ↦ (x − mean)/std is symmetric, so the fused kernel that pulls gradients back through it also
# pushes tangents forward; the affine weight comes after. Statistics are float32 under autocast.


def _float32_under_autocast(x: Tensor) -> Tensor:
    autocast = x.device.type != "meta" and torch.is_autocast_enabled(x.device.type)  # which asking of meta raises
    return x.float() if autocast else x


def _kernel_format(x: Tensor) -> torch.memory_format:
    """The memory format that the fused group norm takes `x` in: channels_last on CPUs alone (as F.group_norm does)."""
    channels_last = x.ndim == 4 and x.device.type == "cpu" and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


@rule("group_norm")
def group_norm(input: Dual, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Dual:
    x, rows = _float32_under_autocast(input.value), input.rows
    memory_format = _kernel_format(x)
    x = x.contiguous(memory_format=memory_format)
    channels, positions = x.shape[1], x.shape[2:].numel()
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
    _check_normalized("layer_norm", input, normalized_shape)
    x, rows = _float32_under_autocast(input.value).contiguous(), input.rows
    value, mean, rstd = torch.native_layer_norm(x, normalized_shape, weight, bias, eps)

    def tangent() -> Tensor:
        dx = input.tangent.to(x.dtype).contiguous()
        rest = list(normalized_shape), *(part.detach()[:rows] for part in (mean, rstd)), None, None
        out = aten.native_layer_norm_backward(dx, x.detach()[:rows], *rest, [True, False, False])[0]
        return out if weight is None else out.mul_(weight.detach())

    return dual(value, tangent)


def _check_normalized(name: str, input: Dual, normalized_shape: tuple[int, ...]) -> None:
    if len(normalized_shape) >= input.ndim:
        raise no_rule(f"{name} over the batch dimension")


@rule("rms_norm")
def rms_norm(input: Dual, normalized_shape, weight=None, eps: float | None = None) -> Dual:
    """y = x ρ w with ρ = (mean x² + ε)^(−1/2):  dy = ρ (dx − x ρ² mean(x dx)) w."""
    _check_normalized("rms_norm", input, normalized_shape)
    dims = tuple(range(-len(normalized_shape), 0))

    def tangent() -> Tensor:
        dtype = torch.promote_types(input.dtype, torch.float32)
        x, dx = input.primal_rows.to(dtype), input.tangent.to(dtype)
        small = torch.finfo(input.dtype).eps if eps is None else eps
        mean_square = torch.linalg.vector_norm(x, dim=dims, keepdim=True).square() / math.prod(normalized_shape)
        rho = torch.rsqrt(mean_square + small)
        along_x = rho.pow(3) * (x * dx).mean(dims, keepdim=True)
        out = (dx * rho).addcmul_(x, along_x, value=-1)
        return out if weight is None else out.mul_(weight.detach())

    return dual(F.rms_norm(input.value, normalized_shape, weight, eps), tangent)


def _by_running_statistics(value: Tensor, input: Dual, mean: Tensor, var: Tensor, weight, eps: float) -> Dual:
    """Normalisation by statistics that do not depend on the input: the tangent is only scaled."""
    slope = None if weight is None else weight.detach()
    return dual(value, lambda: F.batch_norm(input.tangent, torch.zeros_like(mean), var, slope, None, False, 0.0, eps))


@rule("batch_norm")
def batch_norm(
    input: Dual, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps: float = 1e-5
) -> Dual:
    if training or running_mean is None:
        raise no_rule("batch_norm in training, which mixes the samples of a batch,")
    value = F.batch_norm(input.value, running_mean, running_var, weight, bias, False, momentum, eps)
    return _by_running_statistics(value, input, running_mean, running_var, weight, eps)


@rule("instance_norm")
def instance_norm(
    input: Dual,
    running_mean=None,
    running_var=None,
    weight=None,
    bias=None,
    use_input_stats=True,
    momentum=0.1,
    eps: float = 1e-5,
) -> Dual:
    if use_input_stats and running_mean is not None:
        raise no_rule("instance_norm that updates running statistics")
    value = F.instance_norm(input.value, running_mean, running_var, weight, bias, use_input_stats, momentum, eps)
    if not use_input_stats:
        return _by_running_statistics(value, input, running_mean, running_var, weight, eps)
    rows = Dual(input.primal_rows, input.tangent)  # a group norm with a group for each channel
    return dual(value, lambda: group_norm(rows, input.shape[1], weight, None, eps).tangent)
