"""What the metrics need of a reference's images, extracted once and cached.

The cache is keyed by the content: the hash of the images' bytes, the extractor and its weights, never a name.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch import Tensor

from eval.scoring.extractors import Extractor
from eval.scoring.features import extract_features
from eval.scoring.files import NpzFile, sha256_json, write_npz
from eval.scoring.metrics import Statistics
from eval.scoring.references import Reference, size_words, who_made
from meanflow.errors import AssetError, UserError
from meanflow.training.processes import DistributedContext, run_on_rank0

REFERENCE_BATCH = 64  # fixed, so that a reference does not depend on the batch its user asks for


@dataclass(frozen=True)
class Prepared:
    """What the metrics need of a reference: statistics for fid, features (M, D) for kid and prc."""

    statistics: Statistics | None
    features: dict[str, Tensor]


def prepare(
    reference: Reference,
    metrics: tuple[str, ...],
    extractor: Extractor,
    cache: Path,
    work: Path,
    ctx: DistributedContext,
    title: str | None = None,
    keep: tuple[str, ...] = ("kid", "prc"),
) -> Prepared | None:
    """What `metrics` need (for those in `keep`, features), on process 0 (None on the others), from `cache` or
    extracted in `work`.
    """
    wanted = [m for m in metrics if m in keep]
    need_statistics = "fid" in metrics and reference.statistics is None
    if not wanted and not need_statistics:
        return Prepared(reference.statistics, {}) if ctx.is_main else None
    images = reference.images
    assert images is not None
    layers = sorted({extractor.layers[m] for m in (*wanted, *(["fid"] if need_statistics else []))})
    key = sha256_json([images.digest, extractor.name, extractor.weights, layers])[:32]
    features_file, statistics_file = cache / f"{key}-features.npz", cache / f"{key}-statistics.npz"
    if not wanted:
        cached = run_on_rank0(ctx, lambda: _cached_statistics(statistics_file))
        if cached is not None:
            return Prepared(cached, {}) if ctx.is_main else None
    features = run_on_rank0(ctx, lambda: _is_cached(features_file, layers, images.n)) or extract_features(
        images, extractor, layers, REFERENCE_BATCH, work / f"reference-{key}", ctx, title
    )
    if not ctx.is_main:
        return None
    if features is True:
        file = NpzFile(features_file)
        features = {layer: torch.from_numpy(file[layer]) for layer in layers}
    elif wanted:
        write_npz(features_file, {layer: value.numpy() for layer, value in features.items()})
    statistics = reference.statistics
    if need_statistics:
        statistics = Statistics.of(features[extractor.layers["fid"]])
        write_npz(statistics_file, statistics.as_dict())
    return Prepared(statistics, {m: features[extractor.layers[m]] for m in wanted})


def _cached_statistics(path: Path) -> Statistics | None:
    """Statistics this module wrote, or None if absent or damaged (then they are extracted again)."""
    if not path.exists():
        return None
    try:
        file = NpzFile(path)
        return Statistics(file["mu"], file["sigma"])
    except (AssetError, KeyError):
        return None


def _is_cached(path: Path, layers: list[str], n: int) -> bool:
    if not path.exists():
        return False
    try:
        file = NpzFile(path)
        return all(len(file[layer]) == n for layer in layers)
    except (AssetError, KeyError):
        return False


def write_reference(path: Path, reference: Reference, prepared: Prepared, extractor: Extractor) -> str:
    """`make-ref`: mu, sigma, n, provenance, and which extractor and weights made them. Returns the
    provenance.
    """
    if prepared.statistics is None or reference.images is None:
        raise UserError(f"{reference.spec} has no images to make a reference of")
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    provenance = (
        f"{reference.images.n} images of {reference.spec}, {size_words(reference.images.shape)}, "
        f"sha256 {reference.digest}; {who_made((extractor.name, extractor.weights or ''))}; "
        f"torch-fidelity {torch_fidelity.__version__}, torch {torch.__version__}, "
        f"{extractor.device.type}; {made}"
    )
    arrays = {
        **prepared.statistics.as_dict(),
        "n": np.int64(reference.images.n),
        "provenance": np.str_(provenance),
        "extractor": np.str_(extractor.name),
        "weights": np.str_(extractor.weights or ""),
    }
    write_npz(path, arrays)
    return provenance
