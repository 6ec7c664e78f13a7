"""`bash run.sh bench [RECIPE …]`: how fast a training step is on this machine, and against what.

Steps are timed in turns, so that other load on the machine slows all of them alike; figures
are medians over the rounds with their quartiles, and ratios are taken round by round. Peak memory is that of a
separate process.
"""

import argparse
import json
import platform
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

from eval.benchmark import ROWS, SEPARATE
from eval.scoring.options import Parser, add_device, add_out, add_set, check_out, count, path
from meanflow.errors import UserError, run_main
from meanflow.files import write_text

RECIPES = Path(__file__).resolve().parents[1] / "recipes"
DEFAULT = ("cifar10", "imagenet_b4")
NONE = "none"
BATCH = {"cuda": {"images": 128, "latents": 128}, "cpu": {"images": 8, "latents": 32}}  # a second or more a step
# As in meanflow/training/config.py and meanflow/jvp.py, whose import takes seconds; a test compares them.
PRECISIONS = ("fp32", "tf32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
METHODS = ("dual", "func")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("bench", __doc__.partition(": ")[2])
    parser.add_argument(
        "recipes", type=recipe, nargs="*", metavar="RECIPE", help=f"names or files ({' '.join(DEFAULT)})"
    )
    add_set(parser)
    parser.add_argument("--batch", type=count, help="images a step (128 on a GPU; on a CPU 8, of latents 32)")
    parser.add_argument("--repeats", type=count, default=7, help="rounds, of which the median counts (7)")
    parser.add_argument("--precisions", help=f"{','.join(PRECISIONS)} (all that this device has)")
    parser.add_argument("--jvp", default="dual", help="dual, func, separate, with commas; the first one counts (dual)")
    parser.add_argument("--compile", metavar="MODES", help=f"{NONE}, or {', '.join(COMPILE_MODES)} (default on a GPU)")
    parser.add_argument("--rows", default=",".join(ROWS), help=f"which figures ({','.join(ROWS)})")
    parser.add_argument("--against", type=recipe, metavar="RECIPE", help="another recipe, measured in turns with these")
    add_device(parser)
    add_out(parser, "a JSON file with everything, every round's seconds included")
    args = parser.parse_args(argv)
    args.precisions = _names("--precisions", args.precisions, PRECISIONS) if args.precisions else None
    args.jvp, args.rows = _names("--jvp", args.jvp, (*METHODS, SEPARATE)), _names("--rows", args.rows, ROWS)
    if args.compile not in (None, NONE):
        args.compile = _names("--compile", args.compile, COMPILE_MODES)
    args.recipes = args.recipes or [recipe(name) for name in DEFAULT]
    return args


def recipe(text: str) -> Path:
    """A recipe's file, by name or path."""
    named = RECIPES / f"{text}.yaml"
    file = named if named.exists() else path(text)
    if not file.is_file():
        raise UserError(f"{text}: no such recipe, and no such file")
    return file


def _names(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    names = tuple(text.split(","))
    unknown = [name for name in names if name not in known]
    if unknown or len(set(names)) < len(names):
        raise UserError(f"{option} {text}: takes {', '.join(known)}, each once, comma-separated")
    return names


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch  # here, as the rest: it takes seconds to import

    from eval.benchmark.clock import cpu_has_bf16
    from eval.benchmark.rows import Plan, measure
    from eval.benchmark.text import machine, table
    from meanflow.training.config import load_config
    from meanflow.training.model import device_of
    from meanflow.training.run_folder import environment

    if args.out:
        check_out(args.out, args.overwrite)
    device = device_of(args.device)
    cuda = device.type == "cuda"
    here = ("tf32", "fp32", "bf16") if cuda else ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    modes = args.compile or (("default",) if cuda else NONE)
    reports = []
    for file in args.recipes:
        batch = args.batch or BATCH[device.type][load_config(file, args.set).data.kind]
        how = (batch, args.repeats, args.precisions or here, args.jvp, () if modes == NONE else modes)
        reports.append(measure(Plan(file, tuple(args.set), *how, args.rows, device, args.against)))
    where = {**environment(), "threads": torch.get_num_threads(), "platform": platform.platform()}
    print("\n\n".join([machine(where), *(table(report) for report in reports)]))
    if args.out:
        command = shlex.join(["bash", "run.sh", "bench", *(sys.argv[1:] if argv is None else argv)])
        found = {"command": command, "machine": where, "reports": [asdict(report) for report in reports]}
        write_text(args.out, json.dumps(found, indent=1, ensure_ascii=False) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
