"""Tables: rows of one recipe, run once, compared by distance and classifier accuracy, beside the paper's figures."""

import csv
import json
import math
import shutil
from dataclasses import replace

import pytest
from PIL import Image
from report_helpers import refused
from running import ROOT, guided_latent_changes, tiny_config, write_recipe
from torch.utils.flop_counter import FlopCounterMode

import run
from eval import table as table_command
from eval.report import main as report
from eval.tables import SCALES
from eval.tables import config as table_config
from eval.tables.config import PaperConfig, RowConfig, Table, load_table
from eval.tables.overhead import is_one
from eval.tables.plan import passes
from eval.tables.results import Line, Mean, Result, against_paper, process_seconds
from meanflow.errors import AssetError, ConfigError, UserError, run_main
from meanflow.training.batches import random_batch
from meanflow.training.config import load_config
from meanflow.training.costs import forward_multiply_adds
from meanflow.training.metrics import StepSums
from meanflow.training.processes import GradientSum
from meanflow.training.state import fresh_state
from meanflow.training.step import accumulate, make_loss

TABLES = sorted(path for path in (ROOT / "recipes" / "tables").glob("*.yaml") if not is_one(path))
GUIDED = ["guidance.omega_prime=2"]
SCALE = {"base": "tiny", "set": ["train.steps=9"], "classifier": True, "note": "Is tiny."}
TREE = {
    "description": "tiny table",
    "question": "Does it run?",
    "parameter": "ω",
    "paper": {"metric": "FID-50K", "nfe": [1]},
    "cpu": SCALE,
    "rows": [
        {"name": "1", "folder": "one", "paper": [61.06]},
        {"name": "2", "folder": "two", "paper": [20.15], "set": GUIDED},
    ],
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table(**changes)` writes a table of two rows on the tiny guided run; `cpu__…` changes its scale."""
    monkeypatch.setattr(table_config, "RECIPES", tmp_path)
    latents = guided_latent_changes(tmp_path / "latents")
    write_recipe(tmp_path / "tiny.yaml", **latents, optim__lr=0.05, sample__uint8="floor")

    def write(name="table", **changes):
        scale = {key.removeprefix("cpu__"): value for key, value in changes.items() if key.startswith("cpu__")}
        plain = {key: value for key, value in changes.items() if not key.startswith("cpu__")}
        path = tmp_path / f"{name}.yaml"
        path.write_text(json.dumps({**TREE, "cpu": {**SCALE, **scale}, **plain}), encoding="utf-8")
        return path

    return write


def sheet(folder):
    return list(csv.DictReader((folder / "table.csv").open(encoding="utf-8")))


def run_table(path, *arguments) -> int:
    """The exit code of `bash run.sh table` with these arguments."""
    return run_main(run.main, ["table", *map(str, (path, *arguments))])


# --- run -------------------------------------------------------------------------------------------------------------


def test_a_table_runs_its_rows_and_compares_them(table, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [table(cpu__seeds=[0, 1]), "--out", out]
    assert run_table(*arguments) == 0
    one, two = sheet(out / "table")
    assert one["ω"] == "1" and one["1-NFE fd-pixels"] != two["1-NFE fd-pixels"] and one["seeds"] == "2"
    assert one["paper: 1-NFE FID-50K"] == "61.06" and 0 <= float(two["1-NFE classifier accuracy"]) <= 1
    scores = [json.loads(next((out / f"one-seed{k}" / "eval").glob("*.json")).read_text()) for k in (0, 1)]
    values = [score["metrics"]["fd-pixels"] for score in scores]
    assert math.isclose(float(one["1-NFE fd-pixels"]), sum(values) / 2)
    assert math.isclose(float(one["1-NFE fd-pixels sd"]), abs(values[0] - values[1]) / math.sqrt(2))
    assert scores[0]["protocol"]["samples"]["quantise"] == "floor", "the recipe's sample.uint8"
    text = (out / "table" / "table.md").read_text(encoding="utf-8")
    for said in ("Does it run?", "| 2 |", "128 samples", "seeds 0, 1", "20.15", "Is tiny.", "process-hours", "not FID"):
        assert said in text
    tree = json.loads((out / "table" / "table.json").read_text(encoding="utf-8"))
    assert tree["scale"] == "cpu" and all((out / name / "config.yaml").exists() for name in tree["runs"])
    assert Image.open(out / "table" / "samples.png").width > 1.5 * Image.open(out / "table" / "samples.png").height
    assert Image.open(out / "table" / "figure.png").width > 600
    assert load_config(out / "two-seed1" / "config.yaml").guidance.omega == 2
    assert "paper: 1-NFE FID-50K" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert run_table(*arguments) == 0  # all is done
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert sheet(out / "table") == [one, two]

    assert report([str(out / "table"), "--no-samples"]) == 0
    page = (out / "table" / "report.html").read_text(encoding="utf-8")
    assert "Does it run?" in page and "two-seed1" in page


def test_a_folder_is_one_run_for_all_tables_and_the_one_that_its_recipe_makes_alone(table, tmp_path):
    out = tmp_path / "out"
    assert run_table(table(), "--rows", "two", "--seeds", 5, "--out", out) == 0
    before = (out / "two-seed5" / "starts.jsonl").read_text()
    other = table("other", rows=[{"name": "same", "folder": "two", "paper": [61.06], "set": GUIDED}])
    assert run_table(other, "--seeds", 5, "--out", out) == 0
    assert (out / "two-seed5" / "starts.jsonl").read_text() == before and not (out / "one-seed5").exists()
    assert sheet(out / "other")[0]["1-NFE fd-pixels"] == sheet(out / "table")[0]["1-NFE fd-pixels"]

    changes = [*SCALE["set"], *GUIDED, "seed=5"]
    assert run.main([str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "alone"), "--set", *changes]) == 0
    scores = [next((folder / "eval").glob("step*.json")) for folder in (out / "two-seed5", tmp_path / "alone")]
    one, two = (json.loads(path.read_text())["metrics"] for path in scores)
    assert one == two


def test_milestones_are_scored_along_one_run(table, tmp_path):
    sets = ["train.steps=5", "checkpoint.every=2", "checkpoint.milestone_every=2"]
    path = table(milestones=True, cpu__set=sets, cpu__classifier=False)
    assert run_table(path, "--rows", "one", "--out", tmp_path / "out") == 0
    (row,) = sheet(tmp_path / "out" / "table")
    assert "at 2 steps" not in (tmp_path / "out" / "table" / "table.md").read_text(encoding="utf-8")
    assert len({row[f"1-NFE fd-pixels at {step} steps"] for step in (2, 4, 5)}) == 3
    assert Image.open(tmp_path / "out" / "table" / "figure.png").width > 600


def test_damaged_or_outdated_results_are_made_again(table, tmp_path):
    """And no older checkpoint is taken in place of the last."""
    out = tmp_path / "out"
    arguments = [table(), "--rows", "one", "--out", out]
    assert run_table(*arguments) == 0
    before = sheet(out / "table")
    last = out / "one-seed0" / "checkpoints" / "00000009.pt"
    last.write_bytes(last.read_bytes()[:-100])
    shutil.rmtree(out / "one-seed0" / "eval")
    (file,) = (out / "one-seed0").glob("agreement*.json")
    found = json.loads(file.read_text())
    file.write_text(json.dumps({**found, "agreement": 0.123, "samples": 7}))
    assert run_table(*arguments) == 0
    assert json.loads(file.read_text()) == found
    assert [{**row, "hours": ""} for row in sheet(out / "table")] == [{**row, "hours": ""} for row in before]
    file.write_text(json.dumps({**found, "surprise": 1}))
    assert "agreement" in refused(AssetError, run.main, "table", *arguments)


def test_a_row_that_diverges_does_not_stop_the_others(table, tmp_path, capsys):
    bad = {"name": "bad", "folder": "bad", "paper": [99.0], "set": ["optim.lr=1e38"]}
    path = table(rows=[bad, TREE["rows"][0]], cpu__classifier=False)
    assert run_table(path, "--out", tmp_path / "out") == 4
    (row,) = sheet(tmp_path / "out" / "table")
    text = (tmp_path / "out" / "table" / "table.md").read_text(encoding="utf-8")
    assert row["ω"] == "1" and "Not finite, and so without figures: bad-seed0." in text
    assert "not finite" in capsys.readouterr().out


def test_a_dry_run_says_what_each_row_costs(table, tmp_path, capsys):
    assert run_table(table(), "--dry-run", "--out", tmp_path / "out") == 0
    out = capsys.readouterr().out
    assert "two-seed0" in out and GUIDED[0] in out and "2 runs" in out and "GPU-hours" in out
    assert not (tmp_path / "out").exists()


# --- figures ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"objective__times__ratio": 0.0},
        {"objective__times__ratio": 1.0},
        {**guided_latent_changes(), "guidance__kappa": 0.5, "guidance__omega_prime": 2.0},
    ],
)
def test_the_counted_cost_of_a_step_is_about_right(changes, alone):
    tree = {**guided_latent_changes(), "guidance": None, **changes}
    tree["model"] = {**tree["model"], "patch": 1, "width": 96, "depth": 4}  # blocks outweigh what has no gradient
    config = tiny_config(**tree)
    state = fresh_state(config, alone.device)
    loss, gradients = make_loss(state.network, config, alone.device), GradientSum(state.network, alone)
    with FlopCounterMode(display=False) as counter:
        accumulate(loss, [random_batch(config, 64, alone.device)], 1, 64, gradients, StepSums())
    estimate = 2 * forward_multiply_adds(config) * passes(config) * 64
    assert estimate == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(
    ("figures", "best", "same", "against"),
    [
        ([(1.0, 0.01), (2.0, 0.01), (3.0, 0.01)], "1", 3, "0 against it"),
        (
            [(5.0, 0.01), (2.0, 0.01), (3.0, 0.01)],
            "2",
            1,
            "2 against it: 2 is better than 1; 3 is better than 1 (Welch",
        ),
        ([(2.01, 0.5), (2.0, 0.5)], "2 (not significantly)", 0, "0 against it"),
    ],
)
def test_the_order_is_compared_with_the_papers(figures, best, same, against):
    """Figures are (mean, deviation) of three seeds, and the paper's values 1, 2, 3, …"""
    rows = [RowConfig(str(k), str(k), (float(k),)) for k in range(1, 1 + len(figures))]
    lines = []
    for row, (mean, deviation) in zip(rows, figures, strict=True):
        values = (mean - deviation, mean, mean + deviation)
        lines.append(Line(row, tuple(Result({"1-NFE fd-pixels": v}, None, (), 1.0, "a chip") for v in values)))
    config = load_table(next(path for path in TABLES if path.stem == "table1a")).config
    (found,) = against_paper(Table("t", replace(config, paper=PaperConfig("FID", (1,))), "cpu", (), ()), lines)
    pairs = len(rows) * (len(rows) - 1) // 2
    said = f"here it is {best}. Of {pairs} pairs of rows {same} differ as in the paper and {against}"
    assert "1-NFE: the paper's best row is 1, " + said in found


def test_hours_are_counted_by_the_processes_of_each_start():
    begun = [{"step": 0, "processes": 4}, {"step": 2, "processes": 1}, {"step": 4, "processes": 8}]
    lines = ({"step": k, "seconds": 10.0 * k} for k in (1, 2, 3, 4))
    assert process_seconds(begun, lines) == 20 * 4 + 20 * 1  # the last start had nothing left to do


def test_the_spread_is_the_sample_standard_deviation():
    assert Mean.of([1.0, 2.0, 3.0]) == Mean(2.0, 1.0, 3) and Mean.of([1.0]).deviation is None
    assert Mean.of([1.0, 2.0, 3.0]).text() == "2.000 ± 1.000" and Mean.of([0.5]).text("{:.1%}") == "50.0%"


# --- what a table says -----------------------------------------------------------------------------------------------

ROW = {"name": "a", "folder": "x", "paper": [None]}


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"cpu__base": "nothing"}, "nothing"),
        ({"rows": []}, "rows"),
        ({"rows": [ROW, {**ROW}]}, "rows"),
        ({"rows": [{**ROW, "folder": "../x"}]}, "folder"),
        ({"rows": [{**ROW, "paper": []}]}, "paper"),
        ({"rows": [{**ROW, "set": ["optim.rate=1"]}]}, r"optim\.rate"),
        ({"rows": [{**ROW, "set": ["guidance.omega=2"]}]}, "omega"),
        ({"cpu__each": [[]]}, r"each"),
        ({"cpu__seeds": []}, "seeds"),
        ({"cpu__seeds": [-1]}, "seeds"),
        ({"cpu": None}, "full, gpu, cpu"),
        ({"milestones": True}, "milestone_every"),
        ({"cpu__set": ["seed=3"]}, "seed is set by seeds"),
    ],
)
def test_what_cannot_be_run_is_named(table, changes, word):
    with pytest.raises(ConfigError, match=word):
        load_table(table(**changes))


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--rows", "1,three"], "three"),
        (["--scale", "full"], "full"),
        (["--seeds", "0,-1"], "--seeds"),
        (["--seeds", "1,01"], "--seeds"),
        (["--tflops", "-1"], "--tflops"),
        (["nothing.yaml"], "nothing.yaml: no such file"),
    ],
)
def test_missing_rows_and_scales_are_named(table, arguments, word):
    assert word in refused(UserError, run.main, "table", table(), *arguments)


def test_a_row_that_is_not_trained_is_not_trained_by_scoring(table, tmp_path):
    said = refused(UserError, table_command.main, table(), "--out", tmp_path / "out")
    assert "is not trained to its end; bash run.sh table does that" in said


@pytest.mark.parametrize("scale", SCALES)
def test_every_table_resolves(scale):
    """Rows of several tables that have the same folder are the same run."""
    runs = {}
    for path in TABLES:
        if load_table(path).config.scales.get(scale):
            for one in load_table(path, scale).runs:
                other = runs.setdefault(one.folder, one.recipe)
                assert other == one.recipe, f"{path.stem}: {one.folder}"
    assert len(runs) >= 30
