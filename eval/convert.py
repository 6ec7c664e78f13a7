"""`python -m eval.convert FILE RUN`: an official CIFAR-10 checkpoint as a run folder of ours.

The folder then serves `eval.sample`, `eval.fid` and the rest; the optimiser's state is not taken along.
"""

import argparse
from pathlib import Path

from meanflow.errors import AssetError, UserError, run_main
from meanflow.training.checkpoint import load_checkpoint, save_checkpoint
from meanflow.training.config import config_from_tree, config_to_yaml
from meanflow.training.official import read_official
from meanflow.training.run_folder import RunFolder


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.convert", description=__doc__)
    parser.add_argument("file", type=Path, help="checkpoint of the official PyTorch release")
    parser.add_argument("run", type=Path, help="run folder to make; it must not exist yet")
    args = parser.parse_args(argv)
    if args.run.exists():
        raise UserError(f"{args.run} exists already: name a new folder")
    checkpoint = read_official(args.file)
    if checkpoint is None:
        load_checkpoint(args.file)  # says so if it is missing, damaged or unknown
        raise AssetError(f"{args.file} is a checkpoint of ours already")
    run = RunFolder(args.run)
    path = save_checkpoint(run.checkpoints, checkpoint.meta["step"], checkpoint)
    config = config_from_tree(checkpoint.meta["config"], str(args.file))
    run.config_file.write_text(config_to_yaml(config), encoding="utf-8")
    print(f"{args.file} → {path}, with EMAs {', '.join(checkpoint.ema)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
