"""Score a run, a checkpoint or image files by FID, IS, KID, precision and recall.

bash run.sh fid runs/cifar10                            a run's newest checkpoint, against its training images
bash run.sh fid runs/cifar10 --ema all --steps 1,2,4    several at once
bash run.sh fid runs/cifar10 --grid 1,0.6,0             two steps at times of your choice
bash run.sh fid runs/imf_b2 --guidance 4,7.5,10.5 --interval 0.4,0.65   which guidance is best?
bash run.sh fid --samples images.zip --ref cifar10-train
torchrun --nproc-per-node 8 run.py fid runs/cifar10     on all GPUs of a node
bash run.sh fid make-ref --ref FOLDER --out ref.npz     statistics of images, for --ref
bash run.sh fid selftest                                is this installation's FID the usual one?
"""

import argparse
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.scoring.options import (
    EXTRACTORS,
    FULL_N,
    INCEPTION,
    METRICS,
    NAMED,
    RUN,
    Parser,
    add_device,
    count,
    counts,
    grid,
    interval,
    metrics,
    path,
    reference,
    scales,
)
from meanflow.errors import AssetError, UserError, run_main

EXIT_CODES = """exit codes:
  0 done   2 usage or options that do not fit together  3 a file, the weights, the disk or memory is missing
  4 unusable statistics or samples that are not finite  5 interrupted, --resume continues
Under torchrun the launcher reports a failed process by its own exit code 1."""


# --- arguments ---------------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    """Raises UserError for mistakes that can be found without PyTorch, which takes seconds to import."""
    name = argv[0] if argv and argv[0] in PARSERS else ""
    args = PARSERS[name]().parse_args(argv[1:] if name else argv)
    if args.weights is not None and not args.weights.is_file():
        raise AssetError(f"--weights {args.weights}: no such file")
    if args.work is _score:
        if sum(x is not None for x in (args.what, args.ckpt, args.samples)) != 1:
            raise UserError("say what to score: a run folder, a checkpoint or --samples, one of them (see --help)")
        if args.samples is not None and args.ref is None:
            raise UserError(f"--samples needs --ref: {REFERENCES}")
        if args.samples is not None and (args.guidance or args.interval):
            raise UserError("--guidance and --interval choose how a network samples; --samples are there already")
    if args.work is _make_ref:
        if args.out.suffix != ".npz":
            raise UserError(f"--out {args.out}: name a file that ends in .npz")
        if args.out.exists() and not args.overwrite:
            raise UserError(f"--out {args.out} exists already: name another file, or give --overwrite")
    return args


def _score_parser() -> Parser:
    out = Parser("fid", __doc__, epilog=EXIT_CODES)
    what = out.add_argument_group("what is scored (one of)")
    what.add_argument("what", nargs="?", type=path, metavar="WHAT", help=RUN)
    what.add_argument("--ckpt", type=path, help="the same for a checkpoint file")
    what.add_argument("--samples", type=path, help="folder, zip, tar or npz (arr_0) of images")
    how = out.add_argument_group("how")
    how.add_argument("--ref", type=reference, help=f"{REFERENCES} (the recipe's: mostly its training images)")
    how.add_argument("--metrics", type=metrics, default=("fid",), help=f"comma-separated of {', '.join(METRICS)} (fid)")
    # torchrun takes --n for an abbreviation of one of its options, even after the module's name.
    number = f"number of samples ({FULL_N}; --samples: all, up to that); under torchrun write --count"
    how.add_argument("--n", "--count", type=count, help=number)
    how.add_argument("--steps", type=counts, help="network evaluations a sample (NFE), comma-separated (1)")
    how.add_argument("--grid", type=grid, action="append", default=[], help="times from 1 to 0, such as 1,0.6,0")
    guided = "guidance scales ω, comma-separated, where they are an input of the network (the recipe's sample.guidance)"
    how.add_argument("--guidance", type=scales, help=guided)
    within = "t in which it holds, such as 0.4,0.65; again for several (the recipe's sample.interval)"
    how.add_argument("--interval", type=interval, action="append", metavar="T_MIN,T_MAX", help=within)
    how.add_argument("--ema", help='an EMA by its decay, "all", or "weights" (the recipe\'s ema.eval)')
    how.add_argument("--seed", type=int, default=0, help="sample k is a function of (seed, k) (0)")
    how.add_argument("--labels", default="random", help="random, balanced, or one class (random)")
    how.add_argument("--quantise", choices=("round", "floor"), help="to uint8 (the recipe's sample.uint8)")
    how.add_argument("--kid-subset-size", type=count, help="images in each of KID's subsets (torch-fidelity's 1000)")
    how.add_argument("--out", type=path, help="folder for results (the run's eval/, else eval-results/)")
    how.add_argument("--resume", action="store_true", help="continue an interrupted evaluation")
    _common(out)
    out.set_defaults(work=_score)
    return out


def _make_ref_parser() -> Parser:
    out = Parser("fid make-ref", "Statistics of images, to be given as --ref.", epilog=EXIT_CODES)
    out.add_argument("--ref", type=reference, required=True, help=REFERENCES)
    out.add_argument("--out", type=path, required=True, help="the npz to write")
    out.add_argument("--overwrite", action="store_true", help="replace that file")
    _common(out)
    out.set_defaults(work=_make_ref)
    return out


def _selftest_parser() -> Parser:
    text = "Is this installation's Inception the one behind published FIDs? Nothing is downloaded."
    out = Parser("fid selftest", text, epilog=EXIT_CODES)
    _common(out)
    out.set_defaults(work=_selftest)
    return out


PARSERS = {"": _score_parser, "make-ref": _make_ref_parser, "selftest": _selftest_parser}
REFERENCES = f"{', '.join(NAMED)}, images, statistics, or a run folder for its training images"


def _common(out: Parser) -> None:
    """Options of every form of the command."""
    group = out.add_argument_group("with what")
    names = f"{', '.join(EXTRACTORS)}, or module:factory (the recipe's; without a run {INCEPTION})"
    group.add_argument("--extractor", help=names)
    group.add_argument("--weights", type=path, help="Inception weights (torch-fidelity's cache)")
    group.add_argument("--allow-weights", action="store_true", help="accept weights of an unknown hash")
    group.add_argument("--offline", action="store_true", help="never download anything")
    add_device(group)
    group.add_argument("--batch", type=count, default=64, help="images at a time (64)")
    group.add_argument("--cache", type=path, help="keep features of references in this folder (small ones, with --out)")
    group.add_argument("--data", type=path, default=Path("data"), help="where CIFAR-10 lives (data)")


def main(argv: list[str] | None = None) -> int:
    """The entry point. Raises UserError and its kin for `run_main` to print."""
    args = parse(sys.argv[1:] if argv is None else argv)

    from meanflow.training.processes import leaving_distributed, start_distributed

    # Schedulers send SIGTERM: keep what is done, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with leaving_distributed():
            return args.work(args, start_distributed(args.device))
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum, frame):
    raise KeyboardInterrupt


# --- the work ----------------------------------------------------------------------------------------------------


def _score(args: argparse.Namespace, ctx) -> int:
    from eval.scoring.evaluate import evaluate
    from eval.scoring.metrics import MetricOptions
    from eval.scoring.protocol import Request, best_guidance, table
    from eval.scoring.references import recipe_reference
    from eval.scoring.sources import EvalTarget, Sampling, read_images, targets_of
    from meanflow.files import sha256_file
    from meanflow.training.model import config_of, open_checkpoint
    from meanflow.training.processes import assert_same_on_all_ranks, run_on_rank0
    from meanflow.training.run_folder import RunFolder
    from meanflow.training.shared import is_shared

    given = {name: str(value) for name, value in vars(args).items() if name != "work"}
    assert_same_on_all_ranks(ctx, given, "arguments")
    config, out = _config_of_reference(args), Path("eval-results")
    if args.samples is not None:
        source = read_images(args.samples)
        source = source.first(args.n if args.n is not None else min(FULL_N, source.n))
        targets = [EvalTarget(args.samples.stem or "samples", source, {}, {"samples": str(args.samples)})]
    else:
        what = args.what or args.ckpt
        file, checkpoint = open_checkpoint(what)
        config = config_of(file, checkpoint)
        if is_shared(file.parent) and args.extractor is None and ":" in config.eval.extractor:
            raise UserError(
                f"{what} asks for features by code, {config.eval.extractor}: name it as --extractor if you trust it"
            )
        sampling = Sampling(args.n or FULL_N, args.seed, args.labels, args.quantise or config.sample.uint8)
        steps, grids = args.steps or (() if args.grid else (1,)), tuple(args.grid)
        digest = sha256_file(file)
        guided = args.guidance or (None,), tuple(args.interval or (None,))
        targets = targets_of(file, checkpoint, digest, args.ema, steps, sampling, ctx.device, grids, *guided)
        run = RunFolder(what if what.is_dir() else file.parent.parent)
        out = run.eval if run.config_file.exists() else out
    extractor = _extractor(args, args.metrics, config, ctx)
    if args.ref is not None:
        real = _reference(args, ctx)
    else:
        run_on_rank0(ctx, lambda: recipe_reference(config, not args.offline) and None)
        real = recipe_reference(config, not args.offline)
    options = MetricOptions() if args.kid_subset_size is None else MetricOptions(kid_subset_size=args.kid_subset_size)
    resume, out = "continue" if args.resume else "fresh", args.out or out
    request = Request(args.metrics, extractor, real, options, args.batch, out, args.cache, resume)
    results = evaluate(request, targets, ctx)
    if results is not None:
        print(table(results))
        for line in best_guidance(results, extractor.label("fid")):
            print(line)
        print(f"written to {out}/", file=sys.stderr)
    return 0


def _make_ref(args: argparse.Namespace, ctx) -> int:
    import shutil

    from eval.scoring.features import Cache, prepare
    from eval.scoring.metrics import MetricOptions, Statistics
    from eval.scoring.references import check_reference, write_reference
    from eval.scoring.threads import interruptible
    from meanflow.files import make_folder

    extractor, real = _extractor(args, ("fid",), _config_of_reference(args), ctx), _reference(args, ctx)
    if real.images is None:
        raise UserError(f"--ref {args.ref} is statistics already: give images")
    check_reference(real, ("fid",), extractor, None, MetricOptions())
    work = make_folder(args.out.parent) / f"{args.out.stem}-work"  # interrupted, the same command continues
    cache = Cache(make_folder(args.cache)) if args.cache else Cache(work, 0)
    prepared = prepare(real, ("fid",), extractor, cache, work, ctx, "reference")
    if prepared is not None:
        found = prepared.fid
        statistics = found if isinstance(found, Statistics) else interruptible(lambda: Statistics.of(found), ctx.device)
        print(write_reference(args.out, real, statistics, extractor))
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _selftest(args: argparse.Namespace, ctx) -> int:
    from eval.scoring.evaluate import selftest
    from eval.scoring.extractors import Options

    return selftest(Options(ctx.device, args.weights, False, args.allow_weights), args.data, args.cache, ctx)


def _config_of_reference(args: argparse.Namespace):
    """The recipe of the run folder that --ref names, if it names one."""
    from meanflow.training.config import load_config
    from meanflow.training.run_folder import RunFolder

    file = None if args.ref is None or args.ref in NAMED else RunFolder(Path(args.ref)).config_file
    return load_config(file) if file is not None and file.is_file() else None


def _extractor(args: argparse.Namespace, needed: tuple[str, ...], config, ctx):
    """--extractor, else that of the recipe `config`, else Inception; rank 0 downloads weights for all."""
    from eval.scoring.extractors import Options, create, prefetch
    from eval.scoring.score import recipe_extractor
    from meanflow.training.processes import run_on_rank0

    options = Options(ctx.device, args.weights, not args.offline, args.allow_weights)
    name = args.extractor or (INCEPTION if config is None else config.eval.extractor)
    run_on_rank0(ctx, lambda: prefetch(name, options))
    if args.extractor is None and config is not None:
        return recipe_extractor(config, options, needed)
    return create(name, options, needed)


def _reference(args: argparse.Namespace, ctx):
    """Open --ref, on rank 0 first, since that may download."""
    from eval.scoring.references import open_reference
    from meanflow.training.processes import run_on_rank0

    run_on_rank0(ctx, lambda: open_reference(args.ref, args.data, not args.offline) and None)
    return open_reference(args.ref, args.data, not args.offline)


if __name__ == "__main__":
    sys.exit(run_main(main))
