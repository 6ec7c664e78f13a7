"""Is this installation's Inception the one behind published FIDs? Its score of CIFAR-10 is known.

torch-fidelity publishes an Inception Score of 11.2368 for the 50,000 training images, which needs no
reference: weights, resizing, arithmetic and metric must all be right to meet it.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from torchvision.datasets import CIFAR10

from eval.scoring.extractors import INCEPTION, Options, create
from eval.scoring.metrics import MetricOptions, compute
from eval.scoring.prepare import prepare
from eval.scoring.references import open_reference
from meanflow.errors import EXIT_ASSET, AssetError, NumericsError
from meanflow.training.processes import DistributedContext, gather

PUBLISHED_IS, TOLERANCE = 11.2368, 0.01
METRICS = ("isc", "fid")


def selftest(options: Options, data: Path, cache: Path, ctx: DistributedContext) -> int:
    """Print the Inception Score of CIFAR-10's training set, and its FID against the test set.

    Nothing is downloaded: without weights or without CIFAR-10 in `data` it says "skipped" and returns 3. Raises
    NumericsError if the score is not the published one.
    """
    try:
        extractor = create(INCEPTION, replace(options, device=ctx.device, allow_download=False), METRICS)
    except AssetError as error:
        return _skip("no weights", error, ctx)
    if not (data / CIFAR10.filename).exists():
        return _skip("no CIFAR-10", f"{data} has no {CIFAR10.filename}", ctx)
    train, test = (open_reference(name, data, False) for name in ("cifar10-train", "cifar10-test"))
    with tempfile.TemporaryDirectory() as scratch:
        work = Path(gather(ctx, scratch)[0])  # one folder for all
        seen = prepare(train, METRICS, extractor, cache, work, ctx, "train", keep=METRICS)
        compared = prepare(test, ("fid",), extractor, cache, work, ctx, "test")
        ctx.barrier()
    if seen is None or compared is None:
        return 0
    features = {extractor.layers[metric]: seen.features[metric] for metric in METRICS}
    found = compute(METRICS, extractor, features, compared.statistics, {}, MetricOptions())
    score = found["isc_mean"]
    print(f"Inception Score of the training set  {score:.4f}  (published: {PUBLISHED_IS})")
    print(f"FID of the training set to the test set  {found['fid']:.4f}  (users report about 3.1)")
    if abs(score - PUBLISHED_IS) > TOLERANCE:
        raise NumericsError(f"the Inception Score is {score:.4f}, not {PUBLISHED_IS}: FIDs made here compare with none")
    print("ok")
    return 0


def _skip(what: str, reason: object, ctx: DistributedContext) -> int:
    if ctx.is_main:
        print(f"skipped: {what}")
        print(reason, file=sys.stderr)
    return EXIT_ASSET
