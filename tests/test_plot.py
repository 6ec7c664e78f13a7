"""`run.sh plot`: what is drawn of which runs, and what it says where there is nothing to draw."""

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import pyplot
from PIL import Image
from report_helpers import refused, write_run, write_score
from running import ROOT

from eval.plot import main
from eval.reports import curves
from eval.reports.curves import panels_of, running_mean
from eval.reports.read import ema_note, read_runs
from meanflow.errors import AssetError, UserError
from meanflow.training.records import read_columns
from meanflow.training.run_folder import RunFolder

SPIKE = 500


@pytest.fixture
def figure(monkeypatch):
    """Keeps the figure open, so that what is in it can be looked at; drawing its pixels is left to other tests."""
    drawn, close = [], pyplot.close
    monkeypatch.setattr(curves.plt, "close", drawn.append)
    monkeypatch.setattr(curves.plt.Figure, "savefig", lambda figure, out, **how: Path(out).touch())
    yield lambda: drawn[-1]
    close("all")


def draw(*arguments) -> None:
    assert main([str(argument) for argument in arguments]) == 0


def panels(figure) -> dict:
    return {axis.get_title(): axis for axis in figure.axes if axis.get_title()}


def names(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


# --- values ----------------------------------------------------------------------------------------------------------


def test_a_real_run_gives_a_readable_picture(trained, tmp_path, capsys):
    run = shutil.copytree(trained.path, tmp_path / "run")
    draw(run)
    draw(run)  # its own picture is replaced
    with Image.open(run / "curves.png") as picture:
        assert picture.width >= 1200 and picture.height >= 700
        assert 0.5 < np.asarray(picture.convert("L")).mean() / 255 < 0.999, "blank or black"
    assert (run / "curves.png").stat().st_size < 300_000
    assert str(run / "curves.png") in capsys.readouterr().out
    logged = json.loads(trained.metrics_file.read_text().splitlines()[0])
    assert {panel.key for panel in panels_of(read_runs([RunFolder(run)]))} == set(logged) - {
        "step",
        "images",
        "seconds",
    }


def test_every_value_has_a_panel_and_the_objectives_come_first(tmp_path, figure):
    """Whatever its name; explained as the objective did when the run was started."""
    starts = [{"titles": {"drift": "how far it drifts", "loss": "the loss, halved"}}, {"step": 7}]
    draw(write_run(tmp_path / "run", starts=starts, drift=lambda step: -1 / step, curl=2.0))
    *own, loss, norm, rate, throughput, memory = shown = panels(figure())
    assert own == ["error, all samples", "how far it drifts", "curl"]
    assert (loss, rate, throughput, memory) == ("the loss, halved", "learning rate", "throughput", "peak memory")
    for axis in shown.values():
        pale, mean = axis.lines[1:]
        assert pale.get_alpha() < 0.5 and len(mean.get_xdata()) == 300 and mean.get_xdata()[-1] == 300
    assert shown[norm].get_yscale() == "log" and shown[rate].get_yscale() == "linear"
    assert shown["how far it drifts"].get_ylim()[0] < 0 and shown[memory].get_ylabel() == "MB"
    assert names(figure()) == ["run"]


def test_runs_are_overlaid_in_a_picture_of_their_own(tmp_path, figure):
    """A value that one run lacks is drawn of the other: Flow Matching has no r < t."""
    one, two = write_run(tmp_path / "one", error_r_lt_t=None), write_run(tmp_path / "two", 200, error_r_lt_t=3.0)
    draw(one)
    assert "error at r < t" not in panels(figure())
    (one / "curves.png").write_text("kept")
    draw(one, two)
    assert names(figure()) == ["one", "two"]
    shown = panels(figure())
    assert len({line.get_color() for line in shown["training loss"].lines}) == 2
    assert len(shown["training loss"].lines) == 6 and len(shown["error at r < t"].lines) == 4
    assert (one / "curves.png").read_text() == "kept" and (one / "curves-one-two.png").exists()


def test_runs_of_different_scale_and_length_share_an_axis_that_shows_both(tmp_path, figure):
    draw(write_run(tmp_path / "small"), write_run(tmp_path / "large", 3001, images_per_s=9000.0))
    shown = panels(figure())
    assert shown["throughput"].get_yscale() == "log" and shown["peak memory"].get_yscale() == "linear"
    assert shown["throughput"].get_xscale() == "log"


def test_every_run_has_its_name(tmp_path, figure):
    """Also of the same folder name, and with more runs than colours."""
    for folders in (["a/run", "b/run"], [str(k) for k in range(8)]):
        draw(*[write_run(tmp_path / folder, 30) for folder in folders])
        assert names(figure()) == folders


@pytest.mark.parametrize(
    ("x", "label", "end"), [("images", "images seen", 2400), ("seconds", "seconds of training", 30)]
)
def test_other_horizontal_axes(tmp_path, figure, x, label, end):
    run = write_run(tmp_path / "run", starts=[{"step": 150, "changed": {"optim.lr": [1, 2]}}])
    for step in (150, 300):
        write_score(run, 3.0, step=step)
    draw(run, "--x", x)
    shown = panels(figure())
    assert {axis.get_xlabel() for axis in shown.values()} == {label}
    assert shown["learning rate"].lines[2].get_xdata()[-1] == pytest.approx(end)
    assert shown["learning rate"].lines[3].get_xdata()[0] == pytest.approx(end / 2), "the mark of the change"
    assert list(shown["fd-pixels"].lines[0].get_xdata()) == pytest.approx([end / 2, end])


def test_changed_settings_are_marked(tmp_path, figure):
    changes = [
        {"step": 0, "changed": {"seed": [0, 1]}},
        {"step": 100, "changed": {"optim.lr": [1, 2], "optim.clip": [None, 1]}},
    ]
    draw(write_run(tmp_path / "run", starts=[*changes, {"changed": {"of.older.versions": [1, 2]}}]))
    for axis in panels(figure()).values():
        assert texts(axis) == ["optim.lr, optim.clip"] and axis.lines[3].get_xdata()[0] == 100


def test_a_spike_is_seen_and_does_not_flatten_a_linear_panel(tmp_path, figure):
    draw(write_run(tmp_path / "run", 9000, images_per_s=lambda step: 1e6 if step == SPIKE else 80.0 + step % 7))
    axis = panels(figure())["throughput"]
    pale = axis.lines[1]
    assert axis.get_ylim()[1] < 200 and max(pale.get_ydata()) == 1e6 and len(pale.get_xdata()) < 5000


def test_values_that_are_not_finite_or_not_there_are_gaps(tmp_path, figure):
    run = write_run(tmp_path / "run", 99, late=5.0, error=lambda step: math.nan if step % 3 == 0 else 5.0)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    early = [json.dumps({k: v for k, v in json.loads(line).items() if k != "late"}) for line in lines[:50]]
    (run / "metrics.jsonl").write_text("\n".join([*early, "{damaged", *lines[50:], '{"step": 100, "los']))
    draw(run)
    for name, count in (("error, all samples", 66), ("late", 49), ("learning rate", 99)):
        mean = panels(figure())[name].lines[-1]
        assert len(mean.get_ydata()) == count and (name == "learning rate" or np.allclose(mean.get_ydata(), 5))


@pytest.mark.parametrize(("steps", "smooth"), [(1, 0.02), (2, 0.02), (19, 0.02), (300, 0)])
def test_short_runs_and_unsmoothed_ones_show_their_points(tmp_path, figure, steps, smooth):
    draw(write_run(tmp_path / "run", steps), "--smooth", smooth)
    (_, line) = panels(figure())["training loss"].lines
    assert len(line.get_xdata()) == steps and (line.get_marker() == "o") == (steps < 20)


def test_a_long_file_is_thinned_and_its_curve_stays_the_same(tmp_path):
    """To five standard errors of the mean of those steps that are left."""
    run = write_run(tmp_path / "run", 12_345)
    every, thin = read_columns(run / "metrics.jsonl"), read_columns(run / "metrics.jsonl", most=2000)
    assert every["step"].tolist() == list(range(1, 12_346)) and thin["step"][-1] == 12_345
    assert np.unique(np.diff(thin["step"])).tolist() == [7] and len(thin["step"]) <= 2000
    where = thin["step"].astype(int) - 1
    assert all(np.array_equal(column, every[name][where]) for name, column in thin.items())
    noise = {name: columns["error"] * columns["step"] for name, columns in (("all", every), ("thin", thin))}
    smooth = {name: running_mean(values, round(0.02 * len(values))) for name, values in noise.items()}
    error = noise["all"].std() / math.sqrt(0.02 * len(where) / 2)  # windows are halves at the ends
    assert np.abs(smooth["thin"] - smooth["all"][where]).max() < 5 * error


def test_plots_and_reports_do_not_import_pytorch(tmp_path):
    """It takes longer, and more memory, than drawing a million steps."""
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("train: {steps: 300}")
    code = (
        "import sys; from eval import plot, report; "
        f"code = plot.main(['{run}']) or report.main(['{run}', '--no-samples']); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


# --- scores ----------------------------------------------------------------------------------------------------------


def test_scores_along_a_run_are_drawn_where_evaluated(tmp_path, figure):
    run = write_run(tmp_path / "run")
    for step, value in ((200, 2.0), (100, 4.0)):
        write_score(run, value, step=step)
    write_score(run, 1.5, nfe=2, step=200)
    write_score(run, 99.0, nfe=2, step=300, status="incomplete")
    draw(run)
    axis = panels(figure())["fd-pixels"]
    one, two = axis.lines
    assert list(one.get_xdata()) == [100, 200] and list(one.get_ydata()) == [4, 2]
    assert list(two.get_xdata()) == [200] and list(two.get_ydata()) == [1.5]
    assert [text.get_text() for text in axis.get_legend().get_texts()] == [
        f"{nfe}-NFE, EMA 0.9, N 1,000" for nfe in (1, 2)
    ]


def test_a_single_score_is_text_and_none_is_lost(tmp_path, figure):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    for nfe in (1, 2, 4):
        for ema in ("0.9", "0.99", "0.999", "weights"):
            write_score(one, 1.0 + nfe, nfe, ema=ema)
            write_score(two, 2.0 + nfe, nfe, ema=ema)
    draw(one, two)
    assert "fd-pixels" not in panels(figure())
    lines = [text for axis in figure().axes for text in texts(axis)]
    assert len(lines) == 24 and "fd-pixels: 3 (two, 1-NFE, EMA 0.9, N 1,000, step 6)" in lines


def test_a_standard_deviation_is_no_panel(tmp_path, figure):
    run = write_run(tmp_path / "run")
    for step in (100, 200):
        write_score(run, 0, step=step, metrics={"kid_mean-pixels": 0.4, "kid_std-pixels": 0.1, "precision-pixels": 0.5})
    write_score(run, 0, metrics={"isc_mean": 3.0, "isc_std": 0.25})
    draw(run)
    shown = panels(figure())
    assert not any("std" in title for title in shown) and "precision-pixels" in shown
    ((low, high),) = [bar.get_segments()[0][:, 1] for bar in shown["kid_mean-pixels"].collections]
    assert (low, high) == pytest.approx((0.3, 0.5))
    assert texts(shown["scores"]) == ["isc_mean: 3 ± 0.25 (1-NFE, EMA 0.9, N 1,000, step 6)"]


def test_distances_to_other_images_have_another_axis(tmp_path, figure):
    one, two = (write_run(tmp_path / name) for name in ("one", "two"))
    for step in (100, 300):
        write_score(one, 3.0, step=step)
        write_score(two, 900.0, step=step, reference="flowers")
    draw(one, two)
    assert {"fd-pixels against digits-train", "fd-pixels against flowers"} <= set(panels(figure()))


@pytest.mark.parametrize(
    ("decay", "step", "says"),
    [(0.999, 60, "94%"), ("0.9", 6, "53%"), (0.99995, 800_000, None), ("weights", 1, None), (0.0, 1, None)],
)
def test_an_average_dominated_by_its_start_is_noted(tmp_path, figure, decay, step, says):
    run = write_run(tmp_path / "run")
    write_score(run, 3.0, step=step, ema=str(decay))
    draw(run)
    note = ema_note(decay, step)
    assert (note is None) == (says is None) and (note is None or (says in note and f"after {step}" in note))
    assert (says or "pale: range of the steps") in figure().legends[0].get_title().get_text()


# --- what cannot be drawn or written ---------------------------------------------------------------------------------


def test_a_folder_without_metrics(tmp_path):
    run = write_run(tmp_path / "run", 5)
    for name, text in (("empty", None), ("blank", ""), ("not there", None)):
        if name != "not there":
            (tmp_path / name).mkdir()
        if text is not None:
            (tmp_path / name / "metrics.jsonl").write_text(text)
        assert refused(AssetError, main, run, tmp_path / name).startswith(f"{tmp_path / name}: has no metrics.jsonl")
    assert not list(run.glob("*.png"))


@pytest.mark.parametrize(
    ("file", "text"),
    [
        *(("metrics.jsonl", f'{{"step": 1, {more}}}\n') for more in ('"loss": "high"', '"loss": [1]', '"loss": 1')),
        *(
            ("eval/notes.json", text)
            for text in ("{", "[1]", "3", '{"status": "complete"}', '{"subject": {"step": 1}}')
        ),
    ],
)
def test_files_of_something_else_are_named(tmp_path, file, text):
    run = write_run(tmp_path / "run", 5)
    (run / "eval").mkdir()
    (run / file).write_text(text)
    assert str(run / file) in refused(AssetError, main, run, "--x", "images")


def test_outs_that_cannot_be_written_or_are_kept(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", 5)
    (tmp_path / "file").write_text("mine")
    for out in (
        tmp_path / "file" / "curves.png",
        tmp_path / "curves.xyz",
        tmp_path,
        "/proc/x",
        "/dev/null",
        tmp_path / "file",
    ):
        assert str(out) in refused(AssetError, main, run, "--out", out)
    assert (tmp_path / "file").read_text() == "mine"
    assert not pyplot.get_fignums(), "a failed figure stays in memory"
    (tmp_path / "curves.pdf").write_text("mine")
    monkeypatch.setenv("HOME", str(tmp_path))
    draw("~/run", "--out", "~/curves.pdf", "--overwrite")
    assert (tmp_path / "curves.pdf").read_bytes().startswith(b"%PDF")


@pytest.mark.parametrize("smooth", ["-0.1", "1", "nan"])
def test_smoothing_out_of_range(tmp_path, smooth):
    assert "--smooth must be in [0, 1)" in refused(UserError, main, tmp_path, "--smooth", smooth)


# --- the running mean ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1, 2, 3, 6, 7, 50, 200])
def test_the_running_mean_is_the_mean_of_its_window(width):
    values = np.random.default_rng(0).lognormal(size=50)
    expected = [values[max(0, i - width // 2) : min(50, i + width - width // 2)].mean() for i in range(50)]
    np.testing.assert_allclose(running_mean(values, width), expected, rtol=1e-12)


def test_the_running_mean_forgets_a_spike():
    values = np.ones(500)
    values[100] = 1e9  # a run that nearly diverged
    np.testing.assert_allclose(running_mean(values, 9)[[100, 110, 499]], [1e9 / 9, 1, 1], rtol=1e-6)
