"""`python -m eval.plot`: what is drawn, of which runs, and what it says where there is nothing to draw."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image

from eval import plot as module
from eval.plot import PANELS, read_scores, running_mean
from meanflow.errors import AssetError, UserError
from meanflow.training.run_folder import RunFolder


def write_run(folder: Path, steps: int = 300, **columns) -> Path:
    """A run folder whose metrics are known."""
    folder.mkdir(parents=True)
    numbers = np.random.default_rng(steps)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "images": step * 8, "seconds": step / 10, "lr": min(1.0, step / 50)}
            for key in ("loss", "error", "error_r_eq_t", "error_r_lt_t", "grad_norm"):
                line[key] = 100 / step * math.exp(numbers.normal() / 5)
            line |= {"images_per_s": 80.0, "memory_mb": 300.0}
            line |= {key: value(step) if callable(value) else value for key, value in columns.items()}
            file.write(json.dumps(line) + "\n")
    return folder


def write_score(run: Path, step: int, nfe: int, value: float, ema: str = "0.9", status: str = "complete") -> None:
    (run / "eval").mkdir(exist_ok=True)
    result = {
        "status": status,
        "subject": {"step": step},
        "protocol": {"nfe": nfe, "ema": ema, "n": 1000},
        "comparable": False,
        "metrics": {"fd-pixels": value},
    }
    (run / "eval" / f"step{step}-nfe{nfe}-ema{ema}.json").write_text(json.dumps(result))


@pytest.fixture
def figure(monkeypatch):
    """Keeps the figure open, so that what is in it can be looked at; drawing its pixels is left to other tests."""
    drawn, close = [], pyplot.close
    monkeypatch.setattr(module.plt, "close", drawn.append)
    monkeypatch.setattr(module.plt.Figure, "savefig", lambda figure, out, **how: Path(out).touch())
    yield lambda: drawn[-1]
    close("all")


def draw(*arguments) -> None:
    assert module.main([str(argument) for argument in arguments]) == 0


def refused(*arguments) -> UserError:
    with pytest.raises(UserError) as caught:
        draw(*arguments)
    assert "\n" not in str(caught.value)
    return caught.value


def panels(figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def labels(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


# --- the figure ------------------------------------------------------------------------------------------------


def test_a_real_run_gives_a_readable_picture(trained, tmp_path, capsys):
    run = shutil.copytree(trained.path, tmp_path / "run")
    draw(run)
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1200 and picture.height >= 700
        assert 0.5 < np.asarray(picture.convert("L")).mean() / 255 < 0.999, "blank or black"
    assert (run / "curves.png").stat().st_size < 300_000
    assert str(run / "curves.png") in capsys.readouterr().out


def test_every_metric_of_the_file_has_its_panel(tmp_path, figure):
    draw(write_run(tmp_path / "run"))
    shown = panels(figure())
    assert list(shown) == [panel.title for panel in PANELS]
    for panel in PANELS:
        axis = shown[panel.title]
        assert axis.get_ylabel() == panel.unit and axis.get_xlabel() == "step"
        assert axis.get_yscale() == ("log" if panel.log else "linear")
        pale, mean = axis.lines
        assert pale.get_alpha() < 0.5 and len(mean.get_xdata()) == 300 and mean.get_xdata()[-1] == 300
    assert labels(figure()) == ["run"]


def test_the_real_metrics_file_has_no_metric_without_a_panel(trained):
    line = json.loads(trained.metrics_file.read_text().splitlines()[0])
    assert set(line) - {"step", "images", "seconds"} == {panel.key for panel in PANELS}


def test_two_runs_are_overlaid_with_a_legend(tmp_path, figure):
    one, two = write_run(tmp_path / "one"), write_run(tmp_path / "two", 200)
    draw(one, two, "--out", tmp_path / "both.png")
    assert labels(figure()) == ["one", "two"]
    for axis in panels(figure()).values():
        assert len(axis.lines) == 4 and len({line.get_color() for line in axis.lines}) == 2
    assert (tmp_path / "both.png").exists() and not (one / "curves.png").exists()


def test_runs_of_one_name_are_told_apart(tmp_path, figure):
    runs = [write_run(tmp_path / side / "run") for side in ("a", "b")]
    draw(*runs)
    assert labels(figure()) == ["a/run", "b/run"]


def test_more_runs_than_colours(tmp_path, figure):
    draw(*[write_run(tmp_path / f"run{k}", 30) for k in range(8)])
    assert len(labels(figure())) == 8


@pytest.mark.parametrize(
    ("x", "label", "end"), [("images", "images seen", 2400), ("seconds", "seconds of training", 30)]
)
def test_other_horizontal_axes(tmp_path, figure, x, label, end):
    run = write_run(tmp_path / "run")
    write_score(run, 150, 1, 3.0)
    draw(run, "--x", x)
    for axis in panels(figure()).values():
        assert axis.get_xlabel() == label
    assert panels(figure())["learning rate"].lines[1].get_xdata()[-1] == pytest.approx(end)
    assert panels(figure())["fd-pixels"].lines[0].get_xdata()[0] == pytest.approx(end / 2)


def test_a_metric_that_a_run_lacks_is_left_out(tmp_path, figure):
    """Flow Matching has no r ≠ t."""
    run = write_run(tmp_path / "fm", error_r_lt_t=None)
    draw(run)
    assert not any("average velocity" in title for title in panels(figure()))
    draw(run, write_run(tmp_path / "mf"))
    assert any("average velocity" in title for title in panels(figure()))
    assert labels(figure()) == ["fm", "mf"]


def test_one_outlier_does_not_flatten_a_linear_panel(tmp_path, figure):
    draw(write_run(tmp_path / "run", 1000, images_per_s=lambda step: 1e6 if step == 500 else 80.0 + step % 7))
    assert panels(figure())["throughput"].get_ylim()[1] < 200


def test_values_that_are_not_finite_or_not_there_are_gaps(tmp_path, figure):
    draw(write_run(tmp_path / "run", error=lambda step: math.nan if step % 3 == 0 else 5.0))
    mean = panels(figure())["squared error, all samples"].lines[1]
    assert len(mean.get_ydata()) == 200 and np.allclose(mean.get_ydata(), 5)


@pytest.mark.parametrize("steps", [1, 2, 19])
def test_short_runs_show_their_points(tmp_path, figure, steps):
    draw(write_run(tmp_path / "run", steps))
    (line,) = panels(figure())["training loss (weighted, Eq. 22: flat by design near p = 1)"].lines
    assert len(line.get_xdata()) == steps and line.get_marker() == "o"


def test_without_smoothing(tmp_path, figure):
    draw(write_run(tmp_path / "run"), "--smooth", 0)
    assert all(len(axis.lines) == 1 for axis in panels(figure()).values())


def test_a_torn_last_line_is_left_out(tmp_path, figure):
    run = write_run(tmp_path / "run", 50)
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 51, "los')
    draw(run)
    assert panels(figure())["learning rate"].lines[0].get_xdata()[-1] <= 50


# --- scores ----------------------------------------------------------------------------------------------------


def test_scores_are_drawn_where_evaluated(tmp_path, figure):
    run = write_run(tmp_path / "run")
    for step, value in ((200, 2.0), (100, 4.0)):
        write_score(run, step, 1, value)
    write_score(run, 200, 2, 1.5)
    write_score(run, 300, 2, 99.0, status="incomplete")
    draw(run)
    one, two = panels(figure())["fd-pixels"].lines
    assert list(one.get_xdata()) == [100, 200] and list(one.get_ydata()) == [4, 2]
    assert list(two.get_xdata()) == [200] and list(two.get_ydata()) == [1.5]
    texts = [text.get_text() for text in panels(figure())["fd-pixels"].get_legend().get_texts()]
    assert len(texts) == 2 and "NFE 1" in texts[0] and "EMA 0.9" in texts[0] and "1,000" in texts[0]


def test_no_score_is_lost_however_many_there_are(tmp_path, figure):
    run = write_run(tmp_path / "run")
    for nfe in (1, 2, 4):
        for ema in ("0.9", "0.99", "0.999", "weights"):
            write_score(run, 300, nfe, 1.0 + nfe, ema)
    draw(run)
    assert len(panels(figure())["fd-pixels"].lines) == 12


def test_scores_of_several_runs_carry_their_names(tmp_path, figure):
    runs = [write_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        write_score(run, 300, 1, 3.0)
    draw(*runs)
    texts = [text.get_text() for text in panels(figure())["fd-pixels"].get_legend().get_texts()]
    assert [text.partition(":")[0] for text in texts] == ["one", "two"]


def test_a_run_without_scores_has_none(tmp_path):
    assert read_scores(RunFolder(write_run(tmp_path / "run"))) == []


# --- nothing to draw -------------------------------------------------------------------------------------------


def test_a_folder_without_metrics(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "metrics.jsonl").write_text("")
    for name in ("empty", "blank", "not there"):
        error = refused(tmp_path / name)
        assert isinstance(error, AssetError) and str(error).startswith(f"{tmp_path / name}: has no metrics.jsonl")
    run = write_run(tmp_path / "run")
    assert "empty" in str(refused(run, tmp_path / "empty")) and not (run / "curves.png").exists()


@pytest.mark.parametrize("text", ['{"step": 1}\n', '{"step": 1, "loss": "high"}\n', '{"step": 1, "loss": [1]}\n'])
def test_metrics_of_something_else(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    assert isinstance(refused(tmp_path), AssetError)


@pytest.mark.parametrize(
    "text", ["{", "[1]", "3", '{"status": "complete"}', '{"status": "complete", "subject": {"step": 1}}']
)
def test_a_foreign_file_among_the_scores_is_named(tmp_path, text):
    run = write_run(tmp_path / "run")
    write_score(run, 100, 1, 1.0)
    (run / "eval" / "notes.json").write_text(text)
    error = refused(run)
    assert isinstance(error, AssetError) and str(run / "eval" / "notes.json") in str(error)


def test_outs_that_cannot_be_written(tmp_path):
    run = write_run(tmp_path / "run", 5)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "curves.png", tmp_path / "curves.xyz", tmp_path):
        assert isinstance(refused(run, "--out", out), AssetError)
    assert not pyplot.get_fignums(), "a failed figure stays in memory"


@pytest.mark.parametrize("smooth", ["-0.1", "1", "nan"])
def test_smoothing_out_of_range(tmp_path, smooth):
    assert "--smooth must be in [0, 1)" in str(refused(write_run(tmp_path / "run", 5), "--smooth", smooth))


# --- the running mean ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 50, 200])
def test_the_running_mean_is_the_mean_of_its_window(width):
    values = np.random.default_rng(0).lognormal(size=50)
    expected = [values[max(0, i - width // 2) : min(50, i + width - width // 2)].mean() for i in range(50)]
    np.testing.assert_allclose(running_mean(values, width), expected, rtol=1e-12)


def test_the_running_mean_of_a_constant_and_of_a_line():
    np.testing.assert_allclose(running_mean(np.full(20, 3.0), 7), 3.0)
    line = np.arange(30.0)
    np.testing.assert_allclose(running_mean(line, 5)[2:-2], line[2:-2])


def test_the_running_mean_survives_a_spike():
    values = np.ones(500)
    values[100] = 1e9  # a run that nearly diverged
    mean = running_mean(values, 9)
    np.testing.assert_allclose(mean[110:], 1.0, rtol=1e-6)
    assert mean[100] == pytest.approx(1e9 / 9)
