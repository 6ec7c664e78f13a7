"""Runs of an earlier version (tests/data/runs): they continue, and are scored, sampled and plotted, as they were then.

On the machine that made them they continue bit-equal; other CPUs sum in another order.
"""

import json
import shutil

import numpy as np
import pytest
from running import ROOT, comparable_metrics, newest

import run as job
from eval.scoring.score import score_run
from meanflow.training.config import load_config
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder, starts

RUNS = ROOT / "tests" / "data" / "runs"


@pytest.fixture(params=["unet", "dit"])
def old(request, tmp_path, monkeypatch):
    """A copy of one, its expected numbers, and the overrides that this machine needs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    run = RunFolder(shutil.copytree(RUNS / request.param, tmp_path / request.param))
    here = [f"data.latents={tmp_path / 'latents'}"] if request.param == "dit" else []
    return run, json.loads((run.path / "expected.json").read_text()), here


def test_an_old_run_is_scored_and_sampled(old, alone, tmp_path):
    run, expected, here = old
    results = score_run(run, load_config(run.config_file, here), alone)
    found = {str(result["protocol"]["nfe"]): result["metrics"]["fd-pixels"] for result in results}
    assert found == pytest.approx(expected["fd_pixels_at_4"], rel=1e-3)
    out = tmp_path / "samples.npz"
    assert job.main(["sample", *map(str, (run.path, "--n", 20, "--steps", 2, "--out", out, "--device", "cpu"))]) == 0
    assert np.load(out)["arr_0"].mean() == pytest.approx(expected["samples_mean_at_4"], abs=0.1)


def test_an_old_run_continues(old):
    run, expected, here = old
    assert job.main(["resume", str(run.path), "--device", "cpu", "--set", "train.steps=8", *here]) == 0
    old_lines = read_metrics(run.path / "expected.jsonl")
    for line, old_line in zip(comparable_metrics(run.path)[4:], old_lines, strict=True):
        assert line == pytest.approx({key: old_line[key] for key in line}, rel=1e-4)
    after = newest(run.path)
    weights = sum(float(x.double().sum()) for x in after.model.values())
    averages = sum(float(x.double().abs().sum()) for average in after.ema.values() for x in average.values())
    assert weights == pytest.approx(expected["weights_sum_at_8"], rel=1e-4)
    assert averages == pytest.approx(expected["ema_abs_sum_at_8"], rel=1e-4)
    assert [start["step"] for start in starts(run)] == [0, 4]
    assert run.curves.exists() and (run.path / "samples.png").exists()
    assert "objective" in run.config_file.read_text(), "rewritten in today's layout"
