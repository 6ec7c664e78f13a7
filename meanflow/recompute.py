"""Activation checkpointing that works with the derivative du/dt."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from meanflow.dual import Dual, value_of


def recomputed(block: nn.Module, *inputs: Tensor | Dual) -> Tensor | Dual:
    """`block(*inputs)`, of which only the inputs are kept; the backward pass computes the rest again.

    Tangents are computed once: the second time each has no rows. Dropout masks are the same both times.
    """
    tangents = [x.tangent if isinstance(x, Dual) else None for x in inputs]
    calls = 0

    def run(*values: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        rows = slice(None if calls == 1 else 0)
        duals = [v if d is None else Dual(v, d[rows]) for v, d in zip(values, tangents, strict=True)]
        out = block(*duals)
        return (out.value, out.tangent) if isinstance(out, Dual) else out

    out = checkpoint(run, *map(value_of, inputs), use_reentrant=False)
    return Dual(*out) if isinstance(out, tuple) else out
