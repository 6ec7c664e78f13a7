"""`bash run.sh convert CHECKPOINT RUN`: an official checkpoint as a run of ours (--to official: the reverse, of iMF).

The folder then serves sample, fid and the rest; the optimiser's state is not taken over. The other way,
`bash run.sh convert RUN --to official FILE` writes an iMF run's averaged weights as the official release has them.
"""

import os
from pathlib import Path

from eval.scoring.options import Parser, path
from meanflow.errors import AssetError, UserError, run_main, write_errors_named


def main(argv: list[str] | None = None) -> int:
    parser = Parser("convert", __doc__.partition(": ")[2])
    parser.add_argument("source", type=path, help="checkpoint of an official release; with --to official a run of ours")
    parser.add_argument("target", type=path, help="what to make, which must not exist yet: a run folder, or a file")
    parser.add_argument("--to", choices=("ours", "official"), default="ours", help="the form to make (ours)")
    parser.add_argument("--ema", help="with --to official: a decay that the run keeps, or 'weights' (its ema.eval)")
    args = parser.parse_args(argv)
    if args.ema is not None and args.to == "ours":
        raise UserError("--ema says what to write with --to official; a run of ours is given all that there is")
    if os.path.lexists(args.target):
        raise UserError(f"{args.target} exists already: name a new {'folder' if args.to == 'ours' else 'file'}")
    return to_ours(args.source, args.target) if args.to == "ours" else to_official(args.source, args.target, args.ema)


def to_ours(source: Path, target: Path) -> int:
    from meanflow.training.checkpoint import load_checkpoint, save_checkpoint
    from meanflow.training.config import config_from_tree, config_to_yaml
    from meanflow.training.official import read_official
    from meanflow.training.run_folder import RunFolder
    from meanflow.training.shared import is_shared

    checkpoint = read_official(source)
    if checkpoint is None:
        if RunFolder(source).config_file.exists() or is_shared(source):
            raise AssetError(f"{source} is a run of ours already")
        if source.is_dir():
            raise AssetError(f"{source}: is no folder of the official JAX release (it has no manifest.ocdbt)")
        load_checkpoint(source)  # says so if it is missing, damaged or unknown
        raise AssetError(f"{source} is a checkpoint of ours already")
    run = RunFolder(target)
    config = config_from_tree(checkpoint.meta["config"], str(source))
    with write_errors_named(target):
        saved = save_checkpoint(run.checkpoints, checkpoint.meta["step"], checkpoint)
        run.config_file.write_text(config_to_yaml(config), encoding="utf-8")
    averages = ", ".join(checkpoint.ema)
    print(f"{source} → {saved}, with {f'EMAs {averages}' if averages else 'no EMA'}")
    origin = checkpoint.meta["origin"]
    if "args" in origin:
        read = ", ".join(f"{key}={value}" for key, value in origin["args"].items())
        print(f"read from its args: {read or 'nothing'}")
        print(
            f"as in the recipe {origin['recipe']}: {', '.join(origin['assumed']) or 'nothing looked for'}, and the rest"
        )
    else:
        print(f"the settings are those of the recipe {origin['recipe']}, whose network it is")
    for note in origin.get("notes", ()):
        print(note)
    return 0


def to_official(source: Path, target: Path, ema: str | None) -> int:
    from meanflow.training.model import chosen_weights, config_of, open_checkpoint
    from meanflow.training.official import write_official

    path, checkpoint = open_checkpoint(source)
    config = config_of(path, checkpoint)
    which, tensors = chosen_weights(path, checkpoint, config, ema)
    write_official(target, config.model, tensors, str(path))
    print(f"{path}, {f'EMA {which}' if which in checkpoint.ema else which} → {target}: {len(tensors)} tensors")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
