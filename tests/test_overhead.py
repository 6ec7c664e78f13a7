"""The JVP's overhead as a table: a benchmark of two kinds of step, set beside the paper's seconds."""

import csv
import json

import pytest
from PIL import Image
from report_helpers import refused
from running import ROOT, guided_latent_changes, write_recipe

from eval.table import main
from eval.tables import overhead
from meanflow.errors import ConfigError, UserError, run_main
from meanflow.training import settings

SCALE = {"batch": 4, "repeats": 2}
TREE = {
    "kind": "overhead",
    "description": "tiny overhead",
    "question": "What does it cost?",
    "base": "tiny",
    "paper": {"flow_matching": 0.04, "with_jvp": 0.05, "hardware": "a chip"},
    "full": SCALE,
    "gpu": SCALE,
    "cpu": {"batch": 2, "repeats": 2},
}


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.setattr(overhead, "RECIPES", tmp_path)
    write_recipe(tmp_path / "tiny.yaml", **guided_latent_changes(), objective__times__ratio=0.5)

    def write(**changes):
        path = tmp_path / "cost.yaml"
        path.write_text(json.dumps(TREE | changes), encoding="utf-8")  # JSON is YAML, without aliases
        return path

    return write


def test_it_measures_and_quotes_the_paper(table, tmp_path, capsys):
    assert run_main(main, [str(table()), "--scale", "cpu", "--out", str(tmp_path / "out"), "--device", "cpu"]) == 0
    out = tmp_path / "out" / "cost"
    flow_matching, dual, func = csv.DictReader((out / "table.csv").open(encoding="utf-8"))
    assert [row["step"] for row in (dual, func)] == ["MeanFlow, dual numbers", "MeanFlow, torch.func.jvp"]
    assert flow_matching["of Flow Matching's"].startswith("1.00") and func["paper: s/iteration"] == ""
    assert dual["paper: s/iteration"] == "0.050" and dual["paper: of Flow Matching's"] == "1.25"
    assert float(dual["of Flow Matching's"].split()[0]) > 0
    tree = json.loads((out / "table.json").read_text(encoding="utf-8"))
    assert tree["runs"] == [] and "batch 2" in tree["notes"][0] and "a chip" in tree["notes"][1]
    assert Image.open(out / "figure.png").width > 500
    assert "What does it cost?" in capsys.readouterr().out


def test_a_dry_run_measures_nothing(table, tmp_path, capsys):
    assert main([str(table()), "--dry-run", "--out", str(tmp_path / "out")]) == 0
    assert "a benchmark" in capsys.readouterr().out and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "word"),
    [({"base": "nothing"}, "nothing"), ({"cpu": {"batch": 0, "repeats": 1}}, r"cpu\.batch"), ({"rows": []}, "rows")],
)
def test_what_cannot_be_measured_is_named(table, changes, word):
    with pytest.raises(ConfigError, match=word):
        overhead.load(table(**changes), None, [])


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--set", "train.batch=3"], "itself"),
        (["--set", "train.jvp=func"], "itself"),
        (["--rows", "1"], "no rows or seeds"),
        (["--seeds", "1"], "no rows or seeds"),
    ],
)
def test_what_it_cannot_be_asked(table, arguments, word):
    assert word in refused(UserError, main, table(), *arguments)


def test_jvp_overhead_resolves():
    path = ROOT / "recipes" / "tables" / "jvp_overhead.yaml"
    assert overhead.is_one(path) and overhead.load(path, "gpu", []).settings.batch > 1
    assert settings.read_yaml(path)["paper"]["with_jvp"] == 0.052
