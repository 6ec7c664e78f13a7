"""Errors of a trained u against the truth, and distances of its samples to data."""

import numpy as np
import torch
from torch import Tensor

from eval.toy.mixture import Mixture, instantaneous
from eval.toy.train import MeasureConfig, PlaneNetwork
from meanflow.errors import NumericsError
from meanflow.jvp import Network
from meanflow.objectives.base import interpolate
from meanflow.random import generator
from meanflow.sampling import sample

INTERVALS = ((0.0, 0.0), (0.0, 0.2), (0.2, 0.4), (0.4, 0.6), (0.6, 0.8), (0.8, 1.0), (1.0, 1.0))  # of t − r
FRESH_SETS = 8  # of data, whose distances to the data are averaged
DIRECTIONS = 64  # of the sliced distance, evenly over the half circle


def in_float64(network: PlaneNetwork) -> Network:
    """The float32 network as a function of float64 tensors, without a graph."""

    @torch.no_grad()
    def u(z: Tensor, r: Tensor, t: Tensor) -> Tensor:
        return network(z.float(), r.float(), t.float()).double()

    return u


def errors(u: Network, mixture: Mixture, config: MeasureConfig, seed: int) -> list[dict]:
    """For each range of t − r the relative error of u, and that of v in its place, against the ODE solver's u.

    √(Σ ‖û − u‖² / Σ ‖u‖²) over points z_t of the marginal paths, t − r even in its range and t in what that leaves;
    the last line is all of 0 ≤ t − r ≤ 1 evenly. Where r = t the truth is the closed form.
    """
    lines, sums = [], np.zeros(3)
    for number, (low, high) in enumerate(INTERVALS):
        draws = generator(seed, "error", number)
        interval, place = torch.rand(2, config.points, generator=draws, dtype=torch.float64)
        interval = low + (high - low) * interval
        r = (1 - interval) * place
        z = noised(mixture, r + interval, draws)
        truth = mixture.average_velocity(z, r, r + interval)
        wrong = u(z, r, r + interval) - truth, mixture.velocity(z, r + interval) - truth
        squares = [x.square().sum().item() for x in (*wrong, truth)]
        lines.append({"interval": [low, high], **_relative(squares)})
        if low < high:
            sums += squares
    return [*lines, {"interval": None, **_relative(sums)}]


def noised(mixture: Mixture, t: Tensor, draws: torch.Generator) -> Tensor:
    """One point z_t for each t (B,) of float64, (B, 2)."""
    x = mixture.sample(len(t), draws)
    return interpolate(x, torch.randn(x.shape, generator=draws, dtype=x.dtype), t)


def _relative(squares) -> dict[str, float]:
    u, v, truth = squares
    return {"u": float((u / truth) ** 0.5), "v": float((v / truth) ** 0.5)}


def distances(u: Network, mixture: Mixture, config: MeasureConfig, seed: int, sampler: str = "flow_map") -> dict:
    """The sliced Wasserstein distance of samples to fresh data, by NFE, beside that of exact flow and of fresh data.

    All start from the same noise: u by its objective's `sampler`, mostly Eq. (12); v by Euler's method, which is
    Eq. (12) with v in u's place.
    """
    data = mixture.sample(config.samples, generator(seed, "data"))
    fresh = [mixture.sample(config.samples, generator(seed, "fresh", k)) for k in range(FRESH_SETS)]
    noise = torch.randn(data.shape, generator=generator(seed, "noise"), dtype=data.dtype)
    one, zero = torch.ones(len(noise)), torch.zeros(len(noise))
    v = instantaneous(mixture)
    return {
        "fresh data": sum(sliced_wasserstein(other, data) for other in fresh) / FRESH_SETS,
        "exact flow": sliced_wasserstein(mixture.flow(noise, one, zero), data),
        "u": {str(n): sliced_wasserstein(sample(u, noise, n, sampler=sampler), data) for n in config.steps},
        "v": {str(n): sliced_wasserstein(sample(v, noise, n), data) for n in config.steps},
    }


def sliced_wasserstein(a: Tensor, b: Tensor) -> float:
    """√ of the mean over directions of W₂² between projections: a, b (N, 2). Exact in each direction, by sorting.

    Raises NumericsError if a point is not finite.
    """
    if not (a.isfinite().all() and b.isfinite().all()):
        raise NumericsError("samples are not finite: a smaller train.lr or more train.steps may help")
    angles = torch.arange(DIRECTIONS, dtype=a.dtype) * torch.pi / DIRECTIONS
    directions = torch.stack([angles.cos(), angles.sin()])  # (2, DIRECTIONS)
    projected = [(points @ directions).sort(0).values for points in (a, b)]
    return (projected[0] - projected[1]).square().mean().sqrt().item()


def closing_table(numbers: dict) -> str:
    distance = numbers["distance"]
    lines = [
        _row("relative error against the truth", "trained u", "v in its place"),
        *(_row(f"  {_interval(e['interval'])}", f"{e['u']:.2%}", f"{e['v']:.1%}") for e in numbers["error"]),
        "",
        _row("sliced Wasserstein distance to data", "trained u", "v by Euler"),
        *(_row(f"  {n}-NFE", f"{value:.4f}", f"{distance['v'][n]:.4f}") for n, value in distance["u"].items()),
        _row("  exact flow (ODE solver)", f"{distance['exact flow']:.4f}"),
        _row("  fresh data (real-vs-real)", f"{distance['fresh data']:.4f}"),
    ]
    return "\n".join(lines)


def _row(name: str, *values: str) -> str:
    return f"{name:<36}" + "".join(f"{value:>16}" for value in values)


def _interval(interval: list[float] | None) -> str:
    if interval is None:
        return "all of 0 ≤ t − r ≤ 1"
    low, high = interval
    if low < high:
        return f"t − r in [{low}, {high}]"
    return "r = t (closed form)" if low == 0 else "r = 0, t = 1 (one step)"
