"""Score a run, a checkpoint or a folder of images: FID, IS, KID, precision and recall.

python -m eval.fid runs/cifar10                            a run's newest checkpoint
python -m eval.fid runs/cifar10 --ema all --steps 1,2,4    several at once
python -m eval.fid --samples images.zip --ref cifar10-train
torchrun --nproc_per_node 8 -m eval.fid runs/cifar10       on all GPUs of a node
python -m eval.fid make-ref --ref FOLDER --out ref.npz     statistics of images, for --ref
python -m eval.fid selftest                                is this installation's FID the usual one?
"""

import argparse
import shutil
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import torch

from eval.scoring.evaluate import evaluate
from eval.scoring.extractors import INCEPTION, METRICS, Extractor, Options, create, prefetch
from eval.scoring.files import default_cache
from eval.scoring.metrics import MetricOptions
from eval.scoring.prepare import prepare, write_reference
from eval.scoring.protocol import FULL_N, Request, Variant, table
from eval.scoring.references import NAMED, Reference, check_reference, open_reference
from eval.scoring.score import training_images
from eval.scoring.selftest import selftest
from eval.scoring.sources import read_images
from eval.scoring.subjects import Sampling, variants_of
from meanflow.errors import UserError, run_main
from meanflow.training.checkpoint import file_sha256
from meanflow.training.config import config_from_tree
from meanflow.training.model import open_checkpoint
from meanflow.training.processes import (
    DistributedContext,
    assert_same_on_all_ranks,
    leaving_distributed,
    run_on_rank0,
    start_distributed,
)
from meanflow.training.run_folder import RunFolder

EXIT_CODES = """exit codes:
  0 done   2 usage or things that do not fit together   3 a file, the weights or the disk is missing
  4 unusable statistics or samples that are not finite  5 interrupted, --resume continues
Under torchrun the launcher reports a failed process by its own exit code 1."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "python -m eval.fid",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = out.add_argument_group("what is scored (one of)")
    what.add_argument("what", nargs="?", type=Path, metavar="WHAT", help="run folder or checkpoint (ours, official)")
    what.add_argument("--ckpt", type=Path, help="the same for a checkpoint file")
    what.add_argument("--samples", type=Path, help="folder, zip, tar or npz (arr_0) of images")
    how = out.add_argument_group("how")
    how.add_argument("--ref", help=f"{', '.join(NAMED)}, images or statistics (default: the run's own training images)")
    how.add_argument("--metrics", default="fid", help=f"comma-separated of {', '.join(METRICS)} (fid)")
    # torchrun takes --n for an abbreviation of its own, even behind the module's name.
    number = f"number of samples ({FULL_N}; --samples: all, up to that); under torchrun write --count"
    how.add_argument("--n", "--count", type=int, help=number)
    how.add_argument("--steps", default="1", help="network evaluations a sample (NFE), comma-separated (1)")
    how.add_argument("--ema", help='an EMA by its decay, "all", or "weights" (the recipe\'s ema.eval)')
    how.add_argument("--seed", type=int, default=0, help="sample k is a function of (seed, k) (0)")
    how.add_argument("--labels", default="random", help="random, balanced, or one class (random)")
    how.add_argument("--quantise", choices=("round", "floor"), default="round", help="to uint8 (round)")
    how.add_argument("--kid-subset-size", type=int, default=MetricOptions().kid_subset_size)
    how.add_argument("--out", type=Path, help="where results go (the run's eval/, else eval-results/)")
    how.add_argument("--resume", action="store_true", help="continue an interrupted evaluation")
    _common(out)
    return out


def _common(out: argparse.ArgumentParser) -> None:
    """Options of every form of the command."""
    group = out.add_argument_group("with what")
    group.add_argument("--extractor", default=INCEPTION, help=f"{INCEPTION}, pixels, or module:factory")
    group.add_argument("--weights", type=Path, help="Inception weights (torch-fidelity's cache)")
    group.add_argument("--allow-weights", action="store_true", help="accept weights of an unknown hash")
    group.add_argument("--offline", action="store_true", help="never download anything")
    group.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    group.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    group.add_argument("--cache", type=Path, default=default_cache(), help="features of references (%(default)s)")
    group.add_argument("--data", type=Path, default=Path("data"), help="where CIFAR-10 lives (data)")


def main(argv: list[str] | None = None) -> int:
    """The entry point. Raises UserError and its kin for `run_main` to print."""
    argv = sys.argv[1:] if argv is None else argv
    # Schedulers send SIGTERM: keep what is done, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with leaving_distributed():
            if argv[:1] == ["make-ref"]:
                return _make_ref(argv[1:])
            if argv[:1] == ["selftest"]:
                return _selftest(argv[1:])
            return _score(parser().parse_args(argv))
    finally:
        signal.signal(signal.SIGTERM, before)


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def _score(args: argparse.Namespace) -> int:
    if sum(x is not None for x in (args.what, args.ckpt, args.samples)) != 1:
        raise UserError("say what to score: a run folder, a checkpoint or --samples, one of them (see --help)")
    if args.batch < 1 or (args.n is not None and args.n < 1):
        raise UserError("--batch and --n must be 1 or more")
    if args.samples is not None and args.ref is None:
        raise UserError(f"--samples needs --ref: {', '.join(NAMED)}, images or statistics")
    metrics, steps = _metrics(args.metrics), _steps(args.steps)
    ctx = _processes(args)
    assert_same_on_all_ranks(ctx, {name: str(value) for name, value in vars(args).items()}, "arguments")
    extractor = _extractor(args, metrics, ctx)
    if args.samples is not None:
        variants, out, reference = _of_samples(args), Path("eval-results"), _reference(args, ctx)
    else:
        variants, out, reference = _of_checkpoint(args, steps, ctx)
    out = args.out or out
    options = MetricOptions(kid_subset_size=args.kid_subset_size)
    resume = "continue" if args.resume else "fresh"
    request = Request(metrics, extractor, reference, options, args.batch, out, args.cache, resume)
    results = evaluate(request, variants, ctx)
    if results is not None:
        print(table(results))
        for text in dict.fromkeys(warning for item in results for warning in item["warnings"]):
            print(f"warning: {text}", file=sys.stderr)
        print(f"written to {out}/", file=sys.stderr)
    return 0


def _processes(args: argparse.Namespace) -> DistributedContext:
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here")
    return start_distributed(args.device)


def _metrics(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [metric for metric in found if metric not in METRICS]
    if unknown or not found:
        raise UserError(f"--metrics {text!r}: choose from {', '.join(METRICS)}")
    return found


def _steps(text: str) -> tuple[int, ...]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--steps {text!r}: give numbers of 1 or more, such as 1,2,4")
    return tuple(dict.fromkeys(int(part) for part in parts))


def _extractor(args: argparse.Namespace, metrics: tuple[str, ...], ctx: DistributedContext) -> Extractor:
    options = Options(ctx.device, args.weights, not args.offline, args.allow_weights)
    run_on_rank0(ctx, lambda: prefetch(args.extractor, options))
    return create(args.extractor, options, metrics)


def _reference(args: argparse.Namespace, ctx: DistributedContext) -> Reference:
    """Open --ref on the main process first, since that may download, then on the others."""
    run_on_rank0(ctx, lambda: open_reference(args.ref, args.data, not args.offline) and None)
    return open_reference(args.ref, args.data, not args.offline)


def _of_samples(args: argparse.Namespace) -> list[Variant]:
    source = read_images(args.samples)
    source = source.first(args.n if args.n is not None else min(FULL_N, source.n))
    return [Variant(args.samples.stem or "samples", source, {}, {"samples": str(args.samples)})]


def _of_checkpoint(
    args: argparse.Namespace, steps: tuple[int, ...], ctx: DistributedContext
) -> tuple[list[Variant], Path, Reference]:
    """Variants, where their results go, and what they are compared with."""
    what = args.what or args.ckpt
    path, checkpoint = open_checkpoint(what)
    sampling = Sampling(args.n or FULL_N, args.seed, args.labels, args.quantise)
    variants = variants_of(path, checkpoint, file_sha256(path), args.ema, steps, sampling, ctx.device)
    run = what if what.is_dir() else path.parent.parent
    out = RunFolder(run).eval if RunFolder(run).config_file.exists() else Path("eval-results")
    if args.ref is not None:
        return variants, out, _reference(args, ctx)
    config = config_from_tree(checkpoint.meta["config"], str(path))
    run_on_rank0(ctx, lambda: training_images(config, not args.offline) and None)
    return variants, out, training_images(config, not args.offline)


def _make_ref(argv: list[str]) -> int:
    out = argparse.ArgumentParser("python -m eval.fid make-ref")
    out.add_argument("--ref", required=True, help=f"{', '.join(NAMED)}, or images")
    out.add_argument("--out", type=Path, required=True, help="the npz to write")
    _common(out)
    args = out.parse_args(argv)
    ctx = _processes(args)
    extractor = _extractor(args, ("fid",), ctx)
    reference = _reference(args, ctx)
    check_reference(reference, ("fid",), extractor, None, MetricOptions())
    work = args.cache / "work"
    prepared = prepare(reference, ("fid",), extractor, args.cache, work, ctx, "reference")
    if prepared is not None:
        print(write_reference(args.out, reference, prepared, extractor))
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _selftest(argv: list[str]) -> int:
    out = argparse.ArgumentParser("python -m eval.fid selftest")
    _common(out)
    args = out.parse_args(argv)
    options = Options(torch.device("cpu"), args.weights, False, args.allow_weights)
    return selftest(options, args.data, args.cache, _processes(args))


if __name__ == "__main__":
    sys.exit(run_main(main))
