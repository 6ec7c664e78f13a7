"""`python -m eval.run RECIPE`: the whole job - train, sample, score, plot. `run.sh` calls it."""

import argparse
import warnings
from pathlib import Path

from eval.generate import load_model
from meanflow.errors import UserError, run_main
from meanflow.training.config import RunConfig, config_to_yaml, load_config
from meanflow.training.distributed import Processes, start_processes, stop_processes
from meanflow.training.estimate import estimate
from meanflow.training.loop import train
from meanflow.training.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.run", description=__doc__)
    parser.add_argument("recipe", type=Path, help="a YAML of recipes/")
    parser.add_argument("--set", action="append", default=[], metavar="KEY.PATH=VALUE", help="override a setting")
    parser.add_argument("--out", type=Path, help="run folder (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print config, parameters, memory and speed, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    args = parser.parse_args(argv)
    config = load_config(args.recipe, args.set)
    run = RunFolder(args.out or Path("runs") / args.recipe.stem)
    processes = start_processes(args.device)
    try:
        if args.dry_run:
            print(config_to_yaml(config), estimate(config, processes), sep="\n")
            return 0
        return _job(config, run, processes)
    finally:
        stop_processes()


def _job(config: RunConfig, run: RunFolder, processes: Processes) -> int:
    lock = run.lock() if processes.is_main else None
    try:
        if processes.is_main:
            changed = run.open_for(config)
            run.note_start(processes=processes.world, changed={key: list(pair) for key, pair in changed.items()})
        if processes.device.type == "cpu" and config.model.width >= 64 and processes.is_main:
            print("warning: no GPU is in use; this network trains very slowly on a CPU (--dry-run estimates how long)")
        code = train(config, run, processes)
    finally:
        if lock:
            lock.close()
    return code


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    raise SystemExit(run_main(main))
