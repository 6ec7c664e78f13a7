"""What samples are compared with: statistics from a file, or images whose statistics are extracted once.

A file is judged by what it holds. Every common layout is read: `mu, sigma` (EDM, pytorch-fid and `make-ref`),
`mu, sigma, mu_s, sigma_s, arr_0` (ADM, whose 10,000 images serve precision and recall only), `ref_mu, ref_sigma` (the
JAX release), `arr_0` alone (images), torch-fidelity's cached `.pt`, a folder, zip or tar of images, and a run folder,
which means the images it was trained on.
"""

import datetime
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch_fidelity
from torch import Tensor
from torchvision.datasets import CIFAR10

from eval.scoring.extractors import Extractor
from eval.scoring.files import load_tensors, numpy_classes, read_npz, write_npz
from eval.scoring.metrics import MetricOptions, Statistics
from eval.scoring.options import ADM, CIFAR10_SPLITS, DIGITS
from eval.scoring.sources import ImagesSource, images_from_array, read_images
from eval.scoring.threads import interruptible
from meanflow.data import DataConfig, LatentsConfig, load_dataset
from meanflow.data.dataset import digits
from meanflow.errors import AssetError, NumericsError, UserError
from meanflow.files import sha256_file
from meanflow.training.config import RunConfig, load_config
from meanflow.training.run_folder import RunFolder

ADM_URL = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
NUMBERS = "fiu"  # numpy's kinds
DOWNLOADS = "data"  # where references are kept, if the recipe has no folder for downloads


@dataclass(frozen=True)
class Reference:
    """A reference as opened, before anything is extracted.

    `statistics` if it came with them; `images` if it has any, with the metrics they may serve in `serves`;
    `holds` says in words what it has. `made_by` is (extractor, weights hash) where the file tells.
    """

    spec: str
    digest: str
    holds: str
    statistics: Statistics | None = None
    images: ImagesSource | None = None
    serves: tuple[str, ...] = ()
    n: int | None = None
    provenance: str = ""
    made_by: tuple[str, str] | None = None

    def describe(self) -> dict:
        """For the result: what it was, and its hash."""
        return {
            "spec": self.spec,
            "holds": self.holds,
            "n": self.n,
            "sha256": self.digest,
            "provenance": self.provenance,
        }


def open_reference(spec: str, data_root: Path, allow_download: bool) -> Reference:
    """Open `--ref`: a name in `options.NAMED`, or a path. Statistics are validated; nothing is extracted.

    Named references are looked for in `data_root`, and downloaded there if `allow_download`.

    Raises AssetError for missing or damaged files, NumericsError for unusable statistics, UserError otherwise.
    """
    if spec == DIGITS:
        return reference_of_images(digits("train").images, spec)
    if spec == ADM:
        return _from_npz(_adm_file(data_root, allow_download))
    if spec in CIFAR10_SPLITS:
        if not allow_download and not (data_root / CIFAR10.filename).exists():
            raise AssetError(f"{data_root} has no {CIFAR10.filename} and downloads are off (--offline)")
        config = DataConfig(source="cifar10", root=str(data_root), split=CIFAR10_SPLITS[spec])
        return reference_of_images(load_dataset(config, 32, 3).images, spec)
    path = Path(spec)
    if (run := RunFolder(path)).config_file.is_file():
        return training_images(load_config(run.config_file), allow_download)
    if path.suffix in (".pt", ".pth"):
        return _from_torch_fidelity(path)
    if path.suffix == ".npz":
        return _from_npz(path)
    return _of_images(read_images(path), spec)


def _adm_file(data_root: Path, allow_download: bool) -> Path:
    path = data_root / ADM_URL.rpartition("/")[2]
    if path.exists():
        return path
    by_hand = f"download {ADM_URL} elsewhere and put it at {path}"
    if not allow_download:
        raise AssetError(f"{path} is not there and downloads are off (--offline): {by_hand}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(ADM_URL, str(path), progress=True)
    except OSError as error:  # URLError is one
        raise AssetError(f"{ADM} cannot be downloaded ({error}): {by_hand}") from error
    return path


def recipe_reference(config: RunConfig, allow_download: bool = True) -> Reference:
    """What the recipe compares samples with: `eval.reference`, else its training images.

    Raises AssetError where it is not there, and UserError where a latent recipe names none.
    """
    if config.eval.reference is None:
        return training_images(config, allow_download)
    root = config.data.root if isinstance(config.data, DataConfig) else DOWNLOADS
    return open_reference(config.eval.reference, Path(root).expanduser(), allow_download)


def training_images(config: RunConfig, allow_download: bool = True) -> Reference:
    """A run's training images, neither flipped nor augmented.

    Raises AssetError if they are not there (and, for CIFAR-10, may not be downloaded), and UserError for latents of
    image files, of which the images are not kept.
    """
    data, (channels, size, _) = config.data, config.image_shape
    if isinstance(data, LatentsConfig):
        if data.source != DIGITS:
            raise UserError("of latents the images are not kept: name statistics or images as eval.reference or --ref")
        return reference_of_images(digits(data.split).images, f"digits-{data.split}")
    if data.path is None and data.source == "cifar10":
        return open_reference(f"cifar10-{data.split}", Path(data.root).expanduser(), allow_download)
    images = load_dataset(data, size, channels).images
    return reference_of_images(images, data.path or f"{data.source}-{data.split}")


def reference_of_images(images: Tensor, spec: str) -> Reference:
    """A reference of uint8 images (N, C, H, W) that are in memory, under the name `spec`."""
    return _of_images(ImagesSource(images, spec), spec)


def _of_images(images: ImagesSource, spec: str) -> Reference:
    holds = f"{images.n} images"
    return Reference(spec, images.digest, holds, images=images, serves=("fid", "kid", "prc"), n=images.n)


def _from_npz(path: Path) -> Reference:
    file = read_npz(path)
    digest, holds = sha256_file(path), ", ".join(file) or "nothing"
    if "ref_mu" in file and "ref_sigma" in file:
        return Reference(str(path), digest, holds, validated(file["ref_mu"], file["ref_sigma"], str(path)))
    if "mu" not in file or "sigma" not in file:
        if "arr_0" in file:
            images = images_from_array(file["arr_0"], str(path))
            return _of_images(images, str(path))
        raise UserError(
            f"{path} holds {holds}: a reference needs mu and sigma, ref_mu and ref_sigma, or images in arr_0"
        )
    statistics = validated(file["mu"], file["sigma"], str(path))
    if "arr_0" in file:
        images = images_from_array(file["arr_0"], str(path))
        holds += f" ({images.n} images, for precision and recall only)"
        return Reference(str(path), digest, holds, statistics, images, ("prc",))
    made_by = None
    if "extractor" in file:
        made_by = (_text(file, "extractor", path), _text(file, "weights", path) if "weights" in file else "")
    n = _count(file, path) if "n" in file else None
    provenance = _text(file, "provenance", path) if "provenance" in file else ""
    return Reference(str(path), digest, holds, statistics, n=n, provenance=provenance, made_by=made_by)


def _text(file: dict[str, np.ndarray], name: str, path: Path) -> str:
    try:
        return str(file[name])
    except (SystemError, ValueError):  # numpy's text may hold what is no character
        raise AssetError(f"{path}: {name} is not a text") from None


def _count(file: dict[str, np.ndarray], path: Path) -> int:
    n = file["n"]
    if n.ndim or not np.issubdtype(n.dtype, np.integer):
        raise AssetError(f"{path}: n is not a whole number")
    return int(n)


def _from_torch_fidelity(path: Path) -> Reference:
    held = load_tensors(path, numpy_classes())
    if not isinstance(held, dict) or "mu" not in held or "sigma" not in held:
        kind = f"{', '.join(map(str, held))}" if isinstance(held, dict) else type(held).__name__
        raise UserError(f"{path} holds {kind}: torch-fidelity's cached statistics are mu and sigma")
    return Reference(str(path), sha256_file(path), "mu, sigma", validated(held["mu"], held["sigma"], str(path)))


def validated(mu, sigma, origin: str) -> Statistics:
    """Statistics in float64. Raises NumericsError, naming `origin`, unless they can be a mean and a covariance."""
    try:
        mu, sigma = np.asarray(mu), np.asarray(sigma)
        if mu.dtype.kind not in NUMBERS or sigma.dtype.kind not in NUMBERS:
            raise TypeError
        mu, sigma = mu.astype(np.float64), sigma.astype(np.float64)
    except (TypeError, ValueError):
        raise NumericsError(f"{origin}: mu or sigma is not an array of numbers") from None
    if mu.ndim != 1 or not len(mu) or sigma.shape != (len(mu), len(mu)):
        raise NumericsError(f"{origin}: mu {mu.shape} and sigma {sigma.shape} are not (D,) and (D, D)")
    if not np.isfinite(mu).all() or not np.isfinite(sigma).all():
        raise NumericsError(f"{origin}: mu or sigma has values that are not finite")
    scale = max(np.abs(sigma).max(), np.finfo(np.float64).tiny)
    if np.abs(sigma - sigma.T).max() > 1e-5 * scale:
        raise NumericsError(f"{origin}: sigma is not symmetric, so it is no covariance")
    # float32 files have eigenvalues a little below zero; anything more is no covariance.
    smallest = interruptible(lambda: np.linalg.eigvalsh(sigma)[0], torch.device("cpu"))
    if smallest < -1e-4 * scale * len(mu) ** 0.5:
        raise NumericsError(f"{origin}: sigma has negative eigenvalues, so it is no covariance")
    return Statistics(mu, sigma)


def check_reference(
    reference: Reference,
    metrics: tuple[str, ...],
    extractor: Extractor,
    shape: tuple[int, int, int] | None,
    options: MetricOptions,
) -> list[str]:
    """Preflight: can `reference` serve `metrics` for samples of `shape` (C, H, W; None: no samples)?

    Returns warnings. Raises UserError, naming what it holds, if it cannot.
    """
    for metric in metrics:
        served = metric == "isc" or metric in reference.serves
        if not served and not (metric == "fid" and reference.statistics is not None):
            raise UserError(
                f"{reference.spec} holds {reference.holds}, and {metric} needs features of reference images: "
                "give the images as --ref, or leave it out of --metrics"
            )
    if reference.images is not None:
        extractor.check_image(reference.images.shape, reference.spec)
        if shape is not None and reference.images.shape != shape:
            raise UserError(
                f"samples are {size_words(shape)} and the images of {reference.spec} are "
                f"{size_words(reference.images.shape)}: bring them to one size first"
            )
        least = {"kid": options.kid_subset_size, "prc": options.prc_neighborhood + 1}
        for metric in metrics:
            if metric != "isc" and reference.images.n < least.get(metric, 2):
                raise UserError(
                    f"{reference.spec} has {reference.images.n} image(s) and {metric} needs {least.get(metric, 2)} "
                    f"or more{': lower --kid-subset-size' if metric == 'kid' else ''}"
                )
    return _check_statistics(reference, extractor, shape) if "fid" in metrics else []


def _check_statistics(reference: Reference, extractor: Extractor, shape) -> list[str]:
    if reference.statistics is None:
        return []
    dims = len(reference.statistics.mu)
    if shape is not None:
        expected = extractor.dims(shape)[extractor.layers["fid"]]
        if dims != expected:
            raise NumericsError(
                f"{reference.spec} has statistics of {dims} features and {extractor.name} gives {expected}: "
                "it was made with another extractor"
            )
    if reference.made_by is None:
        return [] if extractor.is_inception else [f"{reference.spec} does not say which extractor made it"]
    mine = (extractor.name, extractor.weights or "")
    if reference.made_by != mine:
        raise UserError(
            f"{reference.spec} was made with {who_made(reference.made_by)} and this is {who_made(mine)}: "
            "make it again with make-ref"
        )
    return []


def who_made(made_by: tuple[str, str]) -> str:
    return f"{made_by[0]} (weights {made_by[1][:8]}…)" if made_by[1] else made_by[0]


def size_words(shape: tuple[int, int, int]) -> str:
    return f"{shape[1]}×{shape[2]} with {shape[0]} channel(s)"


def write_reference(path: Path, reference: Reference, statistics: Statistics, extractor: Extractor) -> str:
    """The npz of `make-ref`: mu, sigma, n, provenance, extractor and weights. Returns the provenance."""
    assert reference.images is not None
    made = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    provenance = (
        f"{reference.images.n} images of {reference.spec}, {size_words(reference.images.shape)}, "
        f"sha256 {reference.digest}; {who_made((extractor.name, extractor.weights or ''))}; "
        f"torch-fidelity {torch_fidelity.__version__}, torch {torch.__version__}, "
        f"{extractor.device.type}; {made}"
    )
    arrays = {
        **statistics.as_dict(),
        "n": np.int64(reference.images.n),
        "provenance": np.str_(provenance),
        "extractor": np.str_(extractor.name),
        "weights": np.str_(extractor.weights or ""),
    }
    write_npz(path, arrays)
    return provenance
