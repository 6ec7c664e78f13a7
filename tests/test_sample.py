"""`python -m eval.sample`: what it writes, that a sample depends on its seed alone, and what it refuses."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval import sample as module
from meanflow.errors import AssetError, NumericsError, UserError, run_main
from meanflow.sampling import time_grid
from meanflow.training.checkpoint import checkpoint_path, list_checkpoints, load_checkpoint
from meanflow.training.model import generate, load_model, noise, to_uint8
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


# --- what it writes --------------------------------------------------------------------------------------------


def test_npz_folder_and_grid_hold_the_same_samples(trained, tmp_path):
    outs = [tmp_path / "s.npz", tmp_path / "folder", tmp_path / "deep" / "grid.png"]
    for out in outs:
        sample(trained.path, "--n", 7, "--out", out)
    images = arrays(outs[0])
    assert images.shape == (7, 8, 8, 1) and images.dtype == np.uint8 and images.std() > 1
    files = sorted(outs[1].iterdir())
    assert [file.name for file in files] == [f"{k:06d}.png" for k in range(7)]
    for file, image in zip(files, images, strict=True):
        with Image.open(file) as picture:
            assert picture.mode == "L" and np.array_equal(np.array(picture), image[:, :, 0])
    with Image.open(outs[2]) as picture:
        grid = np.array(picture)
    scale, gap = 8, 2  # three columns of 8 pixels, enlarged eightfold
    assert grid.shape == (3 * (8 * scale + gap) + gap, 3 * (8 * scale + gap) + gap)
    for k, image in enumerate(images):
        y, x = (gap + i * (8 * scale + gap) for i in divmod(k, 3))
        tile = grid[y : y + 8 * scale, x : x + 8 * scale].reshape(8, scale, 8, scale).mean((1, 3))
        assert np.corrcoef(tile.ravel(), image.ravel())[0, 1] > 0.95, k
    assert (grid[:gap] == 255).all() and (grid[-8 * scale :, -8 * scale :] == 255).all(), "empty places are white"


def test_colour_images(trained_with_classes, tmp_path):
    sample(trained_with_classes.path, "--n", 3, "--out", tmp_path / "s.npz")
    sample(trained_with_classes.path, "--n", 3, "--out", tmp_path / "folder")
    assert arrays(tmp_path / "s.npz").shape == (3, 8, 8, 3)
    with Image.open(tmp_path / "folder" / "000002.png") as picture:
        assert picture.mode == "RGB" and np.array_equal(np.array(picture), arrays(tmp_path / "s.npz")[2])


def test_without_out_it_goes_to_the_run_folder(trained, tmp_path, capsys):
    run = shutil.copytree(trained.path, tmp_path / "run")
    sample(run, "--n", 2, "--steps", 2)
    (file,) = (run / "samples").iterdir()
    assert file.name == "step00000006-nfe2-ema0.9-seed0.png" and str(file) in capsys.readouterr().out
    lone = shutil.copy(checkpoint_path(trained.checkpoints, 6), tmp_path / "carried.pt")
    sample(lone, "--n", 2)
    assert (tmp_path / "step00000006-nfe1-ema0.9-seed0.png").exists()


def test_the_line_it_prints_names_what_was_done(trained, tmp_path, capsys):
    sample(trained.path, "--n", 3, "--steps", 4, "--seed", 5, "--ema", "0.5", "--out", tmp_path / "s.npz")
    line = capsys.readouterr().out
    for part in ("3 samples", "NFE 4", "EMA 0.5", "step 6", "seed 5", str(tmp_path / "s.npz")):
        assert part in line


# --- a sample depends on its seed alone ------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [1, 3])
def test_sample_k_is_the_same_in_any_batch(npz, steps):
    whole = npz("--n", 9, "--steps", steps)
    for batch in (1, 2, 4):
        assert np.array_equal(npz("--n", 9, "--steps", steps, "--batch", batch), whole), batch
    assert np.array_equal(npz("--n", 4, "--steps", steps), whole[:4])
    assert len({image.tobytes() for image in whole}) == 9


def test_the_seed_changes_every_sample(npz):
    one, two = npz("--n", 6), npz("--n", 6, "--seed", 1)
    assert all(not np.array_equal(a, b) for a, b in zip(one, two, strict=True))


def test_noise_is_per_sample_and_standard_normal():
    z = noise(3, 0, 400, (1, 8, 8))
    assert torch.equal(noise(3, 123, 125, (1, 8, 8)), z[123:125])
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02
    correlation = torch.corrcoef(z.flatten(1)).fill_diagonal_(0)
    assert correlation.abs().max() < 0.7, "neighbouring seeds must not give related noise"
    assert not torch.equal(noise(4, 0, 1, (1, 8, 8)), z[:1])


def test_one_step_is_the_papers_formula(trained):
    """z_0 = z_1 − u(z_1, 0, 1), with the recipe's EMA as weights; two steps go by way of t = 1/2."""
    model = load_model(trained.path, None, CPU)
    z, one, half = noise(0, 0, 5, model.shape), torch.ones(5), torch.full((5,), 0.5)
    with torch.no_grad():
        expected = z - model.network(z, one, torch.zeros(5))
        middle = z - 0.5 * model.network(z, one, half)
        expected2 = middle - 0.5 * model.network(middle, half, torch.zeros(5))
    torch.testing.assert_close(generate(model, 0, 5, 1, 0), expected)
    torch.testing.assert_close(generate(model, 0, 5, 2, 0), expected2)
    assert time_grid(2) == (1, 0.5, 0)
    found = load_checkpoint(checkpoint_path(trained.checkpoints, 6))
    assert all(torch.equal(p, found.ema["0.9"][name]) for name, p in model.network.named_parameters())
    assert not model.network.training


def test_quantisation_rules():
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 0.999, 1.0, 2.0])
    assert to_uint8(x, "round").tolist() == [0, 0, 0, 128, 255, 255, 255]
    assert to_uint8(x, "floor").tolist() == [0, 0, 0, 127, 254, 255, 255]
    exact = torch.arange(256).float()
    for rule in ("round", "floor"):  # what training saw as x comes back as it was, up to rounding in "floor"
        back = to_uint8(exact / 127.5 - 1, rule).float()
        assert (back - exact).abs().max() <= (0 if rule == "round" else 1)


# --- which EMA, which label ------------------------------------------------------------------------------------


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
    files = [tmp_path / f"{name}.npz" for name in "abc"]
    sample(trained_with_classes.path, "--n", 4, "--out", files[0])
    sample(trained_with_classes.path, "--n", 4, "--label", 0, "--out", files[1])
    sample(trained_with_classes.path, "--n", 4, "--label", 1, "--out", files[2])
    turns, zeros, ones = map(arrays, files)
    assert np.array_equal(turns[::2], zeros[::2]) and np.array_equal(turns[1::2], ones[1::2])
    assert not np.array_equal(zeros, ones)


def test_a_grid_has_a_class_for_each_row(trained_with_classes, tmp_path, monkeypatch):
    asked = []

    def spy(model, start, stop, steps, seed, labels):
        asked.extend(labels.tolist())
        return generate(model, start, stop, steps, seed, labels)

    monkeypatch.setattr(module, "generate", spy)
    sample(trained_with_classes.path, "--n", 6, "--columns", 3, "--out", tmp_path / "s.png")
    assert asked == [0, 0, 0, 1, 1, 1]


def test_wrong_labels(trained, trained_with_classes):
    assert "unconditional" in str(refused(trained.path, "--label", 0))
    for label in (2, -1):
        assert "--label must be in 0 … 1" in str(refused(trained_with_classes.path, "--label", label))


# --- what it refuses -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("option", ["--n", "--steps", "--batch", "--columns"])
def test_counts_below_one(trained, option):
    assert str(refused(trained.path, option, 0)) == f"{option} must be ≥ 1, got 0"


def test_no_run_there(tmp_path):
    assert "no such checkpoint" in str(refused(tmp_path / "nothing"))
    error = refused(tmp_path)
    assert isinstance(error, AssetError) and "has no checkpoint yet; train first" in str(error)
    (tmp_path / "notes.txt").write_text("hello")
    assert "cannot be read as a checkpoint" in str(refused(tmp_path / "notes.txt"))


def test_outs_are_refused_before_any_sampling(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "load_model", lambda *ignored: pytest.fail("sampled first"))
    assert "FILE.png, FILE.npz or a folder" in str(refused(trained.path, "--out", tmp_path / "grid.jpg"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "000099.png").write_bytes(b"of an earlier call")
    assert "name a new one" in str(refused(trained.path, "--out", tmp_path / "full"))


def test_outs_that_cannot_be_written(trained, tmp_path):
    (tmp_path / "file").write_text("")
    for out in ("file", "file/inside.png", "file/inside", "file/inside.npz"):
        error = refused(trained.path, "--n", 1, "--out", tmp_path / out)
        assert isinstance(error, AssetError) and "cannot be written" in str(error), out
    (tmp_path / "grid.png").mkdir()
    refused(trained.path, "--n", 1, "--out", tmp_path / "grid.png")


def test_a_damaged_newest_checkpoint_is_passed_over_saying_so(trained, tmp_path, capsys):
    run = RunFolder(Path(shutil.copytree(trained.path, tmp_path / "run")))
    older, newest = list_checkpoints(run.checkpoints)
    newest.write_bytes(newest.read_bytes()[:-500])
    sample(run.path, "--n", 1, "--out", tmp_path / "s.npz")
    said = capsys.readouterr()
    assert "step 4" in said.out and str(newest) in said.err and older.name in said.err
    assert len(said.err.splitlines()) == 1
    older.write_bytes(b"")
    error = refused(run.path, "--n", 1, "--out", tmp_path / "s.npz")
    assert isinstance(error, AssetError) and "no intact checkpoint" in str(error)


def test_samples_that_are_not_finite(trained):
    model = load_model(trained.path, None, CPU)
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(NumericsError, match=r"EMA 0\.9 gives samples that are not finite"):
        generate(model, 0, 2, 1, 0)


def test_damaged_files_are_one_line_through_the_real_entry_point(trained, tmp_path, capsys):
    whole = checkpoint_path(trained.checkpoints, 6).read_bytes()
    numbers = np.random.default_rng(0)
    lone, codes = tmp_path / "lone.pt", set()
    for _ in range(60):
        data = bytearray(whole)
        for position in [*numbers.integers(0, len(data), 2), int(numbers.integers(len(data) - 9000, len(data)))]:
            data[position] ^= 1 << int(numbers.integers(8))
        lone.write_bytes(data)
        code = run_main(module.main, [str(lone), "--n", "1", "--device", "cpu", "--out", str(tmp_path / "s.npz")])
        error = capsys.readouterr().err
        assert code in (0, 2, 3, 4) and (code == 0 or error.startswith("error: ")) and error.count("\n") <= 1, error
        codes.add(code)
    assert 3 in codes
