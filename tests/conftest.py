"""Fixtures shared by the tests of training and evaluation."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import Started, start, tiny_config, train_run, write_images, write_recipe

from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Tiny tensors gain nothing from threads, and sums come out the same on every machine."""
    torch.set_num_threads(1)


@pytest.fixture
def alone() -> DistributedContext:
    return DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture
def logged(caplog) -> pytest.LogCaptureFixture:
    """What this package logs: `logged.messages`."""
    caplog.set_level(logging.INFO, logger="meanflow")
    return caplog


@pytest.fixture
def launch(tmp_path) -> Callable[..., Started]:
    """`launch("run", arguments…)` starts an entry point in a process of its own."""
    started: list[Started] = []

    def launch(module: str, *arguments: Any, **how: Any) -> Started:
        started.append(start(module, *arguments, logs=tmp_path / "logs", **how))
        return started[-1]

    yield launch
    for one in started:
        if one.process.is_alive():
            one.process.kill()
        one.process.join()


@pytest.fixture
def recipe(tmp_path) -> Callable[..., Path]:
    """`recipe(group__key=value, …)` writes the tiny run's YAML with these changed."""
    return lambda **changes: write_recipe(tmp_path / "tiny.yaml", **changes)


@pytest.fixture
def train_tiny(tmp_path, alone) -> Callable[..., RunFolder]:
    """`train_tiny(folder, group__key=value, …)` trains in this process and gives the run folder."""

    def train_tiny(name: str = "run", **changes: Any) -> RunFolder:
        run, config = RunFolder(tmp_path / name), tiny_config(**changes)
        with run.lock():
            train_run(config, run, alone)
        return run

    return train_tiny


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> RunFolder:
    """A finished tiny run on digits, to be read only."""
    run, config = RunFolder(tmp_path_factory.mktemp("trained") / "run"), tiny_config(ema__decays=[0.9, 0.5])
    train_run(config, run, DistributedContext(0, 1, torch.device("cpu")))
    return run


@pytest.fixture(scope="session")
def trained_with_classes(tmp_path_factory) -> RunFolder:
    """A finished tiny run with two classes of RGB images, to be read only."""
    folder = tmp_path_factory.mktemp("classes")
    images = str(write_images(folder / "images"))
    config = tiny_config(data__path=images, model__channels=3, model__classes=2, optim__lr=0.02, train__steps=20)
    run = RunFolder(folder / "run")
    train_run(config, run, DistributedContext(0, 1, torch.device("cpu")))
    return run
