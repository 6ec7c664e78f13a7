"""A new objective is one class: the one below is found by its kind, trained, logged and resumed."""

import json
import signal
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import pytest
import torch
from method_helpers import perturbed
from running import comparable_metrics, tiny_config, train_run

import meanflow.objectives
from meanflow.errors import ConfigError
from meanflow.jvp import value_and_jvp
from meanflow.objectives import Loss, Objective
from meanflow.objectives.base import interpolate, squared_norm
from meanflow.training.batches import random_batch
from meanflow.training.checkpoint import checkpoint_path, load_checkpoint
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import fresh_state
from meanflow.training.step import make_loss


@dataclass(frozen=True)
class Distilled(Objective):
    """Flow Matching, and besides the averaged network's output if `decay` names one. Takes no derivative."""

    kind: Literal["test_distilled"] = "test_distilled"
    decay: float | None = None
    calls: ClassVar[list] = []

    def __post_init__(self):
        if self.decay is not None and not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")

    @property
    def teacher_decay(self):
        return self.decay

    def sample_times(self, n, generator):
        t = torch.rand(n, generator=generator)
        return t / 2, t

    def loss(self, u, x, eps, r, t, *, v=None, jvp=value_and_jvp, progress=0.0, teacher=None, **cond):
        z = interpolate(x, eps, t)
        out = u(z, r, t, **cond)
        error = squared_norm(out - (eps - x))
        logged = {"distance": error.detach(), "impossible": (error, t > 2), "done": torch.full_like(t, progress)}
        if teacher is not None:
            target = teacher(z, r, t, **cond)
            self.calls.append((z, r, t, cond, target))
            error = error + squared_norm(out - target)
        return Loss(error, logged)


CHANGES = {"model__dropout": 0.2, "model__width": 4, "train__steps": 6, "ema__decays": [0.9, 0.5]}
DISTILLED = {"kind": "test_distilled", "decay": 0.5}


@pytest.fixture(autouse=True)
def _as_if_in_the_folder(monkeypatch):
    kinds = {**Objective.kinds(), "test_distilled": Distilled}
    monkeypatch.setattr(Objective, "kinds", classmethod(lambda cls: kinds))


def test_its_settings_are_checked_as_all_settings_are():
    assert tiny_config(objective={"kind": "test_distilled"}).objective == Distilled()
    for objective, message in [
        ({"kind": "test_distiled"}, r"objective.kind test_distiled is not known; did you mean test_distilled\?"),
        ({"kind": "test_distilled", "decay": 2}, r"objective.decay must be in \(0, 1\), got 2.0"),
        ({"kind": "test_distilled", "p": 1}, "objective.p is not a setting"),
        (
            {"kind": "test_distilled", "decay": 0.4},
            "test_distilled learns from the average 0.4: ema.decays must contain",
        ),
    ]:
        with pytest.raises(ConfigError, match=message):
            tiny_config(objective=objective)


def test_a_file_in_the_folder_is_found_and_two_of_one_kind_are_refused(tmp_path, monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(meanflow.objectives, "__path__", [*meanflow.objectives.__path__, str(tmp_path)])
    text = "from meanflow.objectives import meanflow\n\n\nclass Mine(meanflow.MeanFlow):\n    kind = 'test_mine'\n"
    (tmp_path / "test_mine.py").write_text(text)
    assert set(Objective.kinds()) >= {"meanflow", "test_mine"}
    (tmp_path / "test_mine_too.py").write_text(text)
    with pytest.raises(TypeError, match=r"test_mine_too and \S+test_mine are both of kind test_mine"):
        Objective.kinds()


@pytest.mark.parametrize("compile", [None, "default"])
def test_it_trains_and_what_it_logs_is_in_the_metrics(train_tiny, monkeypatch, compile):
    original, compiled = torch.compile, []

    def counted(function, dynamic, mode):
        compiled.append(mode)
        return original(function, dynamic=dynamic, backend="aot_eager")

    monkeypatch.setattr(torch, "compile", counted)
    run = train_tiny(objective={"kind": "test_distilled"}, train__compile=compile, **CHANGES)
    lines = [json.loads(line) for line in run.metrics_file.read_text().splitlines()]
    assert list(lines[0])[2:7] == ["loss", "distance", "impossible", "done", "grad_norm"]
    assert [line["done"] for line in lines] == pytest.approx([k / 6 for k in range(6)])
    assert all(line["loss"] == line["distance"] and line["impossible"] is None for line in lines)
    assert compiled == ([compile] if compile else [])


def test_the_teacher_is_the_averaged_network_without_dropout_or_gradient(alone):
    config = tiny_config(objective=DISTILLED, **CHANGES)
    state = fresh_state(config, alone.device)
    perturbed(state.network).train()
    state.ema.update(1)
    Distilled.calls.clear()
    make_loss(state.network, config, alone.device, state.ema)(random_batch(config, 4, alone.device)).mean.backward()
    assert state.network.training and all(p.grad is not None for p in state.network.parameters())
    (z, r, t, cond, target), averaged = Distilled.calls.pop(), fresh_state(config, alone.device).network.eval()
    averaged.load_state_dict(state.ema.averages[0.5])
    assert torch.equal(target, averaged(z, r, t, **cond)) and not target.requires_grad
    assert not torch.equal(target, state.network.eval()(z, r, t, **cond))


def numbers_of(run: RunFolder) -> torch.Tensor:
    """Weights, averages and moments after the last step."""
    saved = load_checkpoint(checkpoint_path(run.checkpoints, 6))
    groups = (saved.model, *saved.ema.values(), *saved.optimizer.values())
    return torch.cat([values.flatten() for group in groups for values in group.values()])


def test_a_resumed_run_with_a_teacher_is_bit_equal(tmp_path, alone):
    def stop(run, config, state, ctx):
        if state.step == 2:
            signal.raise_signal(signal.SIGINT)

    config = tiny_config(objective=DISTILLED, eval__every=1, **CHANGES)
    whole, parts, other = (RunFolder(tmp_path / name) for name in ("whole", "parts", "other"))
    assert train_run(config, whole, alone) == 0
    assert train_run(config, parts, alone, stop) == 130
    assert train_run(config, parts, alone) == 0
    assert torch.equal(numbers_of(whole), numbers_of(parts))
    assert comparable_metrics(whole.path) == comparable_metrics(parts.path)
    assert train_run(replace(config, objective=Distilled()), other, alone) == 0
    assert not torch.equal(numbers_of(whole), numbers_of(other))  # the teacher counts
