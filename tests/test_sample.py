"""`eval.sample` and `eval.classifier`: what they write, that a sample depends on its seed alone, what they refuse."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import classifier
from eval import sample as module
from eval.sampling.grid import class_labels, grid
from eval.scoring.classifier import ClassifierAccuracy, classifier_accuracy, read_accuracy
from meanflow.data.dataset import digits
from meanflow.errors import AssetError, NumericsError, UserError
from meanflow.sampling import time_grid
from meanflow.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from meanflow.training.model import generate, load, noise, to_uint8
from meanflow.training.run_folder import RunFolder

CPU = torch.device("cpu")


def sample(*arguments) -> None:
    assert module.main([str(argument) for argument in [*arguments, "--device", "cpu"]]) == 0


def arrays(file: Path) -> np.ndarray:
    return np.load(file)["arr_0"]


def refused(*arguments) -> UserError:
    with pytest.raises(UserError) as caught:
        sample(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.fixture
def npz(trained, tmp_path):
    """`npz("--n", 5, …)`: the samples of the trained run."""

    def npz(*arguments) -> np.ndarray:
        file = tmp_path / f"{len(list(tmp_path.iterdir()))}.npz"
        sample(trained.path, "--out", file, *arguments)
        return arrays(file)

    return npz


# --- what it writes ----------------------------------------------------------------------------------------------


def test_npz_folder_and_grid_hold_the_same_samples(trained, tmp_path):
    outs = [tmp_path / "s.npz", tmp_path / "folder", tmp_path / "deep" / "grid.png"]
    for out in outs:
        sample(trained.path, "--n", 7, "--out", out)
    images = arrays(outs[0])
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 1
    assert np.load(outs[0]).files == ["arr_0"]
    files = sorted(outs[1].iterdir())
    assert [file.name for file in files] == [f"{k:06d}.png" for k in range(7)]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert picture.mode == "L" and np.array_equal(np.array(picture), image[:, :, 0])
    with Image.open(outs[2]) as picture:  # three columns; see test_grid.py
        assert np.array_equal(np.array(picture), np.array(grid(torch.from_numpy(images).permute(0, 3, 1, 2), 3)))


def test_colours_and_classes(trained_with_classes, tmp_path):
    sample(trained_with_classes.path, "--n", 3, "--out", tmp_path / "s.npz")
    sample(trained_with_classes.path, "--n", 3, "--out", tmp_path / "folder")
    assert arrays(tmp_path / "s.npz").shape == (3, 8, 8, 3)
    assert np.load(tmp_path / "s.npz")["labels"].tolist() == [0, 1, 0]
    names = sorted(file.name for file in (tmp_path / "folder").iterdir())
    assert names == ["000000_class0.png", "000001_class1.png", "000002_class0.png"]
    with Image.open(tmp_path / "folder" / names[2]) as picture:
        assert picture.mode == "RGB" and np.array_equal(np.array(picture), arrays(tmp_path / "s.npz")[2])


def test_where_it_goes_and_the_line_it_prints(trained, tmp_path, capsys, monkeypatch):
    run = shutil.copytree(trained.path, tmp_path / "run")
    for times, name in (
        (["--steps", 2], "step00000006-nfe2-ema0.9-seed0.png"),
        (["--grid", "1,0.3,0"], "step00000006-nfe2-grid1-0.3-0-ema0.9-seed0.png"),
    ):
        sample(run, "--n", 2, *times)
        assert (run / "samples" / name).exists() and name in capsys.readouterr().out
    lone = shutil.copy(checkpoint_path(trained.checkpoints, 6), tmp_path / "carried.pt")
    sample(lone, "--n", 2)
    assert (tmp_path / "step00000006-nfe1-ema0.9-seed0.png").exists()
    monkeypatch.setenv("HOME", str(tmp_path))
    sample(run, "--n", 3, "--steps", 4, "--seed", 5, "--ema", "0.5", "--out", "~/s.npz")
    assert f"3 samples, NFE 4, EMA 0.5, step 6, seed 5 → {tmp_path / 's.npz'}\n" in capsys.readouterr().out


# --- a sample depends on its seed alone --------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_sample_k_is_the_same_in_any_batch(npz, steps):
    whole = npz("--n", 9, "--steps", steps)
    for batch in (1, 2, 4):
        assert np.array_equal(npz("--n", 9, "--steps", steps, "--batch", batch), whole), batch
    assert np.array_equal(npz("--n", 4, "--steps", steps), whole[:4])
    assert len({image.tobytes() for image in whole}) == 9
    other = npz("--n", 9, "--steps", steps, "--seed", 1)
    assert all(not np.array_equal(a, b) for a, b in zip(whole, other, strict=True))


def test_noise_is_per_sample_and_standard_normal():
    z = noise(3, 0, 400, (1, 8, 8))
    assert torch.equal(noise(3, 123, 125, (1, 8, 8)), z[123:125])
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    correlation = torch.corrcoef(z.flatten(1)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.7, "neighbouring seeds must not give related noise"
    assert not torch.equal(noise(4, 0, 1, (1, 8, 8)), z[:1])


def test_one_step_is_the_papers_formula(trained, npz):
    """z_0 = z_1 − u(z_1, 0, 1), with the recipe's EMA as weights; two steps go by way of t = 1/2, or where asked."""
    model = load(trained.path, device=CPU)
    z, zero, one = noise(0, 0, 5, model.config.z_shape), torch.zeros(5), torch.ones(5)

    def by_way_of(t: float):
        middle = z - (1 - t) * model.network(z, t * one, one)
        return middle - t * model.network(middle, zero, t * one)

    with torch.no_grad():
        torch.testing.assert_close(generate(model, 0, 5, 1, 0), z - model.network(z, zero, one))
        torch.testing.assert_close(generate(model, 0, 5, 2, 0), by_way_of(0.5))
        torch.testing.assert_close(generate(model, 0, 5, 1, 0, grid=(1, 0.3, 0)), by_way_of(0.3))
        asked = to_uint8(by_way_of(0.3), "round").permute(0, 2, 3, 1).numpy()
    assert np.array_equal(npz("--n", 5, "--grid", "1,0.3,0"), asked)
    assert np.array_equal(npz("--n", 5, "--grid", "1,0.5,0"), npz("--n", 5, "--steps", 2)) and time_grid(2) == (
        1,
        0.5,
        0,
    )
    found = load_checkpoint(checkpoint_path(trained.checkpoints, 6))
    assert all(torch.equal(p, found.ema["0.9"][name]) for name, p in model.network.named_parameters())
    assert not model.network.training


def test_uint8_rules(trained, tmp_path, npz):
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 2.0])
    assert to_uint8(x, "round").tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert to_uint8(x, "floor").tolist() == [0, 0, 0, 127, 254, 255, 255]
    exact = torch.arange(256).float()
    for rule in ("round", "floor"):  # what training saw as x comes back as it was, up to rounding in "floor"
        back = to_uint8(exact / 127.5 - 1, rule).float()
        assert (back - exact).abs().max() <= (0 if rule == "round" else 1)

    run = RunFolder(shutil.copytree(trained.path, tmp_path / "run"))
    recipe = run.config_file.read_text()
    run.config_file.write_text(recipe.replace("uint8: round", "uint8: floor"))  # as `resume RUN --set` would
    assert "uint8: floor" in run.config_file.read_text()
    sample(run.path, "--n", 4, "--out", tmp_path / "recipe.npz")
    sample(run.path, "--n", 4, "--quantise", "round", "--out", tmp_path / "asked.npz")
    assert np.array_equal(arrays(tmp_path / "recipe.npz"), npz("--n", 4, "--quantise", "floor"))
    assert np.array_equal(arrays(tmp_path / "asked.npz"), npz("--n", 4))
    assert not np.array_equal(arrays(tmp_path / "recipe.npz"), arrays(tmp_path / "asked.npz"))


# --- which EMA, which label --------------------------------------------------------------------------------------


def test_each_ema_and_the_weights_give_their_own_samples(npz):
    default, slow, fast, weights = (
        npz("--n", 4, *ema) for ema in ([], ["--ema", "0.9"], ["--ema", "0.5"], ["--ema", "weights"])
    )
    assert np.array_equal(default, slow)
    assert not np.array_equal(slow, fast) and not np.array_equal(fast, weights) and not np.array_equal(slow, weights)


@pytest.mark.parametrize("ema", ["0.99", "0.90", "", "model"])
def test_an_ema_that_is_not_there_names_those_that_are(trained, ema):
    message = str(refused(trained.path, "--ema", ema))
    assert "0.9, 0.5 and weights" in message and f"no EMA {ema}" in message


def test_labels_take_turns_or_are_chosen(trained_with_classes, tmp_path):
    found = []
    for k, label in enumerate(([], ["--label", 0], ["--label", 1])):
        sample(trained_with_classes.path, "--n", 4, *label, "--out", tmp_path / f"{k}.npz")
        found.append(arrays(tmp_path / f"{k}.npz"))
    turns, zeros, ones = found
    assert np.load(tmp_path / "2.npz")["labels"].tolist() == [1] * 4
    assert np.array_equal(turns[::2], zeros[::2]) and np.array_equal(turns[1::2], ones[1::2])
    assert not np.array_equal(zeros, ones)
    model = load(trained_with_classes.path, device=CPU)
    assert class_labels(model, 6, None, 3).tolist() == [0, 0, 0, 1, 1, 1]  # in a grid a class for each row


# --- classifier accuracy -----------------------------------------------------------------------------------------


def test_classifier_accuracy(train_tiny, capsys, monkeypatch):
    run = train_tiny(model__classes=10)
    assert classifier.main([str(run.path), "--n", "200", "--device", "cpu"]) == 0
    file = run.path / "agreement-step00000006-ema0.9-nfe1.json"  # as tables have always called it
    found = read_accuracy(file)
    assert found.accuracy < 0.5 and 0.95 < found.real < 1  # six steps teach nothing
    assert f"{found.accuracy:.1%} of 200 samples" in capsys.readouterr().out

    real = digits("train")

    def ideal(model, start, stop, steps, seed, labels):
        pick = [int((real.labels == label).nonzero()[k % 100]) for k, label in enumerate(labels)]
        return real.images[pick].float() / 127.5 - 1

    monkeypatch.setattr("eval.scoring.classifier.generate", ideal)
    assert classifier_accuracy(load(run.path, device=CPU), 200, 1).accuracy > 0.99

    file.write_text(
        '{"agreement": 0.5, "real": 1, "samples": 7, "steps": 1, "ema": "0.9", "seed": 0}'
    )  # of any version
    assert read_accuracy(file) == ClassifierAccuracy(0.5, 1, 7, 1, "0.9", 0)
    file.write_text('{"agreement": 0.5}')
    with pytest.raises(AssetError, match="is not a classifier's result"):
        read_accuracy(file)


def test_runs_that_no_classifier_of_pixels_can_judge(trained):
    with pytest.raises(UserError, match="is unconditional"):
        classifier.main([str(trained.path)])


# --- what is refused ---------------------------------------------------------------------------------------------


def test_wrong_options(trained, trained_with_classes):
    for option in ("--n", "--steps", "--batch", "--columns"):
        assert f"argument {option}: give a whole number of 1 or more, not '0'" in str(refused(trained.path, option, 0))
    assert "descend from 1 to 0" in str(refused(trained.path, "--grid", "0.9,0"))
    assert "not allowed with" in str(refused(trained.path, "--grid", "1,0", "--steps", 2))
    assert "unconditional" in str(refused(trained.path, "--label", 0))
    for label in (2, -1):
        assert "classes must be in 0 … 1" in str(refused(trained_with_classes.path, "--label", label))


def test_no_run_there(trained, tmp_path):
    assert "no such checkpoint" in str(refused(tmp_path / "nothing"))
    error = refused(tmp_path)
    assert isinstance(error, AssetError) and "has no checkpoint yet; train first" in str(error)
    (tmp_path / "notes.txt").write_text("hello")
    assert "cannot be read as a checkpoint" in str(refused(tmp_path / "notes.txt"))
    content = torch.load(checkpoint_path(trained.checkpoints, 6), weights_only=True)
    content["ema"]["0.9"].popitem()
    torch.save(content, tmp_path / "other.pt")
    assert "do not fit the network" in str(refused(tmp_path / "other.pt"))


def test_outs_are_refused_before_any_sampling(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("meanflow.training.model.generate", lambda *ignored: pytest.fail("sampled first"))
    assert "FILE.png, FILE.npz or a folder" in str(refused(trained.path, "--out", tmp_path / "grid.jpg"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000099.png").write_bytes(b"of an earlier call")
    (tmp_path / "grid.png").mkdir()
    for name in ("full", "grid.png"):
        assert "name a new one" in str(refused(trained.path, "--out", tmp_path / name))
    (tmp_path / "file").write_text("")
    for out in ("file", "file/inside.png", "file/inside", "file/inside.npz", "/proc/x", "/proc/x.png", "x" * 300):
        error = refused(trained.path, "--n", 1, "--out", tmp_path / out)
        assert "cannot be written" in str(error) or "name too long" in str(error), out


def test_a_damaged_newest_checkpoint_is_passed_over_saying_so(trained, tmp_path, caplog):
    run = RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))
    older, newest = list_checkpoints(run.checkpoints)
    newest.write_bytes(newest.read_bytes()[:-500])
    sample(run.path, "--n", 1, "--out", tmp_path / "s.npz")
    (warning,) = caplog.messages
    assert str(newest) in warning and older.name in warning
    older.write_bytes(b"")
    error = refused(run.path, "--n", 1, "--out", tmp_path / "s.npz")
    assert isinstance(error, AssetError) and "no intact checkpoint" in str(error)


def test_samples_that_are_not_finite(trained):
    model = load(trained.path, device=CPU)
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"EMA 0\.9 gives samples that are not finite"):
        generate(model, 0, 2, 1, 0)
