"""References: every layout of the same statistics gives one number; every unusable file gives its line."""

import os
import pickle
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from fid_helpers import error, fid, grey_blobs, result, tiny_run
from PIL import Image
from running import tiny_config, write_images
from torch_fidelity.metric_fid import fid_features_to_statistics

from eval.scoring.metrics import Statistics, frechet
from meanflow.data.dataset import digits
from meanflow.files import read_json, write_json

M = 80


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1).float() / 127.5 - 1


@pytest.fixture(scope="module")
def images():
    return {"fake": grey_blobs(70, 1), "real": 255 - grey_blobs(M, 2) // 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory, images):
    """{layout: path} of one reference, in every layout that is read."""
    root = tmp_path_factory.mktemp("refs")
    np.savez(root / "fake.npz", arr_0=images["fake"])
    real, stats = images["real"], Statistics.of(pixels(images["real"]))
    mu, sigma = stats.mu, stats.sigma
    out = {name: root / f"{name}.npz" for name in ("edm", "adm", "jax", "images", "made")}
    np.savez(out["edm"], mu=mu, sigma=sigma)
    np.savez(out["adm"], mu=mu, sigma=sigma, mu_s=mu[:3], sigma_s=sigma[:3, :3], arr_0=real[:20])
    np.savez(out["jax"], ref_mu=mu, ref_sigma=sigma)
    np.savez(out["images"], arr_0=real)
    out["torch-fidelity"] = root / "cached-stat-fid-2048.pt"
    torch.save(fid_features_to_statistics(pixels(real)), out["torch-fidelity"])
    out["folder"] = root / "folder"
    out["folder"].mkdir()
    for k, image in enumerate(real):
        Image.fromarray(image[..., 0]).save(out["folder"] / f"{k:03d}.png")
    out["run"] = tiny_run(root / "run", tiny_config(data__path=str(out["folder"])))[0].path
    assert fid("make-ref", "--ref", out["run"], "--out", out["made"]) == 0  # by the run's extractor, pixels
    return {**out, "fake": root / "fake.npz"}


def score(files, ref, out, *more) -> int:
    return fid("--samples", files["fake"], "--ref", ref, "--extractor", "pixels", "--out", out, *more)


def distance(out) -> float:
    return result(out / "fake.json")["metrics"]["fd-pixels"]


def test_every_layout_gives_one_number(files, images, tmp_path):
    expected = frechet(*(Statistics.of(pixels(images[name])) for name in ("fake", "real")))
    for name, path in files.items():
        if name != "fake":
            assert score(files, path, tmp_path / name) == 0, name
            found = result(tmp_path / name / "fake.json")
            assert list(found["metrics"]) == ["fd-pixels"]  # never "fid"
            assert distance(tmp_path / name) == pytest.approx(expected, rel=1e-6)
            assert not found["comparable"] and len(found["protocol"]["reference"]["sha256"]) == 64


def test_digits_and_the_training_images_of_a_run(tmp_path):
    run = tiny_run(tmp_path / "run")[0]
    np.savez(tmp_path / "fake.npz", arr_0=grey_blobs(70, 1))
    np.savez(tmp_path / "ref.npz", arr_0=digits("train").images.permute(0, 2, 3, 1).numpy())
    values = set()
    for ref in ("digits", run.path, tmp_path / "ref.npz"):
        more = ("--extractor", "pixels") if ref != run.path else ()  # of a run, the recipe's
        assert fid("--samples", tmp_path / "fake.npz", "--ref", ref, "--out", tmp_path / "out", *more) == 0
        assert result(tmp_path / "out" / "fake.json")["protocol"]["reference"]["n"] == 1797
        values.add(distance(tmp_path / "out"))
    assert len(values) == 1


def test_fewer_images_than_features(images, tmp_path):
    fake, real = images["fake"][:30], images["real"][:20]
    np.savez(tmp_path / "fake.npz", arr_0=fake)
    np.savez(tmp_path / "ref.npz", arr_0=real)
    for _ in range(2):  # with what was kept of the reference, the second time
        assert score({"fake": tmp_path / "fake.npz"}, tmp_path / "ref.npz", tmp_path / "out") == 0
        assert distance(tmp_path / "out") == pytest.approx(frechet(pixels(fake), pixels(real)), rel=1e-9)
    assert len(list((tmp_path / "out" / "references").glob("*-features.npz"))) == 1


def test_make_ref_records_its_origin_and_keeps_existing_files(files, tmp_path, capsys):
    made = np.load(files["made"], allow_pickle=False)
    assert int(made["n"]) == M and str(made["extractor"]) == "pixels"
    assert "80 images of" in str(made["provenance"]) and "8×8" in str(made["provenance"])

    out = tmp_path / "ref.npz"
    out.write_bytes(b"mine")
    again = ("make-ref", "--ref", files["images"], "--out", out, "--extractor", "pixels")
    assert fid(*again) == 2 and "exists already" in error(capsys) and out.read_bytes() == b"mine"
    assert fid(*again, "--overwrite") == 0 and np.array_equal(np.load(out)["mu"], made["mu"])
    assert [path.name for path in tmp_path.iterdir()] == ["ref.npz"]
    assert fid("make-ref", "--ref", files["edm"], "--out", tmp_path / "b.npz", "--extractor", "pixels") == 2
    assert "statistics already" in error(capsys)
    assert fid("make-ref", "--ref", files["images"], "--out", tmp_path / "b") == 2 and ".npz" in error(capsys)


# --- what is kept of them ----------------------------------------------------------------------------------------


def test_the_cache_goes_by_content_not_by_name(files, images, tmp_path):
    same_name = tmp_path / "ref.npz"
    values = []
    for contents in (images["real"], images["fake"]):
        np.savez(same_name, arr_0=contents)
        assert score(files, same_name, tmp_path / "out") == 0
        values.append(distance(tmp_path / "out"))
    assert values[0] > 1 and abs(values[1]) < 1e-4


def test_it_is_used_again_and_made_again_when_damaged(files, tmp_path):
    """Features of `fid,prc` and statistics of `fid`, in --cache, else beside the results."""
    for metrics in ("fid,prc", "fid"):
        more = ("--metrics", metrics, "--cache", tmp_path / "cache")
        assert score(files, files["images"], tmp_path / "first", *more) == 0
        first = result(tmp_path / "first" / "fake.json")["metrics"]
        (kept,) = (tmp_path / "cache").glob("*-features.npz" if "prc" in metrics else "*-statistics.npz")
        before = kept.stat().st_mtime_ns
        assert score(files, files["images"], tmp_path / "again", *more) == 0
        assert kept.stat().st_mtime_ns == before
        kept.write_bytes(kept.read_bytes()[:-200])
        assert score(files, files["images"], tmp_path / "damaged", *more) == 0
        for out in ("again", "damaged"):
            assert result(tmp_path / out / "fake.json")["metrics"] == first


def test_nothing_large_is_kept_unasked_and_nothing_in_the_users_cache(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    assert score(files, files["images"], tmp_path / "small") == 0
    assert len(list((tmp_path / "small" / "references").iterdir())) == 1
    monkeypatch.setattr("eval.scoring.evaluate.KEPT_UNASKED", 1000)
    assert score(files, files["images"], tmp_path / "large") == 0
    assert sorted(path.name for path in (tmp_path / "large").iterdir()) == ["fake.json"]
    assert distance(tmp_path / "small") == distance(tmp_path / "large") and not (tmp_path / "home").exists()


# --- what cannot serve -------------------------------------------------------------------------------------------


def test_images_beside_adm_statistics_serve_precision_and_recall_only(files, tmp_path, capsys):
    assert score(files, files["adm"], tmp_path, "--metrics", "fid,prc") == 0
    assert "precision-pixels" in result(tmp_path / "fake.json")["metrics"]
    assert score(files, files["adm"], tmp_path, "--metrics", "kid", "--kid-subset-size", 10) == 2
    assert "20 images, for precision and recall only" in error(capsys)


def test_statistics_alone_cannot_serve_kid(files, tmp_path, capsys):
    """Said first, since more samples would not help."""
    assert score(files, files["jax"], tmp_path, "--metrics", "fid,kid") == 2
    assert "jax.npz holds ref_mu, ref_sigma, and kid needs" in error(capsys)


def broken(mu=None, sigma=None, **more):
    return {"mu": np.zeros(64) if mu is None else mu, "sigma": np.eye(64) if sigma is None else sigma, **more}


UNEVEN, NEGATIVE = np.eye(64), np.eye(64)
UNEVEN[0, 1] = 0.5
NEGATIVE[5, 5] = -1


@pytest.mark.parametrize(
    ("arrays", "code", "line"),
    [
        (broken(sigma=np.eye(63)), 4, "are not (D,) and (D, D)"),
        (broken(mu=np.full(64, np.nan)), 4, "not finite"),
        (broken(sigma=UNEVEN), 4, "not symmetric"),
        (broken(sigma=NEGATIVE), 4, "negative eigenvalues"),
        (broken(mu=np.zeros(12), sigma=np.eye(12)), 4, "statistics of 12 features and pixels gives 64"),
        (broken(mu=np.array([{"a": 1}], dtype=object)), 3, "pickled objects"),
        ({"mu": np.zeros(64)}, 2, "holds mu: a reference needs"),
        (broken(extractor=np.str_("inception-v3-compat"), weights=np.str_("ab" * 32)), 2, "was made with"),
        ({"arr_0": np.zeros((4, 8, 8, 1), np.float32)}, 2, "images are float32"),
        ({"arr_0": np.zeros((0, 8, 8, 1), np.uint8)}, 2, "zero images"),
        ({"arr_0": np.zeros((4, 8, 8, 2), np.uint8)}, 2, "is not grey or RGB images"),
        ({"arr_0": np.zeros((4, 9, 9, 1), np.uint8)}, 2, "bring them to one size"),
        ({"arr_0": np.zeros((1, 8, 8, 1), np.uint8)}, 2, "has 1 image(s) and fid needs 2"),
    ],
)
def test_unusable_references(arrays, code, line, files, tmp_path, capsys):
    np.savez(tmp_path / "ref.npz", **arrays)
    assert score(files, tmp_path / "ref.npz", tmp_path) == code
    assert line in (shown := error(capsys)) and "ref.npz" in shown


class Spy:
    """What a pickle would run if it were opened."""

    opened = False

    def __reduce__(self):
        return (setattr, (Spy, "opened", True))


def test_a_pickle_is_never_opened(files, tmp_path, capsys):
    torch.save({"mu": Spy(), "sigma": Spy()}, tmp_path / "stats.pt")
    (tmp_path / "stats.npz").write_bytes(pickle.dumps({"mu": Spy(), "sigma": Spy()}))
    for name in ("stats.pt", "stats.npz"):
        assert score(files, tmp_path / name, tmp_path) == 3
    assert not Spy.opened
    assert "never unpickled" in capsys.readouterr().err


def test_missing_damaged_and_offline(files, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(files["edm"].read_bytes()[:500])
    for ref, line in (
        *((tmp_path / name, "no such file") for name in ("none.npz", "none.pt", "none")),
        (tmp_path / "cut.npz", "not a readable npz"),
        ("cifar10-train", "downloads are off (--offline)"),
        ("adm-imagenet256", "downloads are off (--offline)"),
    ):
        assert score(files, ref, tmp_path, "--offline", "--data", tmp_path) == 3 and line in error(capsys), ref
    assert fid("--samples", tmp_path / "none", "--ref", files["edm"], "--extractor", "pixels") == 3
    assert "no such file" in error(capsys)
    colours = write_images(tmp_path / "colours")
    assert score(files, colours, tmp_path) == 2 and "bring them to one size" in error(capsys)


def test_what_killed_processes_left_is_removed_when_the_file_is_written_again(tmp_path):
    path, here = tmp_path / "a.json", platform.node()
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True)
    gone = tmp_path / f"a.json.{here}-{dead.stdout.strip()}.tmp"
    kept = [tmp_path / f"a.json.{here}-{os.getpid()}.tmp.tmp", tmp_path / "a.json.elsewhere-1.tmp", tmp_path / "b.tmp"]
    for file in (gone, *kept):
        file.write_text("half")
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1} and not gone.exists() and all(file.exists() for file in kept)
