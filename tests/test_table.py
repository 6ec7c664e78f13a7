"""Tables: rows of one recipe, run once, compared by distance and agreement."""

import csv

import pytest
import yaml
from PIL import Image
from running import ROOT, guided_latent_changes, write_recipe

from eval import table as module
from eval.run import main as run_main_of_recipe
from eval.table import load_table, main, parse
from meanflow.errors import ConfigError, UserError
from meanflow.training.config import load_config

TABLES = sorted((ROOT / "recipes" / "tables").glob("*.yaml"))


@pytest.fixture
def table(tmp_path, monkeypatch):
    """`table(**changes)` writes a table of two rows on the tiny guided run."""
    monkeypatch.setattr(module, "RECIPES", tmp_path)
    write_recipe(tmp_path / "tiny.yaml", **guided_latent_changes(tmp_path / "latents"), optim__lr=0.05)
    guided = ["guidance.omega_prime=2", "guidance.omega=2"]
    tree = {
        "description": "tiny",
        "question": "Does it run?",
        "base": "tiny",
        "agreement": True,
        "rows": [{"name": "ω = 1", "folder": "one", "set": []}, {"name": "ω = 2", "folder": "two", "set": guided}],
    }

    def write(**changes):
        path = tmp_path / "table.yaml"
        path.write_text(yaml.safe_dump({**tree, **changes}), encoding="utf-8")
        return str(path)

    return write


def test_a_table_runs_its_rows_and_compares_them(table, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([table(), "--out", str(out), "--set", "train.steps=9"]) == 0
    rows = list(csv.reader((out / "table.csv").open(encoding="utf-8")))
    assert rows[0] == ["", "1-NFE fd-pixels", "1-NFE agreement"]
    assert [row[0] for row in rows[1:]] == ["ω = 1", "ω = 2"] and rows[1][1] != rows[2][1]
    text = (out / "table.md").read_text(encoding="utf-8")
    assert "Does it run?" in text and "| ω = 2 |" in text and "128 samples" in text
    picture = Image.open(out / "samples.png")
    assert picture.width > 1.5 * picture.height
    assert load_config(out / "two" / "config.yaml").guidance.omega == 2
    assert "ω = 1" in capsys.readouterr().out

    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert main([table(), "--out", str(out), "--set", "train.steps=9"]) == 0  # all is done
    assert before == {path: path.stat().st_mtime_ns for path in out.rglob("*.pt")}
    assert list(csv.reader((out / "table.csv").open(encoding="utf-8"))) == rows


def test_a_row_is_the_run_that_its_recipe_makes_alone(table, tmp_path):
    arguments = ["--set", "train.steps=9"]
    assert main([table(), "--rows", "two", "--out", str(tmp_path / "out"), *arguments]) == 0
    guided = ["--set", "guidance.omega_prime=2", "--set", "guidance.omega=2"]
    assert run_main_of_recipe([str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "alone"), *guided, *arguments]) == 0
    one, two = (next((tmp_path / name / "eval").glob("step*.json")).read_text() for name in ("out/two", "alone"))
    assert one.split('"metrics"')[1].split("}")[0] == two.split('"metrics"')[1].split("}")[0]
    assert not (tmp_path / "out" / "one").exists()


@pytest.mark.parametrize(
    ("changes", "error", "word"),
    [
        ({"base": "nothing"}, ConfigError, "nothing"),
        ({"rows": []}, ConfigError, "rows"),
        ({"rows": [{"name": name, "folder": "x", "set": []} for name in "ab"]}, ConfigError, "rows"),
        ({"rows": [{"name": "a", "folder": "../x", "set": []}]}, ConfigError, "folder"),
        ({"rows": [{"name": "a", "folder": "x", "set": ["optim.rate=1"]}]}, ConfigError, r"optim\.rate"),
        ({"rows": [{"name": "a", "folder": "x", "set": ["guidance.omega=2"]}]}, ConfigError, "omega"),
    ],
)
def test_what_cannot_be_run_is_named(table, changes, error, word):
    with pytest.raises(error, match=word):
        load_table(parse([table(**changes)]))


def test_rows_that_are_not_there_are_named(table):
    with pytest.raises(UserError, match="three"):
        load_table(parse([table(), "--rows", "1,three"]))


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_table_of_the_house_resolves(path):
    assert load_table(parse([str(path)]))[1]
