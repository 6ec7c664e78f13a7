"""What every objective provides, and the few formulas that several of them share."""

import importlib
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Generator, Tensor

from meanflow.jvp import Network, rounded_rows, rows_first, value_and_jvp


@dataclass(frozen=True)
class Loss:
    """`per_sample` (B,) is what training averages. `logged`: further values for metrics.jsonl and the curves.

    A logged value is a tensor (B,), averaged over the samples, or a pair (values (B,), rows (B,) bool on the CPU),
    averaged over these rows alone and null in a step that has none. Values that are NaN or infinite may be logged;
    only the loss and the gradient must be finite.
    """

    per_sample: Tensor
    logged: dict[str, Tensor | tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def mean(self) -> Tensor:
        return self.per_sample.mean()


class Objective(ABC):
    """A training objective: a frozen dataclass of its settings, with a `kind` and the methods below.

    `needs_jvp`: whether `loss` calls `jvp`; `needs_frozen`: whether it is given `frozen`. `titles` explains logged
    values in curves. `plain(u, x, eps, r, t, v=None, **cond)` → (B,), where there is one, is the objective as printed
    in its paper, not optimised: the specification that tests and benchmarks compare `loss` with.

    `sampler`: how its networks are sampled, one of `meanflow.sampling.SAMPLERS`. `learns_velocity`: whether u(z, t, t)
    is trained, which guidance in the target evaluates. `same_dropout`: whether two passes of `loss` must have the same
    dropout mask, which compiled code does not promise.
    """

    needs_jvp: ClassVar[bool] = False
    needs_frozen: ClassVar[bool] = False
    sampler: ClassVar[str] = "flow_map"
    learns_velocity: ClassVar[bool] = True
    same_dropout: ClassVar[bool] = False
    titles: ClassVar[dict[str, str]] = {
        "error": "squared error ‖u − u_tgt‖², all samples (unweighted)",
        "error_r_eq_t": "squared error at r = t: ‖u − v‖², Flow Matching",
        "error_r_lt_t": "squared error at r < t: ‖u − u_tgt‖²",
    }
    plain: ClassVar[Callable | None] = None

    @classmethod
    def kinds(cls) -> dict[str, type["Objective"]]:
        """{kind: class} of every file in this folder. A new file adds its kind; there is no list to extend."""
        folder = importlib.import_module(__name__.rpartition(".")[0])
        found: dict[str, type[Objective]] = {}
        for info in pkgutil.iter_modules(folder.__path__):
            module = importlib.import_module(f"{folder.__name__}.{info.name}")
            for value in vars(module).values():
                defined_here = isinstance(value, type) and value.__module__ == module.__name__
                if not defined_here or not issubclass(value, Objective) or not isinstance(vars(value).get("kind"), str):
                    continue
                if found.setdefault(value.kind, value) is not value:
                    raise TypeError(
                        f"{module.__name__} and {found[value.kind].__module__} are both of kind {value.kind}"
                    )
        return dict(sorted(found.items()))

    @property
    def teacher_decay(self) -> float | None:
        """The EMA decay of the averaged network that `loss` is given as `teacher`, one of the recipe's ema.decays."""
        return None

    @property
    def passes(self) -> int:
        """What a sample with r < t costs beside the network's value, in forward passes: a derivative is one."""
        return int(self.needs_jvp)

    @property
    def varying_rows(self) -> bool:
        """Whether the number of rows with r ≠ t differs from batch to batch."""
        return False

    @property
    def omega_range(self) -> tuple[float, float] | None:
        """Guidance scales ω that the network is trained with as an input, from and to; None: ω is no input."""
        return None

    def check_network(self, inputs: tuple[str, ...], heads: tuple[str, ...], classes: int) -> None:
        """Raises ValueError, naming the setting to change, for a network that this objective cannot train.

        inputs: keywords besides the labels that it is conditioned on; heads: its outputs; classes: 0 for none.
        """
        if "v" in heads:
            raise ValueError(f"objective.kind={self.kind} trains no v-head: set model.v_head=false")

    def sample_cond(self, r: Tensor, t: Tensor, classes: int, generator: Generator | None) -> dict[str, Tensor]:
        """What else is random about n samples: keywords for `loss`, each (n, …) on the CPU, for these times (n,)."""
        return {}

    @abstractmethod
    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        """n pairs (r, t), each (n,) float32 on the CPU, 0 ≤ r ≤ t ≤ 1."""

    @abstractmethod
    def loss(
        self,
        u: Network,
        x: Tensor,
        eps: Tensor,
        r: Tensor,
        t: Tensor,
        *,
        v: Tensor | None = None,
        jvp: Callable = value_and_jvp,
        progress: float = 0.0,
        teacher: Network | None = None,
        frozen: Network | None = None,
        **cond: Tensor | None,
    ) -> Loss:
        """The loss of each sample.

        u(z, r, t, **cond): the network in training mode. x, eps (B, …): data in [−1, 1] and Gaussian noise.
        r ≤ t (B,) in [0, 1], best on the CPU: which rows have r ≠ t is then known without waiting for the device.
        v (B, …): the velocity field to learn from, by default the conditional ε − x; guidance passes its own (Eq. 21).
        jvp: how derivatives are taken, see `meanflow.jvp.value_and_jvp`. progress: k/K after k of K steps, in [0, 1).
        teacher(z, r, t, **cond): u by averaged weights, without dropout or gradient, where `teacher_decay` asks for it.
        frozen(z, r, t, **cond): u itself, without dropout or gradient; given only where `needs_frozen` asks for it.
        cond: what else the network takes, (B, …), and what `sample_cond` drew.
        """


def without_gradient(u: Network) -> Network:
    """u as a constant."""

    @torch.no_grad()
    def frozen(*args: Tensor, **cond: Tensor | str | None) -> Tensor:
        return u(*args, **cond)

    return frozen


def per_row(time: Tensor, x: Tensor) -> Tensor:
    """(B,) → (B, 1, …) on the device and in the dtype of x (B, …), to multiply it. Does not wait for the device."""
    return time.to(x, non_blocking=True).view(-1, *[1] * (x.ndim - 1))


def interpolate(x: Tensor, eps: Tensor, t: Tensor) -> Tensor:
    """z_t = (1 − t) x + t ε (Section 3): x, eps (B, …), t (B,) → (B, …)."""
    t = per_row(t, x)
    return (1 - t) * x + t * eps


def by_jvp(u: Network, jvp: Callable) -> Network:
    """u through `jvp` without a derivative: where `jvp` is compiled, `u` itself is not, and this is."""

    def value(z: Tensor, r: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
        nowhere = torch.zeros(len(z), dtype=torch.bool)
        return jvp(u, (z, r, t), (z, 0.0, 1.0), rows=nowhere, **cond)[0]

    return value


@torch.no_grad()
def on_rows(u: Network, rows: Tensor, z: Tensor, r: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
    """u(z, r, t, **cond) where `rows` (B,) is true, without gradient, and zero elsewhere at no cost: (B, …).

    rows, r, t (B,) best on the CPU. The number of rows is rounded up to eighths of the batch: few shapes are seen.
    """
    order, n = rows_first(rows)
    out = torch.zeros_like(z)
    if n == 0:
        return out
    m = rounded_rows(n, len(z))
    part = slice(m) if order is None else order[:m].to(z.device, non_blocking=True)
    value = u(*part_of((z, r.to(z, non_blocking=True), t.to(z, non_blocking=True)), part), **part_of(cond, part))
    value = value.to(z.dtype)
    if order is None:
        out[:n] = value[:n]
        return out
    return out.index_copy(0, part[:n], value[:n])


def part_of(values, part: slice | Tensor):
    """The rows `part` of each tensor in a tuple or dict; what is None stays so."""
    if isinstance(values, dict):
        return {name: y[part] if isinstance(y, Tensor) else y for name, y in values.items()}
    return tuple(y[part] for y in values)


def squared_norm(x: Tensor) -> Tensor:
    """‖x‖² of each sample, summed over all but the batch: (B, …) → (B,)."""
    return x.square().flatten(1).sum(1)


def adaptive_weight(error: Tensor, p: float, c: float) -> Tensor:
    """1 / (error + c)^p without graph (Eq. 22): (B,) → (B,)."""
    with torch.no_grad():
        return 1 / (error + c) ** p


def check_weight(p: float, c: float) -> None:
    """Raises ValueError, naming the setting, for an adaptive weight that is none."""
    if p < 0:
        raise ValueError(f"p must be ≥ 0, got {p}")
    if c <= 0:
        raise ValueError(f"c must be > 0, got {c}")


def weighted(values: Tensor, rows: Tensor, weight: float | Tensor) -> Tensor:
    """`values` (B,) times `weight` (a number or (B,)) where `rows` (B,) is true."""
    weight = torch.as_tensor(weight, dtype=values.dtype).to(values.device, non_blocking=True)
    return torch.where(rows.to(values.device, non_blocking=True), weight * values, values)


def by_rows(error: Tensor, r: Tensor, t: Tensor) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """An error (B,) for the log: over all rows, and separately where r = t and where r < t."""
    error = error.detach()
    return {"error": error, "error_r_eq_t": (error, r == t), "error_r_lt_t": (error, r != t)}
