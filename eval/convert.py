"""`bash run.sh convert CHECKPOINT RUN`: an official checkpoint (a file, or JAX's folder) as a run folder of ours.

The folder then serves sample, fid and the rest; the optimiser's state is not taken over.
"""

import os

from eval.scoring.options import Parser, path
from meanflow.errors import AssetError, UserError, run_main, write_errors_named


def main(argv: list[str] | None = None) -> int:
    parser = Parser("convert", __doc__.partition(": ")[2])
    parser.add_argument("file", type=path, help="checkpoint of an official release: PyTorch's file, or JAX's folder")
    parser.add_argument("run", type=path, help="run folder to make; it must not exist yet")
    args = parser.parse_args(argv)

    from meanflow.training.checkpoint import load_checkpoint, save_checkpoint
    from meanflow.training.config import config_from_tree, config_to_yaml
    from meanflow.training.official import read_official
    from meanflow.training.run_folder import RunFolder

    if os.path.lexists(args.run):
        raise UserError(f"{args.run} exists already: name a new folder")
    checkpoint = read_official(args.file)
    if checkpoint is None:
        if args.file.is_dir():
            raise AssetError(
                f"{args.file}: is no checkpoint folder of the official JAX release (it has no manifest.ocdbt)"
            )
        load_checkpoint(args.file)  # says so if it is missing, damaged or unknown
        raise AssetError(f"{args.file} is a checkpoint of ours already")
    run = RunFolder(args.run)
    config = config_from_tree(checkpoint.meta["config"], str(args.file))
    with write_errors_named(args.run):
        saved = save_checkpoint(run.checkpoints, checkpoint.meta["step"], checkpoint)
        run.config_file.write_text(config_to_yaml(config), encoding="utf-8")
    print(f"{args.file} → {saved}, with {f'EMAs {averages}' if (averages := ', '.join(checkpoint.ema)) else 'no EMA'}")
    origin = checkpoint.meta["origin"]
    if "args" in origin:
        print(
            f"read from its args: {', '.join(f'{key}={value}' for key, value in origin['args'].items()) or 'nothing'}"
        )
        print(
            f"as in the recipe {origin['recipe']}: {', '.join(origin['assumed']) or 'nothing looked for'}, and the rest"
        )
    else:
        print(f"the settings are those of the recipe {origin['recipe']}, whose network it is")
    for note in origin.get("notes", ()):
        print(note)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
