"""`--dry-run` of tables: every run with its changes, size, length and cost, nothing measured and nothing trained."""

import torch

from eval.tables.config import Table
from eval.tables.overhead import Overhead
from meanflow.logs import aligned
from meanflow.random import generator
from meanflow.training.config import RunConfig
from meanflow.training.costs import forward_multiply_adds
from meanflow.training.state import build_network, count_parameters

# The official PyTorch release reports 0.21 s an iteration of cifar10 on eight H200s: 1.68 GPU-seconds for what `passes`
# makes 163 TFLOP a step.
TFLOPS = 97.0
DRAWS = 100_000  # of (t, r), to count how many samples need what


def passes(config: RunConfig) -> float:
    """What a training step costs a sample, with a forward pass as 1.

    Forward and backward are 3, the tangent of a sample with r ≠ t is 1 (dual numbers), as is each further pass that an
    objective makes for it (`Objective.passes`), and each term of the guided
    velocity (Eq. 21) with a weight is 1 for samples inside the interval that keep their label.
    """
    r, t = config.objective.sample_times(DRAWS, generator(config.seed, "plan"))
    count = 3 + float((r != t).float().mean()) * config.objective.passes
    if guidance := config.guidance:
        inside = float(((t >= guidance.t_start) & (t <= guidance.t_end)).float().mean())
        count += len(guidance.terms) * inside * (1 - guidance.label_drop)
    return count


def run_flops(config: RunConfig, forward: int, scorings: int = 1) -> float:
    """Multiplications and additions of training, and of sampling for its scores; `forward`: of one pass of a sample.

    Those of matrix products and convolutions. Decoding latents and feature extractors are not counted.
    """
    sampling = config.eval.samples * sum(config.eval.steps) * scorings
    return forward * (passes(config) * config.train.batch * config.train.steps + sampling)


def plan(tables: list[Table | Overhead], tflops: float | None = None) -> str:
    """A line for each run, those that several tables share counted once, and the sum. tflops: achieved by a GPU."""
    tflops = tflops or TFLOPS
    lines = [["run", "recipe and changes", "parameters", "iterations", "batch", "PFLOP", "GPU-hours"]]
    total, seen, sizes = 0.0, set(), {}
    for table in tables:
        if isinstance(table, Overhead):
            lines.append(
                [f"{table.name} --scale {table.scale}", f"{table.config.description} (a benchmark)", *[""] * 5]
            )
            continue
        lines.append([f"{table.name} --scale {table.scale}", table.config.description, "", "", "", "", ""])
        for run in table.runs:
            config, key = run.recipe, (table.scale, run.folder)
            if config.model not in sizes:
                parameters = count_parameters(build_network(config, torch.device("meta")))
                sizes[config.model] = (parameters, 2 * forward_multiply_adds(config))
            parameters, forward = sizes[config.model]
            milestones = -(-config.train.steps // config.checkpoint.milestone_every) if table.config.milestones else 1
            flops = run_flops(config, forward, milestones)
            hours = flops / (tflops * 1e12) / 3600
            cost = "shared" if key in seen else f"{hours:,.1f}" if table.scale == "full" else ""
            total += hours if table.scale == "full" and key not in seen else 0
            seen.add(key)
            size = [f"{parameters / 1e6:.2f} M", f"{config.train.steps:,}", f"{config.train.batch:,}"]
            lines.append([f"  {run.folder}", run.changes, *size, f"{flops / 1e15:,.3g}", cost])
    note = f"{len(seen)} runs"
    if total:
        note += (
            f", {total:,.0f} GPU-hours at {tflops:g} TFLOP/s a GPU: counted operations over a rate (--tflops), an "
            "estimate; decoding and feature extraction are not in it"
        )
    return "\n".join([*aligned(lines, left=2), "", note])
