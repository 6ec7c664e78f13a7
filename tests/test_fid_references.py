"""References: every layout of the same statistics gives one number; every unusable file gives its line."""

import pickle
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from fid_helpers import fid, grey_blobs, result
from PIL import Image
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

M = 40


def pixels(images: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(images).permute(0, 3, 1, 2).flatten(1).float() / 127.5 - 1


def statistics(images: np.ndarray) -> dict[str, np.ndarray]:
    return {k: v.astype(np.float64) for k, v in fid_features_to_statistics(pixels(images)).items()}


@pytest.fixture(scope="module")
def images():
    return {"fake": grey_blobs(30, 1), "real": 255 - grey_blobs(M, 2) // 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory, images):
    """{layout: path} of one reference, in every layout that is read."""
    root = tmp_path_factory.mktemp("refs")
    np.savez(root / "fake.npz", arr_0=images["fake"])
    real, stats = images["real"], statistics(images["real"])
    mu, sigma = stats["mu"], stats["sigma"]
    out = {name: root / f"{name}.npz" for name in ("edm", "adm", "jax", "images")}
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
    out["zip"], out["tar"] = root / "all.zip", root / "all.tar.gz"
    with zipfile.ZipFile(out["zip"], "w") as archive, tarfile.open(out["tar"], "w:gz") as tar:
        for path in sorted(out["folder"].iterdir()):
            archive.write(path, path.name)
            tar.add(path, path.name)
    out["make-ref"] = root / "made.npz"
    cache = root / "cache"
    code = fid("make-ref", "--ref", out["images"], "--out", out["make-ref"], "--extractor", "pixels", "--cache", cache)
    assert code == 0
    return {**out, "fake": root / "fake.npz"}


def score(files, ref, out, *more) -> int:
    return fid(
        *("--samples", files["fake"], "--ref", ref, "--extractor", "pixels"),
        *("--out", out, "--cache", out / "cache", *more),
    )


def test_every_layout_gives_one_number(files, images, tmp_path):
    expected = fid_statistics_to_metric(statistics(images["fake"]), statistics(images["real"]), verbose=False)
    for name, path in files.items():
        if name != "fake":
            assert score(files, path, tmp_path / name) == 0, name
            found = result(tmp_path / name / "fake.json")
            assert list(found["metrics"]) == ["fd-pixels"]  # never "fid"
            assert found["metrics"]["fd-pixels"] == pytest.approx(expected["frechet_inception_distance"], rel=1e-6)
            assert not found["comparable"] and len(found["protocol"]["reference"]["sha256"]) == 64


def test_make_ref_writes_what_it_is(files):
    made = np.load(files["make-ref"], allow_pickle=False)
    assert int(made["n"]) == M and str(made["extractor"]) == "pixels"
    assert "40 images of" in str(made["provenance"]) and "8×8" in str(made["provenance"])


def test_the_cache_goes_by_content_not_by_name(files, images, tmp_path):
    same_name = tmp_path / "ref.npz"
    values = []
    for contents in (images["real"], images["fake"]):
        np.savez(same_name, arr_0=contents)
        assert score(files, same_name, tmp_path / "out") == 0
        values.append(result(tmp_path / "out" / "fake.json")["metrics"]["fd-pixels"])
    assert values[0] > 1 and abs(values[1]) < 1e-4


def test_a_damaged_cache_is_made_again(files, tmp_path):
    more = ("--metrics", "fid,prc")
    assert score(files, files["images"], tmp_path, *more) == 0
    first = result(tmp_path / "fake.json")["metrics"]
    cached = list((tmp_path / "cache").glob("*.npz"))
    assert len(cached) == 2
    for path in cached:
        path.write_bytes(path.read_bytes()[:-200])
    assert score(files, files["images"], tmp_path, *more) == 0
    assert result(tmp_path / "fake.json")["metrics"] == first


def test_images_beside_adm_statistics_serve_precision_and_recall_only(files, tmp_path, capsys):
    assert score(files, files["adm"], tmp_path, "--metrics", "fid,prc") == 0
    assert "precision-pixels" in result(tmp_path / "fake.json")["metrics"]
    assert score(files, files["adm"], tmp_path, "--metrics", "kid", "--kid-subset-size", 10) == 2
    assert "20 images, for precision and recall only" in capsys.readouterr().err


def test_statistics_alone_cannot_serve_kid(files, tmp_path, capsys):
    assert score(files, files["jax"], tmp_path, "--metrics", "fid,kid", "--kid-subset-size", 10) == 2
    assert "jax.npz holds ref_mu, ref_sigma, and kid needs" in capsys.readouterr().err


def broken(mu=None, sigma=None):
    return {"mu": np.zeros(64) if mu is None else mu, "sigma": np.eye(64) if sigma is None else sigma}


UNEVEN = np.eye(64)
UNEVEN[0, 1] = 0.5
NEGATIVE = np.eye(64)
NEGATIVE[5, 5] = -1


@pytest.mark.parametrize(
    ("arrays", "code", "line"),
    [
        (broken(sigma=np.eye(63)), 4, "are not (D,) and (D, D)"),
        (broken(mu=np.full(64, np.nan)), 4, "not finite"),
        (broken(sigma=UNEVEN), 4, "not symmetric"),
        (broken(sigma=NEGATIVE), 4, "negative eigenvalues"),
        (broken(mu=np.zeros(12), sigma=np.eye(12)), 4, "statistics of 12 features and pixels gives 64"),
        ({"mu": np.array([{"a": 1}], dtype=object), "sigma": np.eye(64)}, 3, "pickled objects"),
        ({"mu": np.zeros(64)}, 2, "holds mu: a reference needs"),
        ({**broken(), "extractor": np.str_("inception-v3-compat"), "weights": np.str_("ab" * 32)}, 2, "was made with"),
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
    errors = capsys.readouterr().err.strip().splitlines()
    assert line in errors[-1] and "ref.npz" in errors[-1] and errors[-1].startswith("error: ")


class Spy:
    """What a pickle would run if it were opened."""

    opened = False

    def __reduce__(self):
        return (setattr, (Spy, "opened", True))


def test_a_pickle_is_never_opened(files, tmp_path, capsys):
    for name, save in {
        "stats.pt": torch.save,
        "stats.npz": lambda value, path: path.write_bytes(pickle.dumps(value)),
    }.items():
        save({"mu": Spy(), "sigma": Spy()}, tmp_path / name)
        assert score(files, tmp_path / name, tmp_path) == 3
    assert not Spy.opened
    assert "never unpickled" in capsys.readouterr().err


def test_missing_and_damaged_files(files, tmp_path, capsys):
    (tmp_path / "cut.npz").write_bytes(files["edm"].read_bytes()[:500])
    for ref in ("none.npz", "none.pt", "none", "cut.npz"):
        assert score(files, tmp_path / ref, tmp_path) == 3, ref
    assert fid("--samples", tmp_path / "none", "--ref", files["edm"], "--extractor", "pixels") == 3
    assert capsys.readouterr().err.count("no such file") == 4


def test_cifar10_is_not_fetched_offline(files, tmp_path, capsys):
    assert score(files, "cifar10-train", tmp_path, "--offline", "--data", tmp_path) == 3
    assert "downloads are off (--offline)" in capsys.readouterr().err
