"""The picture of `eval.toy2d`: Figures 2 and 3 of the paper in one column of fields per t, and samples below.

Arrows point the way that samples go, from noise to data: they show −v and −u. All fields have the same scale, and
arrows are drawn where z_t is found.
"""

from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from torch import Tensor

from eval.reports.curves import COLOURS
from eval.toy.mixture import Mixture, instantaneous
from eval.toy.train import DrawConfig, Toy2dConfig
from meanflow.errors import write_errors_named
from meanflow.jvp import Network
from meanflow.objectives.base import interpolate
from meanflow.random import generator
from meanflow.sampling import sample

BLUE, ORANGE, GREEN, GREY = COLOURS[0], COLOURS[1], COLOURS[2], COLOURS[5]  # v, trained u, true u, noise
DATA = "#b03a3a"
ARROW = {"angles": "xy", "scale_units": "xy", "width": 0.0055, "headwidth": 3.6, "headlength": 4.2, "pivot": "tail"}
SHRINK = 5.0  # an arrow is this much shorter than the velocity it shows
RARE = 0.01  # fraction of the z_t that lie where no arrow is drawn
PIXELS = 100  # a side of the densities
SHADES = (0.02, 0.1, 0.25, 0.4, 0.55, 0.7, 0.85, 1.0)  # of their maximum
MEETING = (0.9, 0.1)  # the point z_t, at t = 0.5, that the first panel looks at
MEETING_PATHS, ENDS = 8, 300
PATHS, LONG = 60, 0.9  # of the flow; how long both arrows at the chosen one are at least
PERCENT = (1, 2, 5, 10, 20, 50, 100, 200)


def draw(u: Network, mixture: Mixture, config: Toy2dConfig, numbers: dict, path: Path) -> None:
    """Write the figure. `numbers` holds "error" and "distance". Raises AssetError if it cannot be written."""
    draws = generator(config.seed, "draw")
    figure, axes = plt.subplots(4, 4, figsize=(11, 11.5), layout="constrained")
    conditional_panel(axes[0, 0], mixture, draws)
    average_panel(axes[1, 0], mixture, draws)
    error_panel(axes[2, 0], numbers["error"])
    for column, t in enumerate(config.draw.times, 1):
        field_panels(axes[:3, column], u, mixture, t, config.draw, draws)
    sample_panels(axes[3], u, mixture, config, numbers["distance"], draws)
    for axis in (*axes[:2].flat, *axes[2, 1:], *axes[3]):
        frame(axis, config.draw.half_width)
    try:
        with write_errors_named(path):
            figure.savefig(path, dpi=100)
    finally:
        plt.close(figure)


def frame(axis, half_width: float) -> None:
    axis.set(xlim=(-half_width, half_width), ylim=(-half_width, half_width), aspect="equal", xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set(color="#c8c8c8", linewidth=0.8)


def arrows(axis, z: Tensor, velocity: Tensor, colour: str, **options) -> None:
    """−velocity at z, both (n, 2)."""
    axis.quiver(*z.T.numpy(), *(-velocity).T.numpy(), color=colour, **{**ARROW, "scale": SHRINK, **options})


def noise_of(n: int, draws: torch.Generator) -> Tensor:
    return torch.randn(n, 2, generator=draws, dtype=torch.float64)


def field_panels(axes, u: Network, mixture: Mixture, t: float, config: DrawConfig, draws: torch.Generator) -> None:
    """v, the true and the trained u at t, with r = 0, on one grid of points over the density of z_t."""
    limit = config.half_width

    def plane(side: int) -> tuple[Tensor, Tensor]:
        line = torch.linspace(-limit, limit, side, dtype=torch.float64)
        z = torch.cartesian_prod(line, line)
        return z, mixture.log_density(z, torch.full((len(z),), t))

    density = plane(PIXELS)[1].exp().view(PIXELS, PIXELS).T.numpy()
    levels = [density.max() * share for share in SHADES]
    times = torch.full((2000,), t)
    likely = mixture.log_density(interpolate(mixture.sample(2000, draws), noise_of(2000, draws), times), times)
    z, log_density = plane(config.arrows)
    z = z[log_density > likely.quantile(RARE)]
    times = torch.full((len(z),), t)
    fields = (
        (f"$v(z,\\ t={t:g})$", BLUE, instantaneous(mixture)),
        (f"true $u(z,\\ r=0,\\ t={t:g})$", GREEN, mixture.average_velocity),
        (f"trained $u(z,\\ r=0,\\ t={t:g})$", ORANGE, u),
    )
    for axis, (title, colour, field) in zip(axes, fields, strict=True):
        axis.contourf(density, levels, extent=(-limit, limit, -limit, limit), cmap="Greys", vmax=2.5 * density.max())
        arrows(axis, z, field(z, torch.zeros_like(times), times), colour)
        axis.set_title(title, fontsize=10)


def conditional_panel(axis, mixture: Mixture, draws: torch.Generator) -> None:
    """Figure 2: pairs (x, ε) whose straight paths meet in one z_t, each with another velocity; v is their mean."""
    t, z = 0.5, torch.tensor([MEETING], dtype=torch.float64)
    x = mixture.sample(20000, draws)
    eps = (z - (1 - t) * x) / t
    posterior = (-eps.square().sum(1) / 2).exp()  # p(x | z_t) ∝ p(x) N(ε; 0, I)
    chosen = posterior.multinomial(MEETING_PATHS, generator=draws)
    axis.scatter(*noise_of(ENDS, draws).T, s=3, color=GREY, alpha=0.25, linewidths=0)
    axis.scatter(*x[:ENDS].T, s=3, color=DATA, alpha=0.3, linewidths=0)
    for start, end in zip(eps[chosen], x[chosen], strict=True):
        axis.plot(*zip(start, end, strict=True), color="#9a9a9a", linewidth=0.7, zorder=2)
    axis.scatter(*eps[chosen].T, s=14, color=GREY, zorder=3, label="ε")
    axis.scatter(*x[chosen].T, s=14, color=DATA, zorder=3, label="x")
    near = {"scale": 2.5, "zorder": 4}
    arrows(axis, z.expand(MEETING_PATHS, 2), (eps - x)[chosen], "#7f9fc4", width=0.007, **near)
    arrows(axis, z, mixture.velocity(z, torch.tensor([t])), BLUE, width=0.012, **near)
    axis.legend(loc="lower left", fontsize=8, frameon=False, handletextpad=0, borderpad=0.1, ncols=2, columnspacing=0.6)
    axis.set_title("conditional velocities $\\epsilon - x$, and $v$", fontsize=10)


def average_panel(axis, mixture: Mixture, draws: torch.Generator) -> None:
    """Figure 3, leftmost: paths of the flow. Where one strays most, v is its tangent, (t − r) u its displacement."""
    noise = noise_of(PATHS, draws)
    one = torch.ones(PATHS)
    paths = [noise]
    for t, r in pairwise(torch.linspace(1, 0, 25)):
        paths.append(mixture.flow(paths[-1], t * one, r * one))
    paths = torch.stack(paths)  # (25, PATHS, 2)
    for path in paths.unbind(1):
        axis.plot(*path.T, color="#b5b5b5", linewidth=0.6, zorder=1)
    axis.scatter(*paths[0].T, s=7, color=GREY, linewidths=0, zorder=2)
    axis.scatter(*paths[-1].T, s=7, color=DATA, linewidths=0, zorder=2)
    chord, v = noise - paths[-1], mixture.velocity(noise, one)  # chord = (t − r) u, for t = 1 and r = 0
    gone = noise - paths
    aside = (gone[..., 0] * chord[:, 1] - gone[..., 1] * chord[:, 0]).abs().amax(0) / chord.norm(dim=1)
    k = [int(torch.where((chord.norm(dim=1) > LONG) & (v.norm(dim=1) > LONG), aside, -1).argmax())]
    axis.plot(*paths[:, k].squeeze(1).T, color="black", linewidth=1.6, zorder=4)
    for name, velocity, colour in (("$v$", v, BLUE), ("$(t-r)\\,u$", chord, GREEN)):
        arrows(axis, noise[k], velocity[k], colour, scale=1.0, width=0.011, zorder=5)
        axis.plot([], [], color=colour, linewidth=2.5, label=name)
    axis.legend(loc="lower left", fontsize=8, frameon=False, borderpad=0.1, ncols=2)
    axis.set_title("paths of the flow, $r=0$, $t=1$", fontsize=10)


def error_panel(axis, lines: list[dict]) -> None:
    """The relative error by the length of the interval: of the trained u, and of v in its place."""
    lines = [line for line in lines if line["interval"]]
    middle = [sum(line["interval"]) / 2 for line in lines]
    axis.plot(middle[1:], [line["v"] for line in lines[1:]], "s-", color=BLUE, markersize=4, label="$v$ in its place")
    axis.plot(middle, [line["u"] for line in lines], "o-", color=ORANGE, markersize=4, label="trained $u$")
    axis.set_yscale("log")
    axis.set_title("relative error against the true $u$", fontsize=10)
    axis.set_xlabel("$t-r$", fontsize=9, labelpad=1)
    axis.tick_params(labelsize=8)
    low, high = axis.get_ylim()
    axis.set_yticks([p / 100 for p in PERCENT], [f"{p} %" for p in PERCENT])
    axis.minorticks_off()
    axis.set_ylim(low, high)
    axis.grid(alpha=0.25, linewidth=0.5)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=8, frameon=False)
    axis.set_box_aspect(1)


def sample_panels(axes, u: Network, mixture: Mixture, config: Toy2dConfig, distance: dict, draws) -> None:
    """What v and the trained u make of the same noise in the least and the most steps, over data."""
    noise = noise_of(config.draw.samples, draws)
    data = mixture.sample(config.draw.samples, draws)
    v = ("v", "$v$ by Euler", BLUE, instantaneous(mixture))
    few, many = config.measure.steps[0], config.measure.steps[-1]
    trained = ("u", "trained $u$", ORANGE, u)
    for axis, (kind, steps) in zip(axes, [(v, few), (v, many), (trained, few), (trained, many)], strict=True):
        key, name, colour, field = kind
        z = sample(field, noise, steps, sampler=config.objective.sampler if kind == "u" else "flow_map")
        axis.scatter(*data.T, s=3, color="#d9d9d9", linewidths=0)
        axis.scatter(*z.T, s=3, color=colour, alpha=0.6, linewidths=0)
        axis.set_title(f"{name}, {steps} step{'s' if steps > 1 else ''}", fontsize=10)
        axis.set_xlabel(f"distance to data {distance[key][str(steps)]:.3f}", fontsize=9)
