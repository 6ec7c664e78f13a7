"""FID, IS, KID, precision and recall, computed by torch-fidelity.

Added to torch-fidelity 0.4: both sides of a distance in float64, no setting that is silently ignored, one extractor for
all metrics, and the Fréchet distance of few samples without D × D matrices.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch_fidelity.defaults import DEFAULTS
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, KEY_METRIC_ISC_STD, isc_features_to_metric
from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric
from torch_fidelity.metric_prc import (
    KEY_METRIC_F_SCORE,
    KEY_METRIC_PRECISION,
    KEY_METRIC_RECALL,
    prc_features_to_metric,
)

from eval.scoring.extractors import Extractor
from meanflow.errors import NumericsError


@dataclass(frozen=True)
class Statistics:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mu: np.ndarray
    sigma: np.ndarray

    @staticmethod
    def of(features: Tensor) -> "Statistics":
        """Of float32 features (N, D), N ≥ 2, as torch-fidelity computes them (its mean is a float32 one)."""
        found = fid_features_to_statistics(features)
        return Statistics(found["mu"].astype(np.float64), found["sigma"].astype(np.float64))

    def as_dict(self) -> dict[str, np.ndarray]:
        return {"mu": self.mu, "sigma": self.sigma}


@dataclass(frozen=True)
class MetricOptions:
    """torch-fidelity's settings under its names and defaults; recorded in every result."""

    isc_splits: int = DEFAULTS["isc_splits"]
    kid_subsets: int = DEFAULTS["kid_subsets"]
    kid_subset_size: int = DEFAULTS["kid_subset_size"]
    prc_neighborhood: int = DEFAULTS["prc_neighborhood"]
    rng_seed: int = DEFAULTS["rng_seed"]


# --- the Fréchet distance ----------------------------------------------------------------------------------------


def low_rank(n: int, dims: int) -> bool:
    """Whether n features of `dims` numbers are kept as they are, rather than as a covariance of rank n − 1."""
    return n < dims


def frechet(fake: Tensor | Statistics, real: Tensor | Statistics) -> float:
    """The Fréchet distance between features (N, D) float32, N ≥ 2; either side may be their statistics instead.

    torch-fidelity computes it from two D × D covariances. Where a side has fewer samples than dimensions the same
    number comes from its centred features: with A = (x − mean)/√(N − 1), so that Σ₁ = AᵀA, and Σ₂ = BᵀB,
    tr (Σ₁Σ₂)^½ = ‖ABᵀ‖_* (the sum of singular values) = tr (AΣ₂Aᵀ)^½, of an N × M or N × N matrix.
    """
    fake, real = (x if isinstance(x, Statistics) or low_rank(*x.shape) else Statistics.of(x) for x in (fake, real))
    if isinstance(fake, Statistics) and isinstance(real, Statistics):
        return fid_statistics_to_metric(fake.as_dict(), real.as_dict(), verbose=False)[KEY_METRIC_FID]
    if isinstance(fake, Statistics):
        fake, real = real, fake  # the distance is symmetric
    mu, a = _centred(fake)
    if isinstance(real, Statistics):
        other_mu, other_trace = real.mu, np.trace(real.sigma)
        root = np.sqrt(np.linalg.eigvalsh(a @ real.sigma @ a.T).clip(0)).sum()
    else:
        other_mu, b = _centred(real)
        other_trace = (b**2).sum()
        root = np.linalg.svd(a @ b.T, compute_uv=False).sum()
    return float(((mu - other_mu) ** 2).sum() + (a**2).sum() + other_trace - 2 * root)


def _centred(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean (D,), as torch-fidelity's, and A (N, D) with Σ = AᵀA; float64."""
    x = features.numpy()
    wide = x.astype(np.float64)
    return x.mean(axis=0).astype(np.float64), (wide - wide.mean(axis=0)) / (len(x) - 1) ** 0.5


# --- all metrics -------------------------------------------------------------------------------------------------


def compute(
    metrics: tuple[str, ...],
    extractor: Extractor,
    features: dict[str, Tensor],
    reference: Statistics | Tensor | None,
    reference_features: dict[str, Tensor],
    options: MetricOptions,
) -> dict[str, float]:
    """The chosen `metrics` of generated `features` {layer: (N, D)}, under the names `extractor.label` gives.

    For fid: `reference`, statistics or features (M, D). For kid and prc: `reference_features`, {metric: (M, D)}.
    Raises NumericsError for a metric that is not a finite number.
    """
    layer = extractor.layers
    out: dict[str, float] = {}
    if "fid" in metrics:
        assert reference is not None
        out[extractor.label("fid")] = frechet(features[layer["fid"]], reference)
    if "isc" in metrics:
        found = isc_features_to_metric(
            features[layer["isc"]], splits=options.isc_splits, shuffle=True, rng_seed=options.rng_seed
        )
        out[extractor.label("isc_mean")] = found[KEY_METRIC_ISC_MEAN]
        out[extractor.label("isc_std")] = found[KEY_METRIC_ISC_STD]
    if "kid" in metrics:
        settings = _known(
            kid_subsets=options.kid_subsets,
            kid_subset_size=options.kid_subset_size,
            rng_seed=options.rng_seed,
            verbose=False,
        )
        found = kid_features_to_metric(features[layer["kid"]], reference_features["kid"], **settings)
        out[extractor.label("kid_mean")] = found[KEY_METRIC_KID_MEAN]
        out[extractor.label("kid_std")] = found[KEY_METRIC_KID_STD]
    if "prc" in metrics:
        # save_cpu_ram is the same arithmetic in blocks: 2 GB instead of three N × N matrices.
        settings = _known(prc_neighborhood=options.prc_neighborhood, save_cpu_ram=True, verbose=False)
        with torch.no_grad():
            found = prc_features_to_metric(features[layer["prc"]], reference_features["prc"], **settings)
        out[extractor.label("precision")] = found[KEY_METRIC_PRECISION]
        out[extractor.label("recall")] = found[KEY_METRIC_RECALL]
        out[extractor.label("f_score")] = found[KEY_METRIC_F_SCORE]
    broken = [name for name, value in out.items() if not np.isfinite(value)]
    if broken:
        raise NumericsError(f"{', '.join(broken)} is not a finite number: the features or statistics are unusable")
    return out


def _known(**settings) -> dict:
    """`settings`, all of which torch-fidelity knows: it silently ignores others."""
    unknown = settings.keys() - DEFAULTS.keys()
    if unknown:
        raise TypeError(f"torch-fidelity has no setting {sorted(unknown)}")
    return settings
