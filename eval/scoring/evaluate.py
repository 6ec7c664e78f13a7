"""One evaluation from preflight to results: check everything, extract, compute, write.

The command line (`eval.fid`) and the evaluation during training (`eval.during`) both come through here.
"""

import shutil
import time
from pathlib import Path

from eval.scoring.features import extract_features, images_done
from eval.scoring.files import write_json
from eval.scoring.metrics import compute
from eval.scoring.prepare import Prepared, prepare
from eval.scoring.protocol import Request, Variant, flat, open_work, result, settings, stands
from eval.scoring.references import check_reference
from eval.scoring.workers import one_thread
from meanflow.errors import AssetError, IncompleteError, UserError
from meanflow.training.processes import DistributedContext, assert_same_on_all_ranks, run_on_rank0


def preflight(request: Request, variants: list[Variant]) -> list[str]:
    """Everything that can be known before the first sample. Returns warnings.

    Raises UserError (what does not fit together), NumericsError (statistics) or AssetError (the disk).
    """
    extractor, options = request.extractor, request.options
    warnings = list(extractor.warnings)
    for variant in variants:
        source = variant.source
        extractor.check_image(source.shape, variant.name)
        least = _least(request)
        if source.n < least:
            raise UserError(
                f"{', '.join(request.metrics)} need {least:,} samples or more and there are {source.n:,}: raise --n"
                f"{' or lower --kid-subset-size' if 'kid' in request.metrics else ''}"
            )
    shape = variants[0].source.shape
    warnings += check_reference(request.reference, request.metrics, extractor, shape, options)
    _check_disk(request, variants)
    return warnings


def _least(request: Request) -> int:
    """Samples that the chosen metrics need: a covariance, a KID subset, an IS split, a neighbourhood."""
    options = request.options
    least = {"kid": options.kid_subset_size, "isc": options.isc_splits, "prc": options.prc_neighborhood + 1}
    return max(2, *(least.get(metric, 2) for metric in request.metrics))


def _check_disk(request: Request, variants: list[Variant]) -> None:
    """Raises AssetError if the features would not fit where they are kept until the end."""
    dims = request.extractor.dims(variants[0].source.shape)
    wide = 4 * sum(dims[layer] for layer in _layers(request))
    needed = wide * sum(variant.source.n for variant in variants)
    if request.reference.images is not None:
        needed += 2 * wide * request.reference.images.n  # pieces and cache
    request.out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(request.out).free
    if needed > free:
        raise AssetError(
            f"{request.out} has {free / 2**30:.1f} GB free and the features need {needed / 2**30:.1f} GB: "
            "make room, or put --out elsewhere"
        )


def _layers(request: Request) -> list[str]:
    return sorted({request.extractor.layers[metric] for metric in request.metrics})


def evaluate(
    request: Request, variants: list[Variant], ctx: DistributedContext, progress: bool = True
) -> list[dict] | None:
    """The results of all `variants`, on process 0 (None on the others), written to `request.out` as JSON.

    Raises what `preflight` raises, NumericsError for samples or features that are not finite, and
    IncompleteError when interrupted: the features so far stay, and the same request with `resume` continues.
    """
    warnings = preflight(request, variants)
    wanted = settings(request, variants)
    assert_same_on_all_ranks(ctx, flat(wanted), "settings")
    if request.resume == "reuse":
        standing = run_on_rank0(ctx, lambda: [stands(_file(request, v), wanted[v.name]) for v in variants])
        if all(standing):
            return standing if ctx.is_main else None
    work = run_on_rank0(ctx, lambda: open_work(request.out / "work", wanted, request.resume))
    results: list[dict] = []
    try:
        prepared = prepare(
            request.reference,
            request.metrics,
            request.extractor,
            request.cache,
            work,
            ctx,
            "reference" if progress else None,
        )
        for variant in variants:
            found = _score(request, variant, prepared, work, ctx, warnings, progress)
            if found is not None:
                results.append(found)
    except KeyboardInterrupt:
        if ctx.is_main:
            for variant in variants[len(results) :]:
                unfinished = result(request, variant, "incomplete", {}, warnings, {"processes": ctx.world})
                write_json(_file(request, variant), unfinished)
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


def _file(request: Request, variant: Variant) -> Path:
    return request.out / f"{variant.name}.json"


def _score(
    request: Request,
    variant: Variant,
    prepared: Prepared | None,
    work: Path,
    ctx: DistributedContext,
    warnings: list[str],
    progress: bool,
) -> dict | None:
    """Extract, compute and write one variant; its result on process 0."""
    started = time.monotonic()
    features = extract_features(
        variant.source,
        request.extractor,
        _layers(request),
        request.batch,
        work / variant.name,
        ctx,
        variant.name if progress else None,
    )
    if features is None or prepared is None:
        return None
    extracted = time.monotonic()
    with one_thread(request.extractor.device):
        metrics = compute(
            request.metrics, request.extractor, features, prepared.statistics, prepared.features, request.options
        )
    circumstances = {
        "processes": ctx.world,
        "seconds_features": round(extracted - started, 3),
        "seconds_metrics": round(time.monotonic() - extracted, 3),
    }
    found = result(request, variant, "complete", metrics, warnings, circumstances)
    write_json(_file(request, variant), found)
    return found
