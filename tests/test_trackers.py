"""TensorBoard and Weights & Biases: what reaches them, over interruptions too. Stand-ins take the packages' places."""

import importlib.machinery
import importlib.util
import json
import sys
from types import ModuleType

import numpy as np
import pytest
import torch
from running import newest, tiny_config, train_run

import run as job
from eval.scoring.score import ScoreDuring
from meanflow.errors import ConfigError
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder
from meanflow.training.settings import to_tree
from meanflow.training.setup import set_up
from meanflow.training.trackers import open_trackers

SCORES = {f"eval/fd-pixels-nfe1-ema0.9-n{n}" for n in (64, 128)}  # on the way and at the end
HOW = {"train__steps": 6, "eval__every": 3, "eval__samples": 128, "sample__count": 9}


class StandIn(ModuleType):
    """The part of wandb that is used. `starts`: arguments of each run; `rows`: what was logged, with id and step."""

    class Error(Exception):
        pass

    def __init__(self):
        super().__init__("wandb")
        self.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
        self.starts, self.rows, self.open = [], [], 0

    @staticmethod
    def Image(picture: np.ndarray) -> np.ndarray:
        assert picture.dtype == np.uint8
        return picture

    def init(self, **how) -> "StandInRun":
        self.starts.append(how)
        self.open += 1
        return StandInRun(self, how["id"])


class StandInRun:
    def __init__(self, wandb: StandIn, name: str):
        self.wandb, self.name = wandb, name
        self.step = max((row["step"] for row in wandb.rows if row["id"] == name), default=-1) + 1

    def log(self, values, step) -> None:
        assert step >= self.step, "wandb would warn and drop it"
        self.step = step
        self.wandb.rows.append({"id": self.name, "step": step, **values})

    def finish(self) -> None:
        self.wandb.open -= 1


@pytest.fixture
def wandb(monkeypatch) -> StandIn:
    monkeypatch.setitem(sys.modules, "wandb", StandIn())
    return sys.modules["wandb"]


def run_job(out, alone, **changes) -> RunFolder:
    assert job.job(tiny_config(**{**HOW, **changes}), out, alone) == 0
    return RunFolder(out)


def test_curves_scores_samples_and_settings(tmp_path, alone, wandb):
    run = run_job(tmp_path / "run", alone, logging__wandb=True)
    (start,) = wandb.starts
    assert wandb.open == 0 and start["config"] == to_tree(run.config()) and start["name"] == "run"
    assert start["project"] == "meanflow" and start["dir"] == str(run.path) and start["resume"] == "allow"
    curves = {row["step"]: row["loss"] for row in wandb.rows if "loss" in row}
    assert curves == {line["step"]: line["loss"] for line in read_metrics(run.metrics_file)}
    scores = [(row["step"], set(row) - {"id", "step"}) for row in wandb.rows if any("eval/" in name for name in row)]
    on_the_way, at_the_end = ({name} for name in sorted(SCORES, key=lambda name: int(name.rpartition("n")[2])))
    assert scores == [(3, on_the_way), (6, on_the_way), (6, at_the_end)]
    grids = [row["samples"] for row in wandb.rows if "samples" in row]
    assert len(grids) == 3 and (grids[1] == grids[2]).all() and (grids[0] != grids[1]).any()
    (result,) = (json.loads(file.read_text()) for file in run.eval.glob("*-n128.json"))
    (name,) = at_the_end
    assert [row[name] for row in wandb.rows if name in row] == [result["metrics"]["fd-pixels"]]


def test_training_is_the_same_without(tmp_path, alone, wandb):
    for on in (False, True):
        config = tiny_config(**HOW, logging__wandb=on)
        train_run(config, RunFolder(tmp_path / str(on)), alone, ScoreDuring())
    first, second = (newest(tmp_path / str(on)).model for on in (False, True))
    assert len(wandb.starts) == 1 and all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_that_continues_is_the_same_wandb_run(train_tiny, wandb):
    train_tiny("run", logging__wandb=True, train__steps=3, checkpoint__every=2)
    run = train_tiny("run", logging__wandb=True)
    for file in run.checkpoints.glob("00000006.*"):  # as if killed behind the checkpoint of step 4
        file.unlink()
    train_tiny("run", logging__wandb=True, train__steps=8)
    train_tiny("other", logging__wandb=True)
    ids = [start["id"] for start in wandb.starts]
    assert ids[0] == ids[1] == ids[2] != ids[3]
    assert [row["step"] for row in wandb.rows if row["id"] == ids[0]] == list(range(1, 9))
    (run.path / "wandb.json").write_text("{}")
    train_tiny("run", logging__wandb=True, train__steps=9)
    assert wandb.starts[-1]["id"] not in ids


def test_a_run_that_begins_anew_is_another_one(tmp_path, wandb):
    config, run = tiny_config(logging__wandb=True), RunFolder(tmp_path)
    for step in (0, 0, 5):
        open_trackers(config, run, step)
    ids = [start["id"] for start in wandb.starts]
    assert ids[0] != ids[1] == ids[2]


def test_trouble_with_wandb(train_tiny, wandb, monkeypatch, logged):
    """At the start it is one line; later it is a warning, and training goes on."""

    def no_key(**how):
        raise wandb.Error("No API key configured.\nUse `wandb login`")

    with monkeypatch.context() as patch, pytest.raises(ConfigError) as caught:
        patch.setattr(wandb, "init", no_key)
        train_tiny("run", logging__wandb=True)
    line = str(caught.value)
    assert "No API key" in line and "WANDB_MODE=offline" in line and "\n" not in line
    monkeypatch.setattr(StandInRun, "log", lambda *a, **k: 1 / 0)
    run = train_tiny("run", logging__wandb=True)
    assert len(list(read_metrics(run.metrics_file))) == 6
    assert sum("wandb has failed (division by zero)" in message for message in logged.messages) == 1


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_without_the_package_it_is_one_line_before_the_data_are_read(tmp_path, alone, monkeypatch, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda asked, *a: None if asked == name else found(asked, *a))
    config = tiny_config(data__path=str(tmp_path), **{f"logging__{name}": True})  # no images there
    with pytest.raises(ConfigError, match=f"logging.{name} is true, but the package is missing: pip install {name}"):
        set_up(config, RunFolder(tmp_path / "run"), alone)


def test_the_real_tensorboard(tmp_path, alone):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = run_job(tmp_path / "run", alone, logging__tensorboard=True)
    run_job(run.path, alone, logging__tensorboard=True, train__steps=7)
    events = EventAccumulator(str(run.path / "tensorboard")).Reload()
    curve = {event.step: event.value for event in events.Scalars("loss")}
    assert curve == pytest.approx({line["step"]: line["loss"] for line in read_metrics(run.metrics_file)})
    assert set(events.Tags()["scalars"]) >= SCORES and {e.step for e in events.Images("samples")} >= {3, 6, 7}
    assert "config/text_summary" in events.Tags()["tensors"]


def test_the_real_wandb_offline(tmp_path, alone, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = run_job(tmp_path / "run", alone, logging__wandb=True)
    run_job(run.path, alone, logging__wandb=True, train__steps=8)
    name = json.loads((run.path / "wandb.json").read_text())["id"]
    files = sorted(run.path.glob(f"wandb/offline-run-*/run-{name}.wandb"))
    assert len(files) == 2 and b"eval/fd-pixels-nfe1" in files[0].read_bytes()
    assert list(run.path.glob("wandb/offline-run-*/files/media/images/samples_3_*.png"))
