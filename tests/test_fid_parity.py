"""Our numbers are torch-fidelity's, whoever shares the work: 1, 2, 3 processes, any batch, killed and
resumed.

Inception has random weights here (nothing is downloaded) and, but for one test, a small input size.
"""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_worker import SMALL_INPUT
from threadpoolctl import threadpool_limits
from torch import nn
from torch_fidelity import calculate_metrics
from torch_fidelity import feature_extractor_inceptionv3 as tf_inception
from torch_fidelity.utils import create_feature_extractor, get_featuresdict_from_dataset

from eval.fid import main
from eval.scoring.extractors import INCEPTION, Options, create
from eval.throughput import Images, random_inception
from meanflow.precision import exact_float32

Network = tf_inception.FeatureExtractorInceptionV3
WORKER = Path(__file__).parent / "fid_worker.py"
N, M, BATCH = 60, 72, 16
METRICS = "fid,isc,kid,prc"
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
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Network, "INPUT_IMAGE_SIZE", SMALL_INPUT)
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(threads)


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


def arguments(folder: Path, out: Path, batch: int, cache: Path) -> list[str]:
    return [
        *("--samples", str(folder / "fake.npz"), "--ref", str(folder / "real.npz")),
        *("--weights", str(folder / "weights.pth"), "--allow-weights", "--device", "cpu"),
        *("--metrics", METRICS, "--kid-subset-size", "40", "--batch", str(batch)),
        *("--out", str(out), "--cache", str(cache)),
    ]


def start(args: list[str], world: int = 1, die_after: int = 0) -> list[subprocess.Popen]:
    """`world` processes of one evaluation, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [{**env, "RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": str(world)} for r in range(world)]
    command = [sys.executable, str(WORKER), str(die_after), *args]
    return [subprocess.Popen(command, env=rank, stderr=subprocess.PIPE, text=True) for rank in ranks]


def finish(ctx: list[subprocess.Popen]) -> list[int]:
    errors = [process.communicate(timeout=400)[1] for process in ctx]
    codes = [process.returncode for process in ctx]
    assert all(code in (0, -9) for code in codes), errors
    return codes


def metrics(out: Path) -> dict[str, float]:
    found = json.loads((out / "fake.json").read_text())
    assert found["status"] == "complete" and found["protocol"]["n"] == N
    return found["metrics"]


def assert_equal_to(truth: dict, found: dict) -> None:
    assert sorted(found) == sorted(OURS.values())
    for theirs, ours in OURS.items():
        assert found[ours] == pytest.approx(truth[theirs], rel=1e-6, abs=1e-6), ours


@pytest.fixture(scope="module")
def single(folder, tmp_path_factory):
    """One process, computed in this one, with two threads; the processes of the other tests have one each."""
    out = tmp_path_factory.mktemp("single")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    assert main(arguments(folder, out, BATCH, out / "cache")) == 0
    torch.set_num_threads(threads)
    return metrics(out)


def test_one_process_equals_torch_fidelity(single, truth):
    assert truth["inception_score_std"] > 1e-3  # the random network does tell images apart
    assert_equal_to(truth, single)


def test_another_batch_size_equals_torch_fidelity(folder, truth, tmp_path):
    assert main(arguments(folder, tmp_path, 25, tmp_path / "cache")) == 0
    assert_equal_to(truth, metrics(tmp_path))


def test_processes_and_death_change_no_bit(folder, single, tmp_path):
    """Two and three processes; and one that is killed after two batches of the samples, then resumed."""
    reference_batches = -(-M // 64)
    doomed = arguments(folder, tmp_path / "killed", BATCH, tmp_path / "killed-cache")
    three = start(arguments(folder, tmp_path / "three", BATCH, tmp_path / "cache3"), world=3)
    killed = start(doomed, die_after=reference_batches + 2)
    assert finish(killed) == [-9]
    assert not (tmp_path / "killed" / "fake.json").exists()
    pieces = list((tmp_path / "killed" / "work").glob("*/fake/*.npz"))
    assert len(pieces) == 2
    written = {piece: piece.stat().st_mtime_ns for piece in pieces}
    finish(three)

    two = start(arguments(folder, tmp_path / "two", BATCH, tmp_path / "cache2"), world=2)
    untouched = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shutil.rmtree", lambda path: untouched.append({p: p.stat().st_mtime_ns for p in written}))
        assert main([*doomed, "--resume"]) == 0
    assert untouched == [written]
    finish(two)
    for out in ("two", "three", "killed"):
        assert metrics(tmp_path / out) == single, out


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
