"""`python -m eval.bench [RECIPE ...]`: how fast a training step is on this machine, and against what.

Every step is timed in turns with the others, so that a machine that is not quiet slows all of them alike; figures
are medians over the rounds with their quartiles, and ratios are taken round by round. Peak memory is that of a
process of its own.
"""

import argparse
import json
import platform
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from eval.benchmark.clock import Spread, cpu_has_bf16
from eval.benchmark.rows import ROWS, Plan, Report, Row, measure
from eval.benchmark.steps import SEPARATE
from eval.tables.files import aligned
from meanflow.errors import UserError, run_main, write_errors_named
from meanflow.jvp import METHODS
from meanflow.training.config import COMPILE_MODES, PRECISIONS, load_config
from meanflow.training.run_folder import environment

RECIPES = [Path("recipes/cifar10.yaml"), Path("recipes/imagenet_b4.yaml")]
NONE = "none"
BATCH = {"cuda": {"images": 128, "latents": 128}, "cpu": {"images": 8, "latents": 32}}  # a second or more a step


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.bench", description=__doc__)
    parser.add_argument("recipes", type=Path, nargs="*", default=RECIPES, help=f"YAMLs ({' '.join(map(str, RECIPES))})")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--batch", type=int, help="images a step (128 on a GPU; on a CPU 8, of latents 32)")
    parser.add_argument("--repeats", type=int, default=7, help="rounds, of which the median counts (7)")
    parser.add_argument("--precisions", help="fp32, tf32, bf16, comma-separated (all that this device has)")
    parser.add_argument("--jvp", default="dual", help="dual, func, separate; the first one counts (dual)")
    parser.add_argument("--compile", metavar="MODES", help=f"{NONE}, or {', '.join(COMPILE_MODES)} (default on a GPU)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which figures ({','.join(ROWS)})")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    parser.add_argument("--out", type=Path, help="a JSON file with everything, every round's seconds included")
    args = parser.parse_args(argv)
    cuda = (args.device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda"
    here = ("tf32", "fp32", "bf16") if cuda else ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    args.precisions = _names("--precisions", args.precisions, PRECISIONS) if args.precisions else here
    args.jvp, args.rows = _names("--jvp", args.jvp, (*METHODS, SEPARATE)), _names("--rows", args.rows, ROWS)
    args.device = torch.device("cuda" if cuda else "cpu")
    modes = args.compile or ("default" if cuda else NONE)
    args.compile = () if modes == NONE else _names("--compile", modes, COMPILE_MODES)
    for name in ("batch", "repeats"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"--{name} must be ≥ 1, got {getattr(args, name)}")
    return args


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"{option} {text}: takes {', '.join(known)}, each once, comma-separated")
    return names


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    reports = []
    for recipe in args.recipes:
        batch = args.batch or BATCH[args.device.type][load_config(recipe, args.set).data.kind]
        how = (batch, args.repeats, args.precisions, args.jvp, args.compile, args.rows, args.device)
        reports.append(measure(Plan(recipe, tuple(args.set), *how)))
    where = {**environment(), "threads": torch.get_num_threads(), "platform": platform.platform()}
    print("\n\n".join([_machine(where), *(table(report) for report in reports)]))
    if args.out:
        command = ["python", "-m", "eval.bench", *(sys.argv[1:] if argv is None else argv)]
        tree = {"command": " ".join(command), "machine": where, "reports": [_tree(report) for report in reports]}
        with write_errors_named(args.out):
            args.out.write_text(json.dumps(tree, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return 0


def _machine(where: dict[str, Any]) -> str:
    return f"{where['device']}, {where['threads']} threads, torch {where['torch']}, Python {where['python']}"


def _tree(report: Report) -> dict[str, Any]:
    return {**asdict(report), "rows": [{**asdict(row), "state": row.state} for row in report.rows]}


def table(report: Report) -> str:
    """The report as two tables: steps and figures."""
    head = (
        f"{report.recipe}: {report.parameters / 1e6:.2f} M parameters, batch {report.batch}, r≠t {report.share:.0%}; "
        "medians and quartiles; matrix rate "
        + ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in report.matrix_rates.items())
    )
    steps = [("step", "s/step", "", "images/s", "peak MB", "TFLOP/s", "of matrix rate")]
    for step in report.steps:
        rate = (f"{step.tflops_per_s:.3g}", f"{step.of_matrix_rate:.0%}")
        memory = "" if step.memory_mb is None else f"{step.memory_mb:,.0f}"
        steps.append((step.name, *_cells(step.seconds, "{:.3g}"), f"{step.images_per_s:.3g}", memory, *rate))
    rows = [("figure", "measured", "", "reach", "state")]
    rows += [(row.name, *_row_cells(row), row.state) for row in report.rows]
    return "\n".join([head, *aligned(steps, left=len(steps[0])), "", *aligned(rows, left=len(rows[0]))])


def _cells(spread: Spread, form: str) -> tuple[str, str]:
    return form.format(spread.median), f"{form.format(spread.low)} – {form.format(spread.high)}"


def _row_cells(row: Row) -> tuple[str, str, str]:
    form = "{:.1%}" if row.name.startswith("share") else "{:.2f}"
    reach = "" if row.reach is None else f"{'≤' if row.at_most else '≥'} {form.format(row.reach)}"
    return (*(("", "") if row.figure is None else _cells(row.figure, form)), reach)


if __name__ == "__main__":
    raise SystemExit(run_main(main))
