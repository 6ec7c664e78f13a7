"""Feature extractors by name.

Only the distance between features of `inception-v3-compat` (torch-fidelity's port of the 2015 TensorFlow
graph) is a FID. Every other extractor's distance is called `fd-<name>`: lower is better, and it compares with
nothing but itself.
"""

import importlib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torch.nn import functional
from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
from torch_fidelity.utils import create_feature_extractor

from eval.scoring.files import load_tensors
from eval.scoring.options import INCEPTION, PIXELS, THUMBNAILS
from meanflow.errors import AssetError, UserError
from meanflow.files import sha256_file
from meanflow.precision import exact_float32

# weights-inception-2015-12-05-6726825d.pth of torch-fidelity's v0.2.0 release.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
INCEPTION_FLOPS = 2 * 5.7e9  # an image at 299×299
INCEPTION_DIMS = 2048
THUMBNAIL = 8  # pixels a side
PIXELS_UP_TO = 3072  # numbers in an image (32×32, RGB), above which a recipe's `pixels` becomes `thumbnails`


@dataclass(frozen=True)
class Options:
    """How extractors are made: the device, where weights come from, and whether unknown ones will do."""

    device: torch.device
    weights: Path | None = None
    allow_download: bool = False
    allow_weights: bool = False


@dataclass(frozen=True)
class Extractor:
    """Images in, features out.

    `forward` takes uint8 (B, C, H, W) on `device` and gives {layer: (B, D) float32}. `layers` names the layer
    of each metric it can serve. `channels` is what `forward` insists on (None: any). `weights` is the sha256
    of the weights (None: it has none); `warnings` go into the result; `flops` is about what one image costs.
    """

    name: str
    forward: Callable[[Tensor], dict[str, Tensor]]
    layers: dict[str, str]
    device: torch.device
    channels: int | None = None
    weights: str | None = None
    warnings: tuple[str, ...] = ()
    flops: float = 0.0

    @property
    def is_inception(self) -> bool:
        return self.name == INCEPTION

    def label(self, metric: str) -> str:
        """What a metric is called in tables and results: "fid" for Inception alone, else "fd-<name>" and so on."""
        if self.is_inception:
            return metric
        return f"{'fd' if metric == 'fid' else metric}-{self.name}"

    def check_image(self, shape: tuple[int, int, int], what: str) -> None:
        """Raises UserError if images of `shape` (C, H, W) cannot be given to this extractor."""
        if self.channels is not None and shape[0] != self.channels:
            kind = {1: "grey", 4: "RGBA"}.get(shape[0], "not RGB")
            raise UserError(
                f"{what}: images are {kind} ({shape[0]} channel(s)) and {self.name} needs {self.channels}: "
                f"convert them, or use --extractor pixels"
            )

    def extract(self, images: Tensor) -> dict[str, Tensor]:
        """uint8 (B, C, H, W) → {layer: (B, D) float32 on the CPU}. Call it within `exact_float32`."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            features = self.forward(images.to(self.device, non_blocking=True))
            return {layer: value.float().cpu() for layer, value in features.items()}

    def dims(self, shape: tuple[int, int, int]) -> dict[str, int]:
        """{layer: D} for images of `shape` (C, H, W)."""
        with exact_float32():
            probe = self.extract(torch.zeros(1, *shape, dtype=torch.uint8))
        return {layer: value.shape[1] for layer, value in probe.items()}


Factory = Callable[[Options, tuple[str, ...]], Extractor]


def create(name: str, options: Options, metrics: Iterable[str]) -> Extractor:
    """The extractor `name`, ready for `metrics` ("fid", "isc", "kid", "prc").

    `name` is one of FACTORIES, or `module:factory` for your own (imported from the Python path).
    Raises UserError for an unknown name or a metric it cannot serve, AssetError for missing weights.
    """
    if options.weights is not None and not options.weights.is_file():  # also where no weights are needed
        raise AssetError(f"--weights {options.weights}: no such file")
    metrics = tuple(metrics)
    factory = FACTORIES.get(name.removeprefix("fd-")) or _own_factory(name)  # fd-pixels, as its distance is called
    extractor = factory(options, metrics)
    lacking = [m for m in metrics if m not in extractor.layers]
    if lacking:
        raise UserError(
            f"extractor {extractor.name} has no features for {', '.join(lacking)}: leave it out of --metrics"
        )
    return extractor


def prefetch(name: str, options: Options) -> None:
    """Download what `create` would, so that one process can do it for all."""
    if name == INCEPTION:
        find_inception_weights(options)


def dims_of(name: str, shape: tuple[int, int, int]) -> int:
    """Features of an image of `shape` (C, H, W), without fetching weights. Raises UserError for an unknown name."""
    if name == INCEPTION:
        return INCEPTION_DIMS
    extractor = create(name, Options(torch.device("cpu")), ("fid",))
    return extractor.dims(shape)[extractor.layers["fid"]]


def affordable(name: str, shape: tuple[int, int, int]) -> tuple[str, tuple[str, ...]]:
    """The extractor to use where a recipe says `name` and images are of `shape` (C, H, W); a line if it is another."""
    numbers = math.prod(shape)
    if name != PIXELS or numbers <= PIXELS_UP_TO:
        return name, ()
    return THUMBNAILS, (
        f"eval.extractor is {name}, but images of {shape[1]}×{shape[2]} are {numbers:,} numbers each, too many for a "
        f"distance between pixels: scored with {THUMBNAILS}, which averages to {THUMBNAIL}×{THUMBNAIL} first",
    )


def _own_factory(name: str) -> Factory:
    module, colon, attribute = name.partition(":")
    if not colon:
        known = ", ".join(sorted(FACTORIES))
        raise UserError(f"unknown extractor {name!r}: use one of {known}, or module:factory for your own")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise UserError(f"extractor {name!r} cannot be imported: {error}") from None


# --- inception-v3-compat -----------------------------------------------------------------------------------------

OTHER_WAYS = "or give fid --weights FILE, or --extractor pixels, which needs none (and is no FID)"
# FID, KID and precision/recall from the pool, as torch-fidelity's FID; it would take VGG16 for the last by default.
INCEPTION_LAYERS = {"fid": "2048", "kid": "2048", "prc": "2048", "isc": "logits_unbiased"}


def inception(options: Options, metrics: tuple[str, ...]) -> Extractor:
    """torch-fidelity's InceptionV3, channels_last (1.7 times faster on CPU, features equal to 1e-6)."""
    path = find_inception_weights(options)
    digest = sha256_file(path)
    warnings: tuple[str, ...] = ()
    if digest != INCEPTION_SHA256:
        if not options.allow_weights:
            raise AssetError(
                f"{path}: sha256 {digest} is not that of the Inception weights every published FID uses "
                f"({INCEPTION_SHA256[:8]}…): delete the file to fetch it again, or pass --allow-weights"
            )
        warnings = (f"Inception weights {path.name} have the unknown sha256 {digest}: not a comparable FID",)
    layers = sorted({INCEPTION_LAYERS[m] for m in metrics})
    _check_inception_file(path)
    module = create_feature_extractor(
        INCEPTION, layers, cuda=False, feature_extractor_weights_path=str(path), verbose=False
    )
    module = module.to(options.device, memory_format=torch.channels_last)

    def forward(images: Tensor) -> dict[str, Tensor]:
        return module.convert_features_tuple_to_dict(module(images))

    layers_of = dict(INCEPTION_LAYERS)
    return Extractor(INCEPTION, forward, layers_of, options.device, 3, digest, warnings, INCEPTION_FLOPS)


def inception_weights_path() -> Path:
    """Where torch-fidelity keeps its weights (TORCH_HOME moves it)."""
    return Path(torch.hub.get_dir()) / "checkpoints" / URL_INCEPTION_V3.rsplit("/", 1)[-1]


def find_inception_weights(options: Options) -> Path:
    """The weights file: `options.weights`, else torch-fidelity's cache, else a download if that is allowed.

    Raises AssetError if there is none, saying where it was looked for and how to get it.
    """
    if options.weights is not None:
        return options.weights
    path = inception_weights_path()
    if path.is_file():
        return path
    if not options.allow_download:
        raise AssetError(
            f"no Inception weights at {path} and downloads are off: fetch {URL_INCEPTION_V3} elsewhere and put it "
            f"there, {OTHER_WAYS}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=True)
    except (URLError, OSError, RuntimeError) as error:
        raise AssetError(
            f"downloading {URL_INCEPTION_V3} failed ({error}): fetch it elsewhere and put it at {path}, {OTHER_WAYS}"
        ) from None
    return path


def _check_inception_file(path: Path) -> None:
    """torch-fidelity unpickles its weights freely; refuse first what is not a plain dictionary of tensors."""
    state = load_tensors(path)
    names = state.keys() if isinstance(state, dict) else ()
    if "Conv2d_1a_3x3.conv.weight" not in names or "fc.weight" not in names:
        raise AssetError(f"{path} holds no Inception weights in torch-fidelity's layout: pass another --weights FILE")


# --- pixels ------------------------------------------------------------------------------------------------------


def pixels(options: Options, metrics: tuple[str, ...]) -> Extractor:
    """The image itself in the network's range [−1, 1], flattened: for tiny images (digits: 64 dimensions).

    On this scale the distance between two random halves of scikit-learn's digits is 0.28 ± 0.03 (0.07 in [0, 1]).
    """

    def forward(images: Tensor) -> dict[str, Tensor]:
        return {"pixels": images.flatten(1).float() / 127.5 - 1}

    return Extractor(PIXELS, forward, dict.fromkeys(("fid", "kid", "prc"), "pixels"), options.device)


def thumbnails(options: Options, metrics: tuple[str, ...]) -> Extractor:
    """The image in [−1, 1], averaged over areas to 8×8, flattened: pixels for images too large for `pixels`.

    It sees colours and coarse shapes, nothing fine. All images of 256² become 192 dimensions.
    """

    def forward(images: Tensor) -> dict[str, Tensor]:
        small = functional.adaptive_avg_pool2d(images.float() / 127.5 - 1, THUMBNAIL)
        return {"thumbnails": small.flatten(1)}

    layers = dict.fromkeys(("fid", "kid", "prc"), "thumbnails")
    return Extractor(THUMBNAILS, forward, layers, options.device)


FACTORIES: dict[str, Factory] = {
    INCEPTION: inception,
    PIXELS: pixels,
    THUMBNAILS: thumbnails,
}
