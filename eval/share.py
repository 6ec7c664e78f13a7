"""`bash run.sh share RUN OUT`: a folder for others, as the Hugging Face hub expects a model; --push uploads it.

OUT holds model.safetensors, config.json, README.md (the model card) and samples.png. Every command that takes a run
takes such a folder too, and its name on the hub; so does `meanflow.load`.
"""

import argparse
import os
import re
import shutil
from pathlib import Path

from eval.scoring.options import RUN, Parser, add_device, path
from meanflow.errors import AssetError, UserError, run_main, write_errors_named

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("share", __doc__.partition(": ")[2])
    parser.add_argument("what", type=path, metavar="RUN", help=RUN)
    parser.add_argument("out", type=path, metavar="OUT", help="folder to make; it must not exist yet")
    parser.add_argument("--ema", help="averages, comma-separated, or all; the first is model.safetensors (ema.eval)")
    parser.add_argument(
        "--license", default="unknown", help="the hub's name of the weights' licence, such as mit (unknown)"
    )
    parser.add_argument("--push", metavar="OWNER/NAME", help="upload OUT to the Hugging Face hub")
    parser.add_argument("--private", action="store_true", help="with --push: only you can see it")
    parser.add_argument("--update", action="store_true", help="with --push: it may be there already; replace its files")
    add_device(parser, "sample")
    args = parser.parse_args(argv)
    if os.path.lexists(args.out):
        raise UserError(f"{args.out} exists already: name a new folder")
    if args.push and not REPOSITORY.fullmatch(args.push):
        raise UserError(f"--push {args.push}: give OWNER/NAME")
    if not args.push and (args.private or args.update):
        raise UserError("--private and --update go with --push")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", args.license):
        raise UserError(f"--license {args.license!r}: give one of the hub's names, such as mit, apache-2.0 or other")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)

    from eval.reports.read import read_scores
    from eval.sharing.card import Card
    from meanflow.files import make_folder, write_text
    from meanflow.logs import log
    from meanflow.training.model import config_of, open_checkpoint
    from meanflow.training.run_folder import RunFolder
    from meanflow.training.shared import paths_in, push, write_shared

    file, checkpoint = open_checkpoint(args.what)
    config = config_of(file, checkpoint)
    names = _averages(args, checkpoint, config)
    averages = {ema: checkpoint.kept[ema] for ema in names}
    run = RunFolder(args.what if args.what.is_dir() else file.absolute().parent.parent)
    scores = [s for s in read_scores(run) if s.step == checkpoint.meta["step"] and s.ema in names]
    if given := paths_in(config):
        log.warning(f"config.json will tell paths of this machine: {', '.join(f'{k}={v}' for k, v in given.items())}")
    staging = args.out.with_name(f"{args.out.name}.{os.getpid()}.tmp")  # so that OUT is whole or not there
    try:
        make_folder(staging)
        write_shared(staging, config, averages, checkpoint.meta)
        picture = _samples(staging, run, file, checkpoint, names[0], args.device)
        parameters = sum(x.numel() for x in averages[names[0]].values())
        name = args.push or args.out.resolve().name
        card = Card(name, args.license, config, checkpoint.meta, names, parameters, tuple(scores), picture)
        write_text(staging / "README.md", card.text())
        with write_errors_named(args.out):
            staging.rename(args.out)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    files = sorted(file.name for file in args.out.iterdir())
    size = sum((args.out / file).stat().st_size for file in files) / 1e6
    print(f"{file} → {args.out}: {', '.join(files)}; {size:,.1f} MB")
    if args.license == "unknown":
        print("the card says 'license: unknown': choose one with --license, or edit README.md")
    if args.push:
        print(f"uploaded to {push(args.out, args.push, files, args.private, args.update)}")
    return 0


def _averages(args: argparse.Namespace, checkpoint, config) -> tuple[str, ...]:
    """The averages to share, the one meant first at the front. Raises UserError for one that is not kept."""
    first = checkpoint.meta.get("ema", repr(config.ema.eval))
    if args.ema is None:
        names = [first]
    elif args.ema == "all":
        names = [first, *checkpoint.ema]
    else:
        names = [part.strip() for part in args.ema.split(",")]
    for name in names:
        if name not in checkpoint.kept:
            raise UserError(f"--ema {name}: {args.what} keeps {', '.join(checkpoint.kept)}")
    return tuple(dict.fromkeys(names))


def _samples(folder: Path, run, file: Path, checkpoint, ema: str, device: str | None) -> str:
    """Write samples.png of the average `ema` as the recipe's grid; its caption. If that fails, the run's."""
    from eval.sampling.grid import captions, class_labels, columns_of, write
    from meanflow.logs import log
    from meanflow.training.model import device_of, model_of, to_uint8

    try:
        model = model_of(file, checkpoint, ema, device_of(device))
    except AssetError as error:  # no VAE here, say
        there = run.path / "samples.png"
        log.warning(
            f"no samples were made ({error}); {f'{there} is taken' if there.is_file() else 'the card has none'}"
        )
        if not there.is_file():
            return ""
        shutil.copy(there, folder / "samples.png")
        return "As the run left them."
    how = model.config.sample
    columns = columns_of(how.count, how.columns)
    labels = class_labels(model, how.count, None, columns)
    images = to_uint8(model.sample(how.count, how.steps, how.seed, labels), how.uint8)
    write(images, folder / "samples.png", columns, captions(model, labels, columns))
    evaluations = "one evaluation" if how.steps == 1 else f"{how.steps} evaluations"
    return f"{how.count} samples, not selected: {evaluations} of the network each, EMA {ema}, seed {how.seed}."


if __name__ == "__main__":
    raise SystemExit(run_main(main))
