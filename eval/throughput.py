"""`bash run.sh throughput`: how fast images are scored here, beside torch-fidelity's own extraction.

The same ready uint8 images pass through torch-fidelity's loop and through ours (features written to disk as in any
evaluation), alternately, with the same Inception. Without real weights, random ones serve: they take as long.
"""

import statistics
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from eval.scoring.extractors import INCEPTION, Options, create, find_inception_weights
from eval.scoring.features import extract_features
from eval.scoring.options import Parser, add_device, count, path
from eval.scoring.sources import ImagesSource
from meanflow.errors import AssetError, run_main
from meanflow.training.processes import start_distributed
from meanflow.training.run_folder import environment

LAYER = "2048"


class Images(torch.utils.data.Dataset):
    """Images in memory, as torch-fidelity takes them."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> Tensor:
        return self.images[k]


def random_inception(path: Path, seed: int = 0) -> None:
    """Random weights in the layout that torch-fidelity loads, scaled so that features and logits stay lively."""
    network_class = inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
        torch.random.fork_rng(devices=[]),
    ):
        network = network_class(INCEPTION, [LAYER])
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    nn.init.normal_(network.fc.weight, std=2.0, generator=generator)
    torch.save(network.state_dict(), path)


def main(argv: list[str] | None = None) -> int:
    parser = Parser("throughput", __doc__.partition(": ")[2])
    parser.add_argument("--n", type=count, default=256, help="images a round (256)")
    parser.add_argument("--batch", type=count, default=32, help="images at a time, for both (32)")
    parser.add_argument("--rounds", type=count, default=3, help="rounds, of which the median counts (3)")
    parser.add_argument("--weights", type=path, help="Inception weights (torch-fidelity's cache, else random)")
    add_device(parser)
    args = parser.parse_args(argv)
    ctx = start_distributed(args.device)
    images = torch.randint(0, 256, (args.n, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with tempfile.TemporaryDirectory() as scratch:
        weights = _weights(args.weights, Path(scratch))
        cuda = ctx.device.type == "cuda"
        theirs = create_feature_extractor(
            INCEPTION, [LAYER], cuda=cuda, feature_extractor_weights_path=str(weights), verbose=False
        )
        ours = create(INCEPTION, Options(ctx.device, weights, allow_weights=True), ("fid",))
        source = ImagesSource(images, "random images")
        seconds: dict[str, list[float]] = {"torch-fidelity": [], "eval.fid": []}
        for k in range(args.rounds):
            seconds["torch-fidelity"].append(
                _timed(lambda: get_featuresdict_from_dataset(Images(images), theirs, args.batch, cuda, False, False))
            )
            work = Path(scratch) / str(k)
            seconds["eval.fid"].append(
                _timed(lambda work=work: extract_features(source, ours, [LAYER], args.batch, work, ctx))
            )
    print(f"{args.n} images of 32×32, batch {args.batch}, median of {args.rounds}: {environment()}")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    for name, value in medians.items():
        print(f"{name:15} {value:8.2f} s  {args.n / value:8.1f} images/s")
    print(f"eval.fid takes {medians['eval.fid'] / medians['torch-fidelity']:.2f} of torch-fidelity's time")
    return 0


def _weights(given: Path | None, scratch: Path) -> Path:
    try:
        return find_inception_weights(Options(torch.device("cpu"), given))
    except AssetError:
        if given is not None:
            raise
    path = scratch / "random.pth"
    random_inception(path)
    return path


def _timed(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(run_main(main))
