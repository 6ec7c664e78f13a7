"""Extractors: their names, and what they refuse."""

import pytest
import torch
from fid_helpers import fid
from sklearn.datasets import load_digits

from eval.scoring import extractors
from eval.scoring.extractors import INCEPTION, Extractor, Options, create, dims_of
from eval.scoring.metrics import frechet
from eval.scoring.options import EXTRACTORS
from eval.scoring.references import reference_of_images
from meanflow.errors import AssetError, UserError

CPU = Options(torch.device("cpu"))


def test_features_do_not_follow_an_autocast_around_them():
    linear = torch.nn.Linear(4, 4)
    extractor = Extractor("linear", lambda x: {"y": linear(x.flatten(1).float())}, {"fid": "y"}, torch.device("cpu"))
    images = torch.randint(0, 256, (3, 1, 2, 2), dtype=torch.uint8)
    expected = extractor.extract(images)["y"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor.extract(images)["y"], expected)


def test_the_pixel_scale_on_digits():
    """Random halves of the real digits lie 0.28 ± 0.03 apart in [−1, 1] (0.07 in [0, 1], 18 in 0 … 16)."""
    images = torch.from_numpy(load_digits().images * (255 / 16)).round().to(torch.uint8)[:, None]
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    features = create("pixels", CPU, ["fid"]).extract(images[order])["pixels"]
    assert features.min() == -1 and features.max() == 1
    assert frechet(features[:898], features[898:]) == pytest.approx(0.28, abs=0.08)


def test_only_inception_is_called_fid():
    def labels(name):
        extractor = Extractor(name, lambda x: {}, {}, torch.device("cpu"))
        return [extractor.label(metric) for metric in ("fid", "isc_mean", "precision")]

    assert labels(INCEPTION) == ["fid", "isc_mean", "precision"]
    assert labels("mine") == ["fd-mine", "isc_mean-mine", "precision-mine"]


def by_mean(options, metrics):
    return Extractor("mean", lambda x: {"m": x.float().mean((2, 3))}, {"fid": "m"}, options.device)


def test_named_and_imported_extractors():
    assert set(EXTRACTORS) == extractors.FACTORIES.keys()  # what --help names
    shape = (3, 32, 32)
    assert [dims_of(name, shape) for name in EXTRACTORS] == [2048, 3072, 192]  # no weights are fetched for that
    mine = f"{__name__}:by_mean"
    assert create(mine, CPU, ["fid"]).dims((3, 4, 4)) == {"m": 3} and dims_of(mine, shape) == 3
    with pytest.raises(UserError, match="no features for kid"):
        create(mine, CPU, ["kid"])


def test_unknown_weights_are_refused_with_their_hash(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save({"a": torch.zeros(1)}, path)
    with pytest.raises(AssetError, match=r"sha256 [0-9a-f]{64} is not that of .*--allow-weights"):
        create(INCEPTION, Options(torch.device("cpu"), path), ["fid"])
    with pytest.raises(AssetError, match="holds no Inception weights"):
        create(INCEPTION, Options(torch.device("cpu"), path, allow_weights=True), ["fid"])


def test_weights_that_cannot_be_had(tmp_path, monkeypatch):
    """Offline, or where the download fails: one line, with the ways out."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(AssetError, match=r"no Inception weights at .*--weights FILE, or --extractor pixels"):
        create(INCEPTION, CPU, ["fid"])

    def refuse(url, path, **kwargs):
        assert kwargs["hash_prefix"] == extractors.INCEPTION_SHA256
        raise OSError("unreachable")

    monkeypatch.setattr("torch.hub.download_url_to_file", refuse)
    with pytest.raises(AssetError, match=r"failed \(unreachable\).*--extractor pixels"):
        create(INCEPTION, Options(torch.device("cpu"), allow_download=True), ["fid"])


def test_grey_images_are_refused_where_rgb_is_needed():
    inception = Extractor(INCEPTION, lambda x: {}, {}, torch.device("cpu"), channels=3)
    with pytest.raises(UserError, match=r"images are grey .*needs 3"):
        inception.check_image((1, 8, 8), "samples")
    inception.check_image((3, 8, 8), "samples")


def test_selftest_without_weights_is_skipped_and_never_ok(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert fid("selftest", "--data", tmp_path) == 3
    assert capsys.readouterr().out == "skipped: no weights\n"


def test_selftest_knows_the_published_score(tmp_path, monkeypatch, capsys):
    """All of it on stand-ins for weights and data: right is "ok", wrong is exit 4."""

    def stand_in(name, options, metrics):
        def forward(images):
            x = images.float().flatten(1)[:, :7] / 64
            return {"2048": x, "logits_unbiased": x}

        return Extractor(INCEPTION, forward, extractors.INCEPTION_LAYERS, options.device, 3)

    def images(name, data, allow_download):
        n, seed = {"cifar10-train": (60, 1), "cifar10-test": (30, 2)}[name]
        generator = torch.Generator().manual_seed(seed)
        return reference_of_images(torch.randint(0, 256, (n, 3, 4, 4), dtype=torch.uint8, generator=generator), name)

    monkeypatch.setattr("eval.scoring.evaluate.create", stand_in)
    monkeypatch.setattr("eval.scoring.evaluate.open_reference", images)
    (tmp_path / "cifar-10-python.tar.gz").touch()
    args = ("selftest", "--data", tmp_path, "--cache", tmp_path / "cache", "--device", "cpu")
    assert fid(*args) == 4
    score = float(capsys.readouterr().out.split("training set  ")[1].split()[0])
    monkeypatch.setattr("eval.scoring.evaluate.PUBLISHED_IS", score)
    assert fid(*args) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown[-1] == "ok" and shown[1].startswith("FID of the training set to the test set")
