"""Our numbers are torch-fidelity's, whoever does the work: 1, 2, 3 processes, any batch, killed and resumed.

Inception has random weights here (nothing is downloaded) and, but for one test, a small input size.
"""

import functools
import json
import socket
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from fid_helpers import count_pieces, die, fid
from running import start
from threadpoolctl import threadpool_limits
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as tf_inception
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from eval.scoring.extractors import INCEPTION, Options, create
from eval.scoring.metrics import Statistics, frechet
from meanflow.precision import exact_float32

Network = tf_inception.FeatureExtractorInceptionV3
SMALL_INPUT = 75  # the smallest that Inception takes: a sixteenth of the arithmetic
N, M, BATCH = 60, 72, 16
ALL_BATCHES = sorted((k, min(k + size, n)) for n, size in ((M, 64), (N, BATCH)) for k in range(0, n, size))
OURS = {  # torch-fidelity's name → ours
    "frechet_inception_distance": "fid",
    "inception_score_mean": "isc_mean",
    "inception_score_std": "isc_std",
    "kernel_inception_distance_mean": "kid_mean",
    "kernel_inception_distance_std": "kid_std",
    "precision": "precision",
    "recall": "recall",
    "f_score": "f_score",
}


class Images(torch.utils.data.Dataset):
    """Images in memory, as torch-fidelity takes them."""

    def __init__(self, images: torch.Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, k: int) -> torch.Tensor:
        return self.images[k]


def random_inception(path: Path, seed: int = 0) -> None:
    """Random weights in the layout that torch-fidelity loads, scaled so that features and logits stay lively."""
    network_class = tf_inception.FeatureExtractorInceptionV3
    with (
        mock.patch.object(tf_inception, "load_state_dict_from_url", return_value={}),
        mock.patch.object(network_class, "load_state_dict"),
        torch.random.fork_rng(devices=[]),
    ):
        network = network_class(INCEPTION, ["2048"])
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, generator=generator)
    nn.init.normal_(network.fc.weight, std=2.0, generator=generator)
    torch.save(network.state_dict(), path)


def blobs(n: int, contrast: float, seed: int) -> torch.Tensor:
    """Smooth random images, uint8 (n, 3, 32, 32)."""
    coarse = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    fine = nn.functional.interpolate(coarse, size=32, mode="bilinear")
    return (255 * (0.5 + contrast * (fine - 0.5))).to(torch.uint8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """fake.npz, real.npz, weights.pth."""
    path = tmp_path_factory.mktemp("fid")
    for name, images in (("fake", blobs(N, 1.0, 1)), ("real", blobs(M, 0.8, 2))):
        np.savez(path / f"{name}.npz", arr_0=images.permute(0, 2, 3, 1).numpy())
    random_inception(path / "weights.pth")
    return path


@pytest.fixture(scope="module", autouse=True)
def small_inception():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "INPUT_IMAGE_SIZE", SMALL_INPUT)
        yield


@pytest.fixture(scope="module")
def truth(folder):
    with threadpool_limits(1):  # two spin against other work
        return calculate_metrics(
            input1=Images(blobs(N, 1.0, 1)),
            input2=Images(blobs(M, 0.8, 2)),
            **dict.fromkeys(("fid", "isc", "kid", "prc"), True),
            feature_extractor=INCEPTION,  # without it, precision and recall would use VGG16
            feature_extractor_weights_path=str(folder / "weights.pth"),
            kid_subset_size=40,
            batch_size=20,
            cuda=False,
            save_cpu_ram=True,
            cache=False,
            verbose=False,
        )


def arguments(folder: Path, out: Path, batch: int = BATCH) -> list[str]:
    return [
        *("--samples", str(folder / "fake.npz"), "--ref", str(folder / "real.npz")),
        *("--weights", str(folder / "weights.pth"), "--allow-weights", "--device", "cpu"),
        *("--metrics", "fid,isc,kid,prc", "--kid-subset-size", "40", "--batch", str(batch), "--out", str(out)),
    ]


def metrics(out: Path) -> dict[str, float]:
    found = json.loads((out / "fake.json").read_text())
    assert found["status"] == "complete" and found["protocol"]["n"] == N
    return found["metrics"]


def names(pieces: list[str]) -> list[tuple[int, ...]]:
    """The batches that were written, as (start, stop)."""
    return sorted(tuple(map(int, piece.rpartition("/")[2].split("-"))) for piece in pieces)


def worker(log: Path, at_most: float = float("inf")) -> None:
    """Before `eval.fid` in a process of its own: Inception at the small size; batches noted, and death after a few."""
    Network.INPUT_IMAGE_SIZE = SMALL_INPUT
    count_pieces(pytest.MonkeyPatch(), at_most, die, log)


def processes(folder: Path, out: Path, world: int, **how) -> tuple[list, Path]:
    """`world` processes of one evaluation, as torchrun would start them; and the log of the batches they extract."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    log = out.with_suffix(".log")
    env = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(world)}
    prepare = functools.partial(worker, log, **how)
    started = [
        start(
            *("eval.fid", *arguments(folder, out)),
            logs=out.parent / "logs" / f"{out.name}{rank}",
            environment=env | {"RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {},
            prepare=prepare,
        )
        for rank in range(world)
    ]
    return started, log


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """One process, computed in this one, with two threads; the processes of the other tests have one each."""
    out = tmp_path_factory.mktemp("single")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    with pytest.MonkeyPatch.context() as patch:
        written = count_pieces(patch)
        assert fid(*arguments(folder, out)) == 0
    torch.set_num_threads(threads)
    assert names(written) == ALL_BATCHES
    return metrics(out)


@pytest.mark.parametrize("batch", [BATCH, 25])
def test_metrics_equal_torch_fidelity(batch, single, truth, folder, tmp_path):
    assert truth["inception_score_std"] > 1e-3  # the random network does tell images apart
    if batch != BATCH:
        assert fid(*arguments(folder, tmp_path, batch)) == 0
    found = single if batch == BATCH else metrics(tmp_path)
    assert sorted(found) == sorted(OURS.values())
    for theirs, ours in OURS.items():
        assert found[ours] == pytest.approx(truth[theirs], rel=1e-6, abs=1e-6), ours


def test_processes_and_death_change_no_bit(folder, single, tmp_path):
    """One, two and three processes extract every batch once; one that is killed amid the samples is resumed."""
    (killed,), _ = processes(folder, tmp_path / "killed", 1, at_most=4)  # two of the samples
    assert killed.wait(400).code == -9
    for world in (2, 3):
        out = tmp_path / str(world)
        started, log = processes(folder, out, world)
        assert [one.wait(400).code for one in started] == [0] * world, started[0].err
        assert names(log.read_text().splitlines()) == ALL_BATCHES, world
        assert metrics(out) == single, world

    assert not (tmp_path / "killed" / "fake.json").exists()
    with pytest.MonkeyPatch.context() as patch:
        written = count_pieces(patch)
        assert fid(*arguments(folder, tmp_path / "killed"), "--resume") == 0
    assert len(written) == len(ALL_BATCHES) - 4
    assert metrics(tmp_path / "killed") == single


def test_full_size_features_equal_torch_fidelity(folder):
    """At 299×299, channels_last: what torch-fidelity extracts in its own layout, to 1e-5 of the largest."""
    images, weights = blobs(6, 1.0, 3), folder / "weights.pth"
    layers = ["2048", "logits_unbiased"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "INPUT_IMAGE_SIZE", 299)
        theirs = create_feature_extractor(
            INCEPTION, layers, cuda=False, feature_extractor_weights_path=str(weights), verbose=False
        )
        expected = get_featuresdict_from_dataset(Images(images), theirs, 6, False, True, False)
        ours = create(INCEPTION, Options(torch.device("cpu"), weights, allow_weights=True), ("fid", "isc"))
        with exact_float32():
            found = ours.extract(images)
    for layer in layers:
        assert (found[layer] - expected[layer]).abs().max() < 1e-5 * expected[layer].abs().max()


@pytest.mark.parametrize(
    ("n", "m", "as_statistics"),
    [(30, 20, False), (30, 300, False), (300, 30, False), (30, 20, True), (30, 300, True), (200, 300, False)],
)
def test_the_distance_of_few_samples_is_torch_fidelitys(n, m, as_statistics, monkeypatch):
    """Without a D × D matrix of a side that has fewer than D; in the last case of neither, though both have more."""
    dims, random = 100, torch.Generator().manual_seed(0)
    fake, real = (torch.randn(k, dims, generator=random) @ torch.randn(dims, dims, generator=random) for k in (n, m))
    theirs = [Statistics.of(x).as_dict() for x in (fake, real)]
    expected = fid_statistics_to_metric(*theirs, verbose=False)[KEY_METRIC_FID]
    if min(n, m) > dims:
        monkeypatch.setattr("eval.scoring.metrics.low_rank", lambda n, dims: True)
    found = frechet(fake, Statistics.of(real) if as_statistics else real)
    assert found == pytest.approx(expected, rel=1e-6)
