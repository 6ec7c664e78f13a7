"""`python -m eval.run RECIPE`: the whole job - train, sample, score, plot. `run.sh` calls it."""

import argparse
import math
import warnings
from pathlib import Path
from typing import Any

import torch

from eval.generate import Model, generate, load_model, to_uint8
from eval.grid import columns_of
from eval.plot import plot
from eval.sample import captions, class_labels, write
from eval.score import ScoreDuring, floor, preflight, score_run
from meanflow.errors import run_main
from meanflow.training.batches import split_batch
from meanflow.training.checkpoint import list_checkpoints
from meanflow.training.config import RunConfig, config_to_yaml, load_config
from meanflow.training.distributed import Processes, leaving_processes, lost_peers_named, start_processes
from meanflow.training.estimate import estimate
from meanflow.training.loop import train
from meanflow.training.network import build_network, count_parameters
from meanflow.training.run_folder import RunFolder
from meanflow.training.signals import warned_by_usr1

SLOW_ON_CPU = 5_000_000  # parameters from which a CPU run is a matter of weeks
FLOOR_UP_TO = 1024  # numbers in an image; the distance between halves of large images costs as much as a score


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a YAML of recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--out", type=Path, help="run folder (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters, memory and speed, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    config = load_config(args.recipe, args.set)
    run = RunFolder(args.out or Path("runs") / args.recipe.stem)
    with leaving_processes():
        processes = start_processes(args.device)
        if args.dry_run:
            report = estimate(config, processes)
            if processes.is_main:
                print(config_to_yaml(config), report, sep="\n")
            return 0
        with warned_by_usr1(), lost_peers_named(processes):
            return job(config, run, processes)


def check(argv: list[str], world: int) -> None:
    """What can be known before processes start. Raises ConfigError."""
    args = parse(argv)
    split_batch(load_config(args.recipe, args.set), world)


def job(config: RunConfig, run: RunFolder, processes: Processes) -> int:
    """Train (or continue), then write samples.png, eval/*.json and curves.png; the exit code."""
    say = print if processes.is_main else (lambda line: None)
    lock = run.lock() if processes.is_main else None
    try:
        if processes.is_main:
            changed = run.open_for(config)
            differing = {key: list(pair) for key, pair in changed.items()}
            saved = list_checkpoints(run.checkpoints)
            begin = int(saved[-1].stem) if saved else 0
            run.note_start(processes=processes.world, step=begin, changed=differing)
            _warn(config, processes)
        code = train(config, run, processes, say, ScoreDuring(say))
        if code:
            return code
        if processes.is_main:
            _sample(config, run, processes)
        try:
            results = score_run(run, config, processes, say=lambda table: None)
        finally:  # curves are worth having where a score is not to be had
            if processes.is_main:
                plot([run], run.curves)
        if processes.is_main:
            print(closing_table(config, run, results))
        return 0
    finally:
        if lock:
            lock.close()


def _warn(config: RunConfig, processes: Processes) -> None:
    """What is better known before a long run than after."""
    if processes.device.type == "cpu" and count_parameters(build_network(config, torch.device("meta"))) > SLOW_ON_CPU:
        print("warning: no GPU is used, and on a CPU this network trains very slowly; --dry-run estimates how long")
    for warning in preflight(config):
        print(f"warning: {warning}")


def _sample(config: RunConfig, run: RunFolder, processes: Processes) -> None:
    """The grid that the recipe asks for, as samples.png."""
    model: Model = load_model(run.path, repr(config.ema.eval), processes.device)
    columns = columns_of(config.sample.count, config.sample.columns)
    labels = class_labels(model, config.sample.count, None, columns)
    images = generate(model, 0, config.sample.count, config.sample.steps, config.sample.seed, labels)
    write(to_uint8(images).cpu(), run.path / "samples.png", columns, captions(model, labels, columns))


def closing_table(config: RunConfig, run: RunFolder, results: list[dict[str, Any]]) -> str:
    """Scores by NFE, the floor where it is cheap, and where the files are."""
    cells = [("distance", "value", "samples")]
    for result in results:
        for name, value in result["metrics"].items():
            protocol = result["protocol"]
            note = "" if result["comparable"] or name.startswith("fd-") else " (not comparable)"
            cells.append((f"{protocol['nfe']}-NFE {name}{note}", f"{value:.3f}", f"{protocol['n']:,}"))
    if math.prod(config.image_shape) <= FLOOR_UP_TO:
        cells.append(("floor: two halves of the real images", f"{floor(config):.3f}", ""))
    width = max(len(row[0]) for row in cells)
    lines = [f"{name:<{width}}  {value:>9}  {count:>9}".rstrip() for name, value, count in cells]
    files = [f"{label:<8}  {path}" for label, path in _files(run).items()]
    return "\n".join(["", *lines, "", *files])


def _files(run: RunFolder) -> dict[str, Path]:
    return {
        "samples": run.path / "samples.png",
        "curves": run.curves,
        "scores": run.eval,
        "metrics": run.metrics_file,
        "weights": run.checkpoints,
    }


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    raise SystemExit(run_main(main))
