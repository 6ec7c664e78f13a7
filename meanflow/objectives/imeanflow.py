"""Improved MeanFlow, iMF (Geng et al. 2025, arXiv 2512.02012): MeanFlow as regression on the velocity, with guidance
as an input of the network.

V = u + (t − r) du/dt is v where u is the average velocity (Eq. 6 of MeanFlow), so V is regressed on the velocity.
The derivative is taken along the network's own velocity v̂, a function of z, in place of ε − x, which is none:

    V = u(z, r, t) + (t − r) sg(du/dt),  du/dt = v̂ ∂_z u + ∂_t u        L = φ(‖V − sg v_g‖²) + φ(‖v̂ − sg v_g‖²)
    v_g = (ε − x) + (1 − 1/ω) (v̂(z, t | ω, c) − v̂(z, t | ∅))            φ(a) = a / sg(a + c)^p

ω, and the interval [t_min, t_max] outside of which ω counts as 1, are drawn for each sample and shown to the network:
one training serves every guidance scale, and sampling chooses.
"""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Generator, Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from meanflow.guidance import GuidanceConfig, drop_labels
from meanflow.jvp import Network, value_and_jvp
from meanflow.objectives.base import (
    Loss,
    Objective,
    adaptive_weight,
    by_rows,
    check_weight,
    interpolate,
    on_rows,
    per_row,
    squared_norm,
    without_gradient,
)
from meanflow.times import Times

V_HEAD, BOUNDARY = "v_head", "boundary"
INPUTS = ("omega", "t_min", "t_max")  # of a network that takes guidance as an input


@dataclass(frozen=True)
class IMeanFlow(Objective):
    """Settings default to the paper's. Raises ValueError, naming the field, for impossible ones."""

    kind: Literal["imeanflow"] = "imeanflow"
    times: Times = field(default_factory=lambda: Times(ratio=0.5))  # how (r, t) are drawn
    p: float = 1.0  # power of the adaptive weight φ, ≥ 0: 0 is squared L2
    c: float = 1e-2  # its constant, > 0
    velocity: str = V_HEAD  # v̂: v_head, a second output of the network, trained beside u; boundary: u(z, t, t)
    omega_max: float = 8.0  # guidance scales ω in [1, omega_max] are an input of the network; 1: no guidance, no input
    omega_beta: float = 1.0  # ω is drawn with a density ∝ ω^−omega_beta: 0 is uniform, 1 uniform in log ω
    t_split: float = 0.5  # guided in [t_min, t_max], t_min ~ U(0, t_split), t_max ~ U(t_split, 1)
    label_drop: float = 0.1  # where ω is an input: probability that a sample is trained without its label, in [0, 1)
    needs_jvp = True
    needs_frozen = True
    titles = Objective.titles | {
        "loss": "training loss (weighted: flat by design near p = 1)",
        "error": "squared error ‖V − v_g‖², all samples (unweighted)",
        "error_r_eq_t": "squared error at r = t: ‖u − v_g‖²",
        "error_r_lt_t": "squared error at r < t: ‖V − v_g‖²",
        "error_v_head": "squared error of the v-head ‖v̂ − v_g‖²",
    }

    def sample_times(self, n: int, generator: Generator | None) -> tuple[Tensor, Tensor]:
        return self.times.sample(n, generator)

    def loss(
        self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, frozen=None, **cond
    ) -> Loss:
        z = interpolate(x, eps, t)  # (1 − t) x + t ε
        v = eps - x if v is None else v
        frozen = without_gradient(u) if frozen is None else frozen
        v_hat, v_g, cond = self._velocities(frozen, z, v, r, t, **cond)  # (B, …) each, without graph
        head = {"head": "both"} if self.velocity == V_HEAD else {}
        out, dudt = jvp(u, (z, r, t), (v_hat, 0.0, 1.0), rows=r != t, **head, **cond)  # dudt is 0 where r = t
        u_out, v_out = out if head else (out, None)

        V = u_out + (per_row(t, x) - per_row(r, x)) * dudt  # the compound prediction
        error = squared_norm(V - v_g)  # (B,)
        loss, logged = self._weighted(error), by_rows(error, r, t)
        if v_out is not None:
            error_v = squared_norm(v_out - v_g)
            loss, logged = loss + self._weighted(error_v), {**logged, "error_v_head": error_v.detach()}
        return Loss(loss, logged)

    def _weighted(self, error: Tensor) -> Tensor:
        return adaptive_weight(error, self.p, self.c) * error

    def _velocities(self, frozen: Network, z: Tensor, v: Tensor, r: Tensor, t: Tensor, **cond):
        """(v̂, the tangent; v_g, the target; what the network is conditioned on in training): see `_guided`."""
        head = {"head": "v"} if self.velocity == V_HEAD else {}
        if self.omega_max > 1:
            if missing := [name for name in (*INPUTS, "unconditional", "null_labels") if name not in cond]:
                raise ValueError(f"needs {', '.join(missing)}: pass what sample_cond draws, or set omega_max=1")
            return self._guided(frozen, z, v, t, head, **cond)
        return on_rows(frozen, r != t, z, t, t, **head, **cond).to(v.dtype), v, cond  # no derivative where r = t

    @staticmethod
    def _guided(
        frozen, z, v, t, head, *, class_labels, omega, t_min, t_max, unconditional, null_labels, **cond
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """v̂(z, t | ω′, c) and v̂(z, t | ∅) in one pass of twice the batch; ω′ is ω inside the interval and 1 outside."""
        t, omega, t_min, t_max = (y.to(z, non_blocking=True) for y in (t, omega, t_min, t_max))
        labels = torch.where(unconditional, null_labels, class_labels)
        scale = torch.where((t_min <= t) & (t <= t_max), omega, 1)  # ω′ (B,)
        twice = {key: torch.cat([y, y]) for key, y in {"z": z, "t": t, **cond}.items()}
        inputs = {
            "class_labels": torch.cat([labels, null_labels]),
            "omega": torch.cat([scale, torch.ones_like(scale)]),
            "t_min": torch.zeros_like(twice["t"]),
            "t_max": torch.ones_like(twice["t"]),
        }
        z, t = twice.pop("z"), twice.pop("t")
        v_c, v_null = frozen(z, t, t, **head, **inputs, **twice).to(v.dtype).chunk(2)
        weight = torch.where(unconditional, 0, 1 - 1 / scale)  # without a label there is nothing to guide to
        v_g = v + per_row(weight, v) * (v_c - v_null)
        return v_c, v_g, {**cond, "class_labels": labels, "omega": omega, "t_min": t_min, "t_max": t_max}

    def sample_cond(self, r: Tensor, t: Tensor, classes: int, generator: Generator | None) -> dict[str, Tensor]:
        """Where ω is an input: `INPUTS`, which samples are unconditional, and the class that stands for none."""
        if self.omega_max <= 1:
            return {}
        u, low, high = torch.rand(3, len(t), generator=generator)
        r_eq_t, power = r == t, 1 - self.omega_beta
        if abs(power) < 1e-6:
            log_omega = u * math.log(self.omega_max)
        else:
            log_omega = torch.log1p(u * math.expm1(power * math.log(self.omega_max))) / power
        return {
            "omega": log_omega.exp().clamp(1, self.omega_max),
            "t_min": torch.where(r_eq_t, 0, self.t_split * low),
            "t_max": torch.where(r_eq_t, 1, self.t_split + (1 - self.t_split) * high),
            "unconditional": drop_labels(r, t, GuidanceConfig(label_drop=self.label_drop), generator),
            "null_labels": torch.full((len(t),), classes),
        }

    def plain(
        self, u, x, eps, r, t, v=None, *, class_labels=None, omega=None, t_min=None, t_max=None, unconditional=None,
        null_labels=None, **cond,
    ) -> Tensor:  # fmt: skip
        """The specification: the paper's algorithm, one `torch.func.jvp` of the whole batch. Returns (B,)."""
        r, t = r.to(x), t.to(x)
        time, one = t.view(-1, *[1] * (x.ndim - 1)), torch.ones_like(t)
        z = (1 - time) * x + time * eps
        v = eps - x if v is None else v
        guided = omega is not None
        if guided:
            omega, t_min, t_max = (y.to(x) for y in (omega, t_min, t_max))
            class_labels = torch.where(unconditional, null_labels, class_labels)
        if class_labels is not None:
            cond["class_labels"] = class_labels

        def v_hat(omega=None, **labels):
            everywhere = {"omega": omega, "t_min": 0 * one, "t_max": one} if guided else {}
            head = {"head": "v"} if self.velocity == V_HEAD else {}
            with torch.no_grad():
                return u(z, t, t, **cond | labels, **everywhere, **head)

        v_c = v_hat(omega)
        v_g = v
        if guided:
            v_null = v_hat(one, class_labels=null_labels)
            inside = (t_min <= t) & (t <= t_max)
            omega_t = torch.where(inside, omega, 1.0)  # ω′
            of_r_eq_t = v + (1 - 1 / omega).view_as(time) * (v_c - v_null)
            v_c = torch.where((r == t).view_as(time), v_c, v_hat(omega_t))  # where r = t the interval is [0, 1]
            of_r_lt_t = v + (1 - 1 / omega_t).view_as(time) * (v_c - v_null)
            v_g = torch.where((r == t).view_as(time), of_r_eq_t, of_r_lt_t)
            v_g = torch.where(unconditional.view_as(time), v, v_g)
            cond |= {"omega": omega, "t_min": t_min, "t_max": t_max}

        def heads(z, r, t):
            return u(z, r, t, head="both", **cond) if self.velocity == V_HEAD else (u(z, r, t, **cond), None)

        def u_and_v(z, r, t):
            u_out, v_out = heads(z, r, t)
            return u_out, () if v_out is None else (v_out,)

        with sdpa_kernel(SDPBackend.MATH):  # the fused attention kernels have no forward-mode derivative
            tangent = (v_c, torch.zeros_like(r), one)
            u_out, dudt, v_out = torch.func.jvp(u_and_v, (z, r, t), tangent, has_aux=True)
        predictions = [u_out + (t - r).view_as(time) * dudt.detach(), *v_out]
        errors = [((prediction - v_g) ** 2).flatten(1).sum(1) for prediction in predictions]
        return sum(error / (error.detach() + self.c) ** self.p for error in errors)

    @property
    def varying_rows(self) -> bool:
        return self.times.varying_rows

    @property
    def passes(self) -> int:
        return 1 + (2 if self.omega_max > 1 else 1)

    @property
    def omega_range(self) -> tuple[float, float] | None:
        return (1.0, self.omega_max) if self.omega_max > 1 else None

    def check_network(self, inputs: tuple[str, ...], heads: tuple[str, ...], classes: int) -> None:
        if self.velocity == BOUNDARY and "v" in heads:
            raise ValueError(f"objective.velocity={BOUNDARY} trains no v-head: set model.v_head=false")
        if self.velocity == V_HEAD and "v" not in heads:
            raise ValueError(f"objective.velocity={V_HEAD} needs a network with a v-head: set it to {BOUNDARY}")
        if self.omega_max > 1 and not set(INPUTS) <= set(inputs):
            raise ValueError(
                f"objective.omega_max={self.omega_max:g} needs a network with the inputs {', '.join(INPUTS)}: "
                "set objective.omega_max=1 for no guidance"
            )
        if self.omega_max > 1 and not classes:
            raise ValueError(
                f"objective.omega_max={self.omega_max:g} is guidance, which needs classes: set model.classes to their "
                "number, or objective.omega_max=1"
            )

    def __post_init__(self):
        check_weight(self.p, self.c)
        if not 0 <= self.omega_beta <= 10:
            raise ValueError(f"omega_beta must be in [0, 10], got {self.omega_beta}")
        if self.velocity not in (V_HEAD, BOUNDARY):
            raise ValueError(f"velocity must be {V_HEAD} or {BOUNDARY}, got {self.velocity!r}")
        if self.omega_max < 1:
            raise ValueError(f"omega_max must be ≥ 1, got {self.omega_max}")
        if not 0 <= self.t_split <= 1:
            raise ValueError(f"t_split must be in [0, 1], got {self.t_split}")
        if not 0 <= self.label_drop < 1:
            raise ValueError(f"label_drop must be in [0, 1), got {self.label_drop}")
