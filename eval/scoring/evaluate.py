"""One evaluation from preflight to results: check everything, say what it costs, extract, compute, write.

The command line (`eval.fid`) and the job (`eval.scoring.score`) both come through here.
"""

import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torchvision.datasets import CIFAR10

from eval.scoring.extractors import Options, create
from eval.scoring.features import KEPT_UNASKED, Cache, Prepared, extract_features, images_done, prepare
from eval.scoring.metrics import MetricOptions, compute
from eval.scoring.options import INCEPTION
from eval.scoring.protocol import Request, open_work, protocol, result, up_to_date
from eval.scoring.references import check_reference, open_reference
from eval.scoring.sources import EvalTarget
from eval.scoring.threads import exit_at_once, interruptible
from meanflow.errors import AssetError, IncompleteError, NumericsError, UserError
from meanflow.files import make_folder, write_json
from meanflow.logs import log
from meanflow.training.microbatch import free_memory
from meanflow.training.processes import DistributedContext, assert_same_on_all_ranks, gather, run_on_rank0
from meanflow.training.settings import flatten

CPU_FLOPS, GPU_FLOPS = 1e10, 1e13  # a second, of a core and of a GPU: enough to tell minutes from hours
PUBLISHED_IS, TOLERANCE = 11.2368, 0.01  # of CIFAR-10's training images, as torch-fidelity publishes it


def evaluate(
    request: Request, targets: list[EvalTarget], ctx: DistributedContext, progress: bool = True
) -> list[dict] | None:
    """The results of all `targets`, on rank 0 (None on the others), written to `request.out` as JSON.

    Raises what `preflight` raises, NumericsError for samples or features that are not finite, and IncompleteError when
    interrupted: the features so far stay, and the same request with `resume` continues.
    """
    warnings = preflight(request, targets)
    protocols = {target.name: protocol(request, target) for target in targets}
    assert_same_on_all_ranks(ctx, flatten(protocols), "settings")
    if request.resume == "reuse":
        found = run_on_rank0(ctx, lambda: [up_to_date(_file(request, t), protocols[t.name]) for t in targets])
        if all(found):
            return found if ctx.is_main else None
    if progress:
        for warning in warnings if request.resume != "reuse" else ():  # the job logs them before training
            log.warning(warning)
        line = cost_of(request, targets).line(request.extractor.name, request.extractor.device, ctx.world)
        log.info(f"scoring {line}")
    work = run_on_rank0(ctx, lambda: open_work(request.out / "work", protocols, request.resume))
    cache = Cache(request.cache) if request.cache else Cache(request.out / "references", KEPT_UNASKED)
    results: list[dict] = []
    try:
        title = "reference" if progress else None
        prepared = prepare(request.reference, request.metrics, request.extractor, cache, work, ctx, title)
        for target in targets:
            found = _score(request, target, prepared, work, ctx, warnings, progress)
            if found is not None:
                results.append(found)
    except KeyboardInterrupt:
        if ctx.is_main:
            for target in targets[len(results) :]:
                unfinished = result(request, target, "incomplete", {}, warnings, {"processes": ctx.world})
                write_json(_file(request, target), unfinished)
        exit_at_once(IncompleteError.exit_code)
        raise IncompleteError(
            f"interrupted: the features of {images_done(work):,} images are kept in {work}; the same command "
            f"{'' if request.resume == 'reuse' else 'with --resume '}continues"
        ) from None
    if not ctx.is_main:
        return None
    shutil.rmtree(work)
    if not any(work.parent.iterdir()):
        work.parent.rmdir()
    return results


def _file(request: Request, target: EvalTarget) -> Path:
    return request.out / f"{target.name}.json"


def _score(
    request: Request,
    target: EvalTarget,
    prepared: Prepared | None,
    work: Path,
    ctx: DistributedContext,
    warnings: list[str],
    progress: bool,
) -> dict | None:
    """Extract, compute and write one target; its result on rank 0."""
    started = time.monotonic()
    title = target.name if progress else None
    extractor, pieces = request.extractor, work / target.name
    features = extract_features(target.source, extractor, request.layers, request.batch, pieces, ctx, title)
    if features is None or prepared is None:
        return None
    extracted = time.monotonic()
    metrics = interruptible(
        lambda: compute(request.metrics, extractor, features, prepared.fid, prepared.features, request.options),
        extractor.device,
    )
    circumstances = {
        "processes": ctx.world,
        "seconds_features": round(extracted - started, 3),
        "seconds_metrics": round(time.monotonic() - extracted, 3),
    }
    found = result(request, target, "complete", metrics, warnings, circumstances)
    write_json(_file(request, target), found)
    return found


# --- before it starts --------------------------------------------------------------------------------------------


def preflight(request: Request, targets: list[EvalTarget]) -> list[str]:
    """Everything that can be known before the first sample. Returns warnings.

    Raises UserError (what does not fit together), NumericsError (statistics) or AssetError (disk and memory).
    """
    for target in targets:
        request.extractor.check_image(target.source.shape, target.name)
    shape = targets[0].source.shape
    warnings = check_reference(request.reference, request.metrics, request.extractor, shape, request.options)
    least = _least(request)
    for target in targets:
        if target.source.n < least:
            raise UserError(
                f"{', '.join(request.metrics)} need {least:,} samples or more and there are {target.source.n:,}: "
                f"raise --n{' or lower --kid-subset-size' if 'kid' in request.metrics else ''}"
            )
    _check_room(request, targets)
    return [*request.extractor.warnings, *warnings]


def _least(request: Request) -> int:
    """Samples that the chosen metrics need: a covariance, a KID subset, an IS split, a neighbourhood."""
    options = request.options
    least = {"kid": options.kid_subset_size, "isc": options.isc_splits, "prc": options.prc_neighborhood + 1}
    return max(2, *(least.get(metric, 2) for metric in request.metrics))


def _check_room(request: Request, targets: list[EvalTarget]) -> None:
    """Raises AssetError if the features would fit neither the disk, where they are kept until the end, nor memory."""
    make_folder(request.out)
    if request.cache is not None:
        make_folder(request.cache)
    images, dims = request.reference.images, request.extractor.dims(targets[0].source.shape)
    wide = 4 * sum(dims[layer] for layer in request.layers)
    needed = wide * sum(target.source.n for target in targets) + (2 * wide * images.n if images else 0)
    free = shutil.disk_usage(request.out).free
    if needed > free:
        raise AssetError(
            f"{request.out} has {free / 2**30:.1f} GB free and the features need {needed / 2**30:.1f} GB: "
            "make room, or put --out elsewhere"
        )
    needed, free = cost_of(request, targets).memory, free_memory(torch.device("cpu"))
    if free is not None and needed > free:
        raise AssetError(
            f"{request.extractor.name} features need about {needed / 2**30:.1f} GB of memory and {free / 2**30:.1f} GB "
            "are free: lower --n, or use another extractor"
        )


@dataclass(frozen=True)
class Cost:
    """What it takes to score `n` samples `rounds` times against `m` images, by orders of magnitude."""

    n: int
    m: int
    rounds: int
    dims: int  # features of an image
    flops: float  # of sampling and extracting, all rounds

    @property
    def memory(self) -> float:
        """Bytes: features of both sides in float32 and float64, and a few square matrices."""
        return 12.0 * self.dims * (self.n + self.m) + 5 * 8.0 * min(self.n, self.dims) ** 2

    def line(self, extractor: str, device: torch.device, processes: int = 1) -> str:
        """In words, such as "5,000 samples: pixels, 64 features an image, …, minutes on CPU"."""
        rank = min(self.n, self.dims)
        distances = self.rounds * (2.0 * self.n * self.dims * rank + 25.0 * rank**3)
        rate = GPU_FLOPS if device.type == "cuda" else CPU_FLOPS * torch.get_num_threads()
        seconds = distances / CPU_FLOPS + self.flops / rate / processes
        limits = ((60, "less than a minute"), (3600, "minutes"), (24 * 3600, "hours"))
        duration = next((words for limit, words in limits if seconds < limit), "days")
        memory = f"{self.memory / 1e9:.1f} GB" if self.memory > 1e9 else f"{self.memory / 1e6:.0f} MB"
        return (
            f"{self.n:,} samples{f', {self.rounds} times' if self.rounds > 1 else ''}: {extractor}, "
            f"{self.dims:,} features an image, about {memory} of memory, {duration} on {device.type.upper()}"
        )


def cost_of(request: Request, targets: list[EvalTarget]) -> Cost:
    n, images = targets[0].source.n, request.reference.images
    m = images.n if images else 0
    dims = request.extractor.dims(targets[0].source.shape)
    flops = sum(target.source.flops for target in targets) * n + request.extractor.flops * (n * len(targets) + m)
    return Cost(n, m, len(targets), max(dims[layer] for layer in request.layers), flops)


# --- self-test ---------------------------------------------------------------------------------------------------


def selftest(options: Options, data: Path, cache: Path | None, ctx: DistributedContext) -> int:
    """Print the Inception Score of CIFAR-10's training set, and its FID against the test set; the exit code.

    The score needs no reference: weights, resizing, arithmetic and metric must all be right to meet the published one.
    Nothing is downloaded: without weights or without CIFAR-10 in `data` it says "skipped" and returns 3. Raises
    NumericsError if the score is another.
    """
    metrics = ("isc", "fid")
    try:
        extractor = create(INCEPTION, options, metrics)
    except AssetError as error:
        return _skipped("no weights", error, ctx)
    if not (data / CIFAR10.filename).exists():
        return _skipped("no CIFAR-10", f"{data} has no {CIFAR10.filename}", ctx)
    train, test = (open_reference(name, data, False) for name in ("cifar10-train", "cifar10-test"))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(gather(ctx, scratch)[0])  # one folder for all
        seen = prepare(train, metrics, extractor, Cache(cache or work), work, ctx, "train", keep=metrics)
        compared = prepare(test, ("fid",), extractor, Cache(cache or work), work, ctx, "test")
        ctx.barrier()
    if seen is None or compared is None:
        return 0
    features = {extractor.layers[metric]: seen.features[metric] for metric in metrics}
    found = compute(metrics, extractor, features, compared.fid, {}, MetricOptions())
    score = found["isc_mean"]
    print(f"Inception Score of the training set  {score:.4f}  (published: {PUBLISHED_IS})")
    print(f"FID of the training set to the test set  {found['fid']:.4f}  (users report about 3.1)")
    if abs(score - PUBLISHED_IS) > TOLERANCE:
        raise NumericsError(f"the Inception Score is {score:.4f}, not {PUBLISHED_IS}: FIDs made here compare with none")
    print("ok")
    return 0


def _skipped(what: str, reason: object, ctx: DistributedContext) -> int:
    if ctx.is_main:
        print(f"skipped: {what}")
        print(reason, file=sys.stderr)
    return AssetError.exit_code
