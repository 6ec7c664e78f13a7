"""`bash run.sh check`: a table, settings to use, and going on after what fails."""

import json

import pytest
import torch
from report_helpers import refused

from eval import check
from eval.benchmark.steps import Setting
from eval.checking import checks, derivatives, machine, runs, scaling, speed
from eval.checking.report import FAILED, NOT_RUN, OK, Finding, Report
from meanflow.errors import AssetError, UserError
from meanflow.training.config import load_config

CPU = torch.device("cpu")


@pytest.fixture
def setting(recipe):
    return Setting(recipe(model__multipliers=[1, 1], model__dropout=0.1), (), 4, "dual", "fp32", None)


@pytest.fixture
def short(monkeypatch):
    """Without the runs of the demo, which take half a minute."""
    monkeypatch.setattr(runs, "killed_and_resumed", lambda folder, device: iter([Finding("killed", OK, "")]))
    monkeypatch.setattr(runs, "two_processes", lambda folder, device: iter([Finding("two", OK, "")]))


def test_the_command_ends_with_settings_and_a_file(setting, short, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("eval.benchmark.clock.cpu_has_bf16", lambda: True)
    monkeypatch.setattr(checks, "cpu_has_bf16", lambda: False)
    out = tmp_path / "check.json"
    assert check.main([str(setting.recipe), "--out", str(out), "--batch", "2", "--device", "cpu"]) == 0
    shown, tree = capsys.readouterr().out, json.loads(out.read_text())
    assert "for this machine: --set train.precision=fp32 train.activation_checkpointing=" in shown
    assert "6 steps of 8 images take about" in shown and "no GPU" in shown
    timed = tree["findings"]["steps of tiny, 2 images at once"]
    assert len(timed) == 4 and all(finding["outcome"] == OK for finding in timed)  # null, cheap, blocks, matmul
    best = tree["numbers"]["steps"][-1]
    assert best["images_per_s"] == max(step["images_per_s"] for step in tree["numbers"]["steps"])
    assert "exists; --overwrite" in refused(AssetError, check.main, setting.recipe, "--out", out)
    assert "there is no recipe or recipe file 'tinny'" in refused(UserError, check.main, "tinny")


def test_a_part_that_fails_is_reported_and_the_rest_goes_on(setting, short, tmp_path, capsys, monkeypatch):
    def breaks(found):
        raise OSError("no driver")
        yield

    monkeypatch.setattr(machine, "lines", breaks)
    monkeypatch.setattr(checks, "cpu_has_bf16", lambda: False)
    out = tmp_path / "check.json"
    arguments = [str(setting.recipe), "--out", str(out), "--batch", "2", "--device", "cpu", "--seconds", "1"]
    monkeypatch.setattr(Report, "over", property(lambda self: True))
    assert check.main(arguments) == 1
    shown = capsys.readouterr().out
    assert "FAILED  OSError: no driver" in shown and "no step could be timed" in shown and "not run  the 1 s" in shown
    assert "no driver" in json.loads(out.read_text())["tracebacks"][0]


@pytest.mark.parametrize("wrong", [1.0, 1.5])
def test_a_wrong_derivative_is_seen(setting, monkeypatch, wrong):
    take = derivatives.take_jvp

    def spoilt(method):
        def jvp(*args, **kwargs):
            value, dudt = take(method)(*args, **kwargs)
            return value, dudt * (wrong if method == "dual" else 1)

        return jvp

    monkeypatch.setattr(derivatives, "take_jvp", spoilt)
    (finding,) = derivatives.agreement(setting, [("fp32", None)], CPU)
    assert finding.outcome == (OK if wrong == 1 else FAILED) and "du/dt" in finding.figure


def test_a_compiler_that_fails_leaves_the_other_findings(setting, monkeypatch):
    def fails(*args):
        raise RuntimeError("no compiler\nin sight")

    monkeypatch.setattr(derivatives, "compiled_jvp", fails)
    eager, compiled = derivatives.agreement(setting, [("fp32", None), ("fp32", "default")], CPU)
    assert eager.outcome == OK and (compiled.outcome, compiled.figure) == (FAILED, "RuntimeError: no compiler")


def test_each_setting_is_tried_with_the_best_of_those_before(setting, monkeypatch):
    rates = {"fp32": 10, "bf16": 20, "null": 0, "default": 5, "cheap": 0.1, "blocks": -5}
    tried = []

    def measured(setting, settings, device, known):
        tried.append(tuple(settings.values()))
        if "blocks" in settings.values():
            raise torch.OutOfMemoryError("CUDA out of memory")
        return speed.Speed(settings, sum(rates[value] for value in settings.values()), 1.0, 0.5)

    monkeypatch.setattr(speed, "_measure", measured)
    found, report = [], Report(60)
    values = {"train.precision": ("fp32", "bf16"), "train.activation_checkpointing": ("null", "cheap", "blocks")}
    values["train.compile"] = ("null", "default")
    lines = list(speed.search(setting, values, CPU, report, found))
    assert [line.outcome for line in lines] == [OK, OK, OK, FAILED, OK]
    assert tried == [
        ("fp32", "null", "null"),
        ("bf16", "null", "null"),
        ("bf16", "cheap", "null"),
        ("bf16", "blocks", "null"),
        ("bf16", "null", "default"),
    ]
    assert tuple(found[-1].settings.values()) == ("bf16", "null", "default")
    advice = checks.advice(load_config(setting.recipe), found, devices=2)
    assert (
        "train.precision=bf16 train.activation_checkpointing=null train.compile=default" in advice
        and "2 devices" in advice
    )


def test_two_devices_are_compared(setting, tmp_path, monkeypatch):
    """Each rate is measured by a program of its own, here in this process."""
    file = tmp_path / "rate.json"
    fields = {**vars(setting), "recipe": str(setting.recipe), "overrides": list(setting.overrides)}
    scaling.main(json.dumps(fields), "cpu", str(file))
    assert json.loads(file.read_text()) > 0
    best = speed.Speed({"train.precision": "fp32", "train.compile": "null"}, 1.0, 1.0, 0.5)
    for two, outcome in ((19.0, OK), (11.0, FAILED)):
        monkeypatch.setattr(scaling, "rate", lambda how, n, folder, device, two=two: two if n == 2 else 10.0)
        (finding,) = scaling.two_devices(setting, best, tmp_path, CPU)
        assert finding.outcome == outcome and f"{two:.3g} against 10" in finding.figure
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (finding,) = scaling.two_devices(setting, best, tmp_path, torch.device("cuda"))
    assert finding.outcome == NOT_RUN
