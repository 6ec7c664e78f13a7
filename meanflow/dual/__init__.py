"""Forward-mode derivatives as two plain tensors: a value that keeps its graph, a tangent that has none.

The MeanFlow target (Eq. 10) needs the *number* du/dt, never its gradient. `torch.func.jvp` records the tangent's
operations all the same and keeps forward gradients alive in every tensor saved for the backward pass: more than
twice the memory of Flow Matching. Here a `Dual` walks through an unchanged network by `__torch_function__`; each
operation computes its value as usual and advances the tangent beside it, under `no_grad`, from detached operands.

The tangent may cover only the first n rows of the batch (n ≤ B): samples with r = t need none. An operation without
a rule raises `NoTangentRule`; nothing is ever silently treated as constant. docs/own-network.md lists the operations
that have one and shows how to add another.
"""

from meanflow.dual import arithmetic, layers, reductions, shapes  # noqa: F401  they register their rules
from meanflow.dual.number import RULES, Dual, NoTangentRule, dual, matching_rows, rule, tangents_in, value_of

__all__ = ["RULES", "Dual", "NoTangentRule", "dual", "matching_rows", "rule", "tangents_in", "value_of"]
