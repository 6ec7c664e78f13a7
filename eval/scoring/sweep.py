"""Guidance that is chosen after training: what each scale does to the samples of one run, on the same noises."""

from dataclasses import asdict, dataclass
from pathlib import Path

from eval.reports.guidance import Curve, draw
from eval.sampling.grid import class_labels
from eval.scoring.classifier import classifiable, classifier_accuracy
from eval.scoring.extractors import Options
from eval.scoring.score import METRICS, recipe_extractor, score_guidance
from meanflow.files import write_json
from meanflow.logs import log
from meanflow.training.config import RunConfig
from meanflow.training.model import load, to_uint8
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder

SHOWN, PER_SCALE = 3, 40  # scales of which samples are shown, and how many of each
COLUMNS = 8


@dataclass(frozen=True)
class Choice:
    """What is compared. Where a field is None, the recipe says. n: samples of each scale; steps: NFE."""

    guidances: tuple[float, ...]
    interval: tuple[float, float] | None = None
    n: int | None = None
    steps: int = 1
    ema: str | None = None


def sweep(run: RunFolder, config: RunConfig, ctx: DistributedContext, choice: Choice) -> Curve | None:
    """Score the run's newest checkpoint at each scale and write RUN/guidance.png and guidance.json.

    The distance is that of the recipe's extractor and reference (scores go to RUN/eval, and those that are there are
    not made again); for small images with classes a classifier says how many samples show the class asked for. Returns
    the curve (rank 0; None elsewhere). Raises what `score_run` raises, and UserError where guidance is no input.
    """
    n, omegas = choice.n or config.eval.samples, tuple(sorted(choice.guidances))
    results = score_guidance(run, config, ctx, omegas, choice.interval, n, choice.steps, choice.ema)
    if not ctx.is_main:
        return None
    model = load(run.path, choice.ema, ctx.device)
    guided = [model.guided(omega, choice.interval) for omega in omegas]
    metric = recipe_extractor(config, Options(ctx.device, allow_download=True), METRICS).label("fid")
    judged = None
    if classifiable(config) is None:
        judged = [classifier_accuracy(model, n, choice.steps, guidance=guidance) for guidance in guided]
    curve = Curve(
        metric=metric,
        omegas=omegas,
        interval=guided[0].interval,
        distances=tuple(result["metrics"][metric] for result in results),
        accuracies=None if judged is None else tuple(found.accuracy for found in judged),
        real_accuracy=None if judged is None else judged[0].real,
        n=n,
        nfe=choice.steps,
        ema=model.ema,
        step=model.meta["step"],
    )
    samples = {}
    labels = class_labels(model, PER_SCALE, None, COLUMNS)
    for k in _shown(len(omegas)):
        chosen = omegas[k], choice.interval
        images = model.sample(PER_SCALE, choice.steps, config.sample.seed, labels, None, 256, *chosen)
        samples[omegas[k]] = to_uint8(images, config.sample.uint8)
    write_json(_file(run, "json"), asdict(curve))
    draw(curve, samples, COLUMNS, _file(run, "png"))
    log.info(curve.table())
    return curve


def _shown(count: int) -> list[int]:
    """Which of `count` scales are shown: the first, the middle one and the last."""
    return sorted({round(k * (count - 1) / (SHOWN - 1)) for k in range(SHOWN)})


def _file(run: RunFolder, kind: str) -> Path:
    return run.path / f"guidance.{kind}"
