"""Scoring a run as its recipe says: at the end of the job, and on a schedule while it trains."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eval.scoring.evaluate import evaluate
from eval.scoring.extractors import Extractor, Options, create, prefetch
from eval.scoring.files import default_cache, read_json, write_json
from eval.scoring.metrics import MetricOptions, Statistics, frechet
from eval.scoring.protocol import Request, table
from eval.scoring.references import NAMED, Reference, check_reference, open_reference, reference_of_images
from eval.scoring.subjects import Sampling, variants_of
from meanflow.data import DataConfig, LatentsConfig, load_dataset
from meanflow.data.dataset import digits
from meanflow.errors import AssetError, UserError
from meanflow.logs import log
from meanflow.precision import exact_float32
from meanflow.random import generator
from meanflow.training.checkpoint import Checkpoint, checkpoint_path, file_sha256
from meanflow.training.config import RunConfig
from meanflow.training.model import codec_of, open_checkpoint
from meanflow.training.processes import DistributedContext, run_on_rank0
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState

METRICS = ("fid",)
SEED = 0
BEST = "best.pt"
REAL_VS_REAL_UP_TO = 1024  # numbers in an image; the distance between halves of large images costs as much as a score
DOWNLOADS = "data"  # where references are kept, if the recipe has no folder for downloads


def preflight(config: RunConfig) -> list[str]:
    """Before training: can this run be scored? Fetches the extractor's weights, VAE and reference if they are not here.

    Returns warnings: training does not need a score. Raises UserError for settings that can never work, and
    AssetError for a reference of one's own that is not there.
    """
    shape = config.image_shape
    try:
        extractor = _extractor(config, torch.device("cpu"))
        codec_of(config, torch.device("cpu"))
    except AssetError as error:
        return [f"this run can be trained but not scored: {error}"]
    extractor.check_image(shape, "this recipe")
    if config.eval.reference is None and not isinstance(config.data, LatentsConfig):
        return []
    try:
        reference = _reference(config)
    except AssetError as error:
        if config.eval.reference not in NAMED:
            raise
        return [f"this run can be trained but not scored: {error}"]
    return check_reference(reference, METRICS, extractor, shape, MetricOptions())


def score_run(run: RunFolder, config: RunConfig, ctx: DistributedContext, what: Path | None = None) -> list[dict]:
    """Score the checkpoint `what` (None: the newest) with the recipe's EMA at each of `config.eval.steps`.

    Returns the results (main process). They are written to RUN/eval/*.json. What an interrupted
    call has done is used, and results that stand there already are not made again. Raises what
    `eval.scoring.evaluate.evaluate` raises.
    """
    path, checkpoint = open_checkpoint(what or run.path)
    sampling = Sampling(config.eval.samples, SEED, "random", config.sample.uint8)
    variants = variants_of(
        path, checkpoint, file_sha256(path), repr(config.ema.eval), config.eval.steps, sampling, ctx.device
    )
    extractor = _extractor_for_all(config, ctx)
    results = evaluate(_request(run, config, extractor, _reference(config)), variants, ctx)
    return [] if results is None else results


class ScoreDuring:
    """The hook of `meanflow.training.loop.train`: scores every EMA at every `eval.steps`, and keeps the best.

    The course of training does not change: the network is not touched (copies are scored), and random states and
    arithmetic switches are put back. The best checkpoint, by the recipe's EMA at the first of `eval.steps`, is
    kept as checkpoints/best.pt.
    """

    def __init__(self):
        self._reference: Reference | None = None

    def __call__(self, run: RunFolder, config: RunConfig, state: TrainState, ctx: DistributedContext) -> None:
        with _undisturbed(ctx.device):
            try:
                extractor = _extractor_for_all(config, ctx)
            except AssetError as error:
                log.warning(f"step {state.step:,} is not scored: {error}")
                return
            self._reference = self._reference or _reference(config)
            path = checkpoint_path(run.checkpoints, state.step)
            meta = read_json(path.with_suffix(".json"))
            averages = {repr(decay): average for decay, average in state.ema.averages.items()}
            sampling = Sampling(config.eval.every_samples, SEED, "random", config.sample.uint8)
            variants = variants_of(
                path,
                Checkpoint({}, averages, {}, meta),
                meta["sha256"],
                "all",
                config.eval.steps,
                sampling,
                ctx.device,
            )
            request = _request(run, config, extractor, self._reference)
            results = evaluate(request, variants, ctx, progress=False)
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


def real_vs_real(config: RunConfig) -> float:
    """The distance between two random halves of the reference images: what a perfect generator would score.

    For small extractors such as pixels. Raises UserError if the reference is statistics without images.
    """
    alone = DistributedContext(0, 1, torch.device("cpu"))
    extractor = _extractor(config, alone.device)
    source = _reference(config).images
    if source is None:
        raise UserError(f"eval.reference {config.eval.reference} has no images to halve")
    order = torch.randperm(source.n, generator=generator(SEED, "floor"))
    images = source.images(0, source.n)
    halves = (order[: source.n // 2], order[source.n // 2 :])
    with exact_float32():
        features = [extractor.extract(images[half])[extractor.layers["fid"]] for half in halves]
    return frechet(*(Statistics.of(feature) for feature in features))


def _extractor(config: RunConfig, device: torch.device) -> Extractor:
    return create(config.eval.extractor, Options(device, allow_download=True), METRICS)


def _extractor_for_all(config: RunConfig, ctx: DistributedContext) -> Extractor:
    """The main process downloads what is missing before the others look."""
    options = Options(ctx.device, allow_download=True)
    run_on_rank0(ctx, lambda: prefetch(config.eval.extractor, options))
    return create(config.eval.extractor, options, METRICS)


def _reference(config: RunConfig) -> Reference:
    """Raises AssetError where it is not there, and UserError where a latent recipe names none."""
    if config.eval.reference is None:
        return training_images(config)
    root = config.data.root if isinstance(config.data, DataConfig) else DOWNLOADS
    return open_reference(config.eval.reference, Path(root), allow_download=True)


def training_images(config: RunConfig, allow_download: bool = True) -> Reference:
    """The run's own training images, as they are: not flipped, not augmented.

    Raises AssetError if they are not there (and, for CIFAR-10, may not be downloaded), and UserError for latents of
    image files, of which the images are not kept.
    """
    data, (channels, size, _) = config.data, config.image_shape
    if isinstance(data, LatentsConfig):
        if data.source != "digits":
            raise UserError("eval.reference is null, and of latents the images are not kept: name statistics or images")
        return reference_of_images(digits(data.split).images, f"digits-{data.split}")
    if data.path is None and data.source == "cifar10" and not allow_download:
        return open_reference(f"cifar10-{data.split}", Path(data.root), allow_download)
    images = load_dataset(data, size, channels).images
    return reference_of_images(images, data.path or f"{data.source}-{data.split}")


def _request(run: RunFolder, config: RunConfig, extractor: Extractor, reference: Reference) -> Request:
    cache = default_cache()
    return Request(METRICS, extractor, reference, MetricOptions(), config.eval.batch, run.eval, cache, resume="reuse")
