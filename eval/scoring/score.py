"""Scoring a run as its recipe says: at the end of the job, and on a schedule while it trains."""

import math
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from eval.scoring.evaluate import Cost, evaluate
from eval.scoring.extractors import INCEPTION_FLOPS, Extractor, Options, affordable, create, dims_of, prefetch
from eval.scoring.metrics import MetricOptions, frechet
from eval.scoring.options import INCEPTION, NAMED
from eval.scoring.protocol import Request, table
from eval.scoring.references import Reference, check_reference, recipe_reference
from eval.scoring.sources import Sampling, sample_flops, targets_of
from eval.scoring.threads import interruptible
from meanflow.data import LatentsConfig
from meanflow.errors import AssetError, UserError
from meanflow.files import read_json, sha256_file, write_json
from meanflow.logs import log
from meanflow.precision import exact_float32
from meanflow.random import generator
from meanflow.training.checkpoint import Checkpoint, checkpoint_path
from meanflow.training.config import RunConfig
from meanflow.training.model import codec_of, device_of, open_checkpoint
from meanflow.training.processes import DistributedContext, run_on_rank0
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState

METRICS = ("fid",)
SEED = 0
BEST = "best.pt"
SIZES = {("cifar10", "train"): 50_000, ("cifar10", "test"): 10_000, ("digits", "train"): 1_797}  # images
REAL_VS_REAL_UP_TO = 1024  # numbers in an image; the distance between halves of large images costs as much as a score


def preflight(config: RunConfig) -> list[str]:
    """Before training: can this run be scored? Fetches the extractor's weights, VAE and reference if they are not here.

    Returns warnings: training does not need a score. Raises UserError for settings that can never work, and
    AssetError for a reference file that is not there.
    """
    shape, cpu = config.image_shape, torch.device("cpu")
    try:
        extractor = recipe_extractor(config, Options(cpu, allow_download=True), METRICS)
        codec_of(config, cpu)
    except AssetError as error:
        return [f"this run can be trained but not scored: {error}"]
    extractor.check_image(shape, "this recipe")
    if config.eval.reference is None and not isinstance(config.data, LatentsConfig):
        return list(extractor.warnings)
    try:
        reference = recipe_reference(config)
    except AssetError as error:
        if config.eval.reference not in NAMED:
            raise
        return [f"this run can be trained but not scored: {error}"]
    return [*extractor.warnings, *check_reference(reference, METRICS, extractor, shape, MetricOptions())]


def cost_line(config: RunConfig) -> str:
    """What the score at the end of the job will take, as `--dry-run` says it: nothing is opened or fetched.

    Raises UserError if there is no such extractor.
    """
    name, warnings = affordable(config.eval.extractor, config.image_shape)
    n, steps, data = config.eval.samples, config.eval.steps, config.data
    named = config.eval.reference is not None  # mostly statistics, which cost nothing
    m = SIZES.get((data.source, data.split), 0) if not named and getattr(data, "path", None) is None else 0
    flops = sum(sample_flops(config, count) for count in steps) * n
    flops += INCEPTION_FLOPS * (n * len(steps) + m) * (name == INCEPTION)
    line = Cost(n, m, len(steps), dims_of(name, config.image_shape), flops).line(name, device_of(None))
    lines = [f"{line}{'' if m or named else ', besides the training images'}", *warnings]
    return "\n".join(f"{label:<18}{text}" for label, text in zip(["scoring", ""], lines, strict=False))


def score_run(run: RunFolder, config: RunConfig, ctx: DistributedContext, what: Path | None = None) -> list[dict]:
    """Score the checkpoint `what` (None: the newest) with the recipe's EMA at each of `config.eval.steps`.

    Returns the results (rank 0; elsewhere none). They are written to RUN/eval/*.json. What an interrupted call has done
    is used, and results that are there and up to date are not made again. Raises what `evaluate` raises.
    """
    path, checkpoint = open_checkpoint(what or run.path)
    sampling = Sampling(config.eval.samples, SEED, "random", config.sample.uint8)
    ema, steps = repr(config.ema.eval), config.eval.steps
    targets = targets_of(path, checkpoint, sha256_file(path), ema, steps, sampling, ctx.device)
    request = _request(run, config, _extractor(config, ctx), recipe_reference(config))
    return evaluate(request, targets, ctx) or []


def score_guidance(
    run: RunFolder,
    config: RunConfig,
    ctx: DistributedContext,
    guidances: tuple[float, ...],
    interval: tuple[float, float] | None,
    n: int,
    steps: int,
    ema: str | None,
) -> list[dict]:
    """Score the newest checkpoint at several guidance scales, on one set of noises and labels: see `score_run`."""
    path, checkpoint = open_checkpoint(run.path)
    sampling, digest = Sampling(n, SEED, "random", config.sample.uint8), sha256_file(path)
    guided = {"guidances": guidances, "intervals": (interval,)}
    targets = targets_of(path, checkpoint, digest, ema, (steps,), sampling, ctx.device, **guided)
    request = _request(run, config, _extractor(config, ctx), recipe_reference(config))
    return evaluate(request, targets, ctx) or []


class ScoreDuring:
    """The hook of `meanflow.training.loop.train`: scores every EMA at every `eval.steps`, and keeps the best.

    The course of training does not change: the network is not touched (copies are scored), and random states and
    arithmetic switches are put back. The best checkpoint, by the recipe's EMA at the first of `eval.steps`, is kept as
    checkpoints/best.pt.
    """

    def __init__(self):
        self._reference: Reference | None = None

    def __call__(self, run: RunFolder, config: RunConfig, state: TrainState, ctx: DistributedContext) -> None:
        with _undisturbed(ctx.device):
            try:
                extractor = _extractor(config, ctx)
            except AssetError as error:
                log.warning(f"step {state.step:,} is not scored: {error}")
                return
            self._reference = self._reference or recipe_reference(config)
            path = checkpoint_path(run.checkpoints, state.step)
            meta = read_json(path.with_suffix(".json"))
            averages = {repr(decay): average for decay, average in state.ema.averages.items()}
            sampling = Sampling(config.eval.every_samples, SEED, "random", config.sample.uint8)
            checkpoint, steps = Checkpoint({}, averages, {}, meta), config.eval.steps
            targets = targets_of(path, checkpoint, meta["sha256"], "all", steps, sampling, ctx.device)
            request = _request(run, config, extractor, self._reference)
            results = evaluate(request, targets, ctx, progress=False)
        if results is not None:
            log.info(table(results))
            keep_best(path, results, extractor.label("fid"), repr(config.ema.eval), config.eval.steps[0])


def keep_best(path: Path, results: list[dict], metric: str, ema: str, nfe: int) -> bool:
    """Keep checkpoint `path` as best.pt beside it if its `metric` for (ema, nfe) is the lowest yet at this N."""
    how = {"ema": ema, "nfe": nfe}
    found = next(r for r in results if all(r["protocol"][key] == value for key, value in how.items()))
    score = {"metric": metric, "n": found["protocol"]["n"], **how}
    value, best = found["metrics"][metric], path.with_name(BEST)
    if best.exists() and best.with_suffix(".json").exists():
        before = read_json(best.with_suffix(".json")).get("best", {})
        comparable = all(before.get(key) == value for key, value in score.items())
        if comparable and before["value"] <= value:
            return False
    temporary = best.with_suffix(".tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)  # the same file under a second name: no space, no time
    except OSError:
        shutil.copyfile(path, temporary)
    os.replace(temporary, best)
    write_json(best.with_suffix(".json"), {**read_json(path.with_suffix(".json")), "best": {**score, "value": value}})
    return True


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """Random states as before afterwards, and the device's memory given back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
    if device.type == "cuda":
        torch.cuda.empty_cache()


def recipe_extractor(config: RunConfig, options: Options, metrics: tuple[str, ...]) -> Extractor:
    """The recipe's, or a cheaper one with a warning where images are too large for it. Raises what `create` raises."""
    name, warnings = affordable(config.eval.extractor, config.image_shape)
    extractor = create(name, options, metrics)
    return replace(extractor, warnings=(*extractor.warnings, *warnings))


def _extractor(config: RunConfig, ctx: DistributedContext) -> Extractor:
    """Rank 0 downloads missing weights before the others open them."""
    options = Options(ctx.device, allow_download=True)
    run_on_rank0(ctx, lambda: prefetch(config.eval.extractor, options))
    return recipe_extractor(config, options, METRICS)


def _request(run: RunFolder, config: RunConfig, extractor: Extractor, reference: Reference) -> Request:
    return Request(METRICS, extractor, reference, MetricOptions(), config.eval.batch, run.eval, None, resume="reuse")


# --- what the job prints at its end ------------------------------------------------------------------------------


def closing_table(config: RunConfig, run: RunFolder, results: list[dict[str, Any]]) -> str:
    """Scores by NFE, the real-vs-real distance where it is cheap, and where the files are."""
    cells = [("distance", "value", "samples")]
    for result in results:
        for name, value in result["metrics"].items():
            protocol = result["protocol"]
            note = "" if result["comparable"] or name.startswith("fd-") else " (not comparable)"
            cells.append((f"{protocol['nfe']}-NFE {name}{note}", f"{value:.3f}", f"{protocol['n']:,}"))
    if math.prod(config.image_shape) <= REAL_VS_REAL_UP_TO:
        cells.append(("two halves of the real images", f"{real_vs_real(config):.3f}", ""))
    width = max(len(row[0]) for row in cells)
    lines = [f"{name:<{width}}  {value:>9}  {count:>9}".rstrip() for name, value, count in cells]
    files = {
        "samples": run.path / "samples.png",
        **({"guidance": run.path / "guidance.png"} if config.eval.guidance else {}),
        "curves": run.curves,
        "scores": run.eval,
        "metrics": run.metrics_file,
        "weights": run.checkpoints,
    }
    return "\n".join(["", *lines, "", *(f"{label:<8}  {path}" for label, path in files.items())])


def real_vs_real(config: RunConfig) -> float:
    """The distance between two random halves of the reference images: what a perfect generator would score.

    For small extractors such as pixels. Raises UserError if the reference is statistics without images.
    """
    cpu = torch.device("cpu")
    extractor = recipe_extractor(config, Options(cpu, allow_download=True), METRICS)
    source = recipe_reference(config).images
    if source is None:
        raise UserError(f"eval.reference {config.eval.reference} has no images to halve")
    order = torch.randperm(source.n, generator=generator(SEED, "floor"))  # this stream's name, for the same numbers
    images = source.images(0, source.n)
    halves = (order[: source.n // 2], order[source.n // 2 :])
    with exact_float32():
        features = [extractor.extract(images[half])[extractor.layers["fid"]] for half in halves]
    return interruptible(lambda: frechet(*features), cpu)
