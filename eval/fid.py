"""Score a run, a checkpoint or a folder of images: FID, IS, KID, precision and recall.

python -m eval.fid runs/cifar10                            a run's newest checkpoint
python -m eval.fid runs/cifar10 --ema all --steps 1,2,4    several at once
python -m eval.fid --samples images.zip --ref cifar10-train
torchrun --nproc_per_node 8 -m eval.fid runs/cifar10       on all GPUs of a node
python -m eval.fid make-ref --ref FOLDER --out ref.npz     statistics of images, for --ref
python -m eval.fid selftest                                is this installation's FID the usual one?
"""

import argparse
import os
import shutil
import signal
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a script: the repository is the import root
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.evaluate import evaluate
from eval.extractors import INCEPTION, METRICS, Extractor, Options, create
from eval.metrics import MetricOptions
from eval.prepare import prepare, write_reference
from eval.processes import Processes, join_processes, leave_processes, pick_device
from eval.protocol import FULL_N, Request, Variant, table
from eval.references import NAMED, check_reference, open_reference
from eval.selftest import selftest
from eval.sources import read_images
from meanflow.errors import UserError, run_main

EXIT_CODES = """exit codes:
  0 done   2 usage or things that do not fit together   3 a file, the weights or the disk is missing
  4 unusable statistics or samples that are not finite  5 interrupted, --resume continues
Under torchrun the launcher reports a failed process by its own exit code 1."""


def parser() -> argparse.ArgumentParser:
    out = argparse.ArgumentParser(
        "eval.fid",
        description=__doc__,
        epilog=EXIT_CODES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = out.add_argument_group("what is scored (one of)")
    what.add_argument("what", nargs="?", metavar="WHAT", help="run folder or checkpoint (ours, official)")
    what.add_argument("--ckpt", type=Path, help="the same for a checkpoint file")
    what.add_argument("--samples", type=Path, help="folder, zip, tar or npz (arr_0) of images")
    how = out.add_argument_group("how")
    how.add_argument("--ref", help=f"{', '.join(NAMED)}, images or statistics (default: the run's own data)")
    how.add_argument("--metrics", default="fid", help=f"comma-separated of {', '.join(METRICS)} (fid)")
    how.add_argument("--n", type=int, help=f"number of samples ({FULL_N}; --samples: all, up to that)")
    how.add_argument("--steps", default="1", help="network evaluations a sample, comma-separated (1)")
    how.add_argument("--ema", help='which EMA by its decay, "all", or "none" for the online weights')
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
    group.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (auto)")
    group.add_argument("--batch", type=int, default=64, help="images at a time (64)")
    group.add_argument("--cache", type=Path, default=_cache_folder(), help="features of references")
    group.add_argument("--data", type=Path, default=Path("data"), help="where CIFAR-10 lives (data)")


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "meanflow" / "references"


def main(argv: list[str] | None = None) -> int:
    """The entry point. Raises UserError and its kin for `run_main` to print."""
    argv = sys.argv[1:] if argv is None else argv
    # Schedulers send SIGTERM: keep what is done, as after Ctrl-C.
    before = signal.signal(signal.SIGTERM, _interrupt)
    try:
        processes = join_processes()
        if argv[:1] == ["make-ref"]:
            return _make_ref(argv[1:], processes)
        if argv[:1] == ["selftest"]:
            return _selftest(argv[1:], processes)
        return _score(parser().parse_args(argv), processes)
    finally:
        signal.signal(signal.SIGTERM, before)
        leave_processes()


def _interrupt(signum, frame):
    raise KeyboardInterrupt


def _score(args: argparse.Namespace, processes: Processes) -> int:
    if sum(x is not None for x in (args.what, args.ckpt, args.samples)) != 1:
        raise UserError("say what to score: a run folder, a checkpoint or --samples, one of them (see --help)")
    metrics = _metrics(args.metrics)
    extractor = _extractor(args, metrics)
    if args.batch < 1 or (args.n is not None and args.n < 1):
        raise UserError("--batch and --n must be 1 or more")
    if args.samples is not None:
        variants, out = _variants_of_samples(args), args.out or Path("eval-results")
        if args.ref is None:
            raise UserError(f"--samples needs --ref: {', '.join(NAMED)}, images or statistics")
        ref = args.ref
    reference = processes_open(ref, args, processes)
    options = MetricOptions(kid_subset_size=args.kid_subset_size)
    request = Request(metrics, extractor, reference, options, args.batch, out, args.cache, args.resume)
    results = evaluate(request, variants, processes)
    if results is not None:
        print(table(results))
        for text in dict.fromkeys(w for item in results for w in item["warnings"]):
            print(f"warning: {text}", file=sys.stderr)
        print(f"written to {out}/", file=sys.stderr)
    return 0


def processes_open(ref: str, args: argparse.Namespace, processes: Processes):
    """Open the reference on process 0 first, since that may download, then on the others."""
    if not processes.first:
        processes.barrier()
        return open_reference(ref, args.data, not args.offline)
    reference = open_reference(ref, args.data, not args.offline)
    processes.barrier()
    return reference


def _metrics(text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [metric for metric in found if metric not in METRICS]
    if unknown or not found:
        raise UserError(f"--metrics {text!r}: choose from {', '.join(METRICS)}")
    return found


def _extractor(args: argparse.Namespace, metrics: tuple[str, ...]) -> Extractor:
    device = pick_device(args.device)
    options = Options(device, args.weights, not args.offline, args.allow_weights)
    return create(args.extractor, options, metrics)


def _variants_of_samples(args: argparse.Namespace) -> list[Variant]:
    source = read_images(args.samples)
    source = source.first(args.n if args.n is not None else min(FULL_N, source.n))
    return [Variant(args.samples.stem or "samples", source, {}, {"samples": str(args.samples)})]


def _make_ref(argv: list[str], processes: Processes) -> int:
    out = argparse.ArgumentParser("eval.fid make-ref")
    out.add_argument("--ref", required=True, help=f"{', '.join(NAMED)}, or images")
    out.add_argument("--out", type=Path, required=True, help="the npz to write")
    _common(out)
    args = out.parse_args(argv)
    extractor = _extractor(args, ("fid",))
    reference = processes_open(args.ref, args, processes)
    check_reference(reference, ("fid",), extractor, None, 0)
    work = args.cache / "work"
    prepared = prepare(reference, ("fid",), extractor, args.cache, work, processes, "reference")
    if prepared is not None:
        print(write_reference(args.out, reference, prepared, extractor))
        shutil.rmtree(work, ignore_errors=True)
    return 0


def _selftest(argv: list[str], processes: Processes) -> int:
    out = argparse.ArgumentParser("eval.fid selftest")
    _common(out)
    return selftest(out.parse_args(argv), processes)


if __name__ == "__main__":
    sys.exit(run_main(main))
