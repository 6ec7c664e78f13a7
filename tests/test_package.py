"""The project as a package: what pyproject.toml says, what imports cost, and the examples in README and docs."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from running import ROOT, tiny_config, train_run

import meanflow
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
EXAMPLES = ("README.md", "docs/library.md")


def requirements(name: str) -> set[str]:
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {line.partition("#")[0].strip() for line in lines} - {""}


@pytest.mark.parametrize(
    ("file", "listed"),
    [
        ("requirements.txt", PROJECT["project"]["dependencies"]),
        ("requirements-imagenet.txt", PROJECT["project"]["optional-dependencies"]["imagenet"]),
        ("requirements-dev.txt", PROJECT["project"]["optional-dependencies"]["dev"]),
    ],
)
def test_the_requirements_files_say_what_pyproject_says(file, listed):
    assert requirements(file) == set(listed)


def test_every_package_and_every_file_that_they_read_is_installed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if tracked.returncode:
        pytest.skip("not a git checkout")
    included = set(PROJECT["tool"]["setuptools"]["packages"]["find"]["include"])
    suffixes = {pattern.removeprefix("*") for pattern in PROJECT["tool"]["setuptools"]["package-data"]["*"]}
    not_installed = {"tests", "docs", ".ci"}
    for path in map(Path, tracked.stdout.splitlines()):
        if len(path.parts) == 1:
            if path.suffix == ".py":
                assert path.stem in PROJECT["tool"]["setuptools"]["py-modules"]
        elif path.parts[0] not in not_installed:
            assert path.parts[0] in included and (len(path.parts) == 2 or f"{path.parts[0]}.*" in included), path
            assert path.suffix in {".py", *suffixes}, path


def test_the_command_is_there():
    module, _, function = PROJECT["project"]["scripts"]["meanflow"].partition(":")
    body = ast.parse((ROOT / f"{module}.py").read_text(encoding="utf-8")).body
    assert function in {node.name for node in body if isinstance(node, ast.FunctionDef)}


def test_the_three_names_are_imported_when_they_are_used():
    code = "import sys, meanflow, meanflow.errors; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    assert all(callable(getattr(meanflow, name)) for name in meanflow.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'sampel'"):
        _ = meanflow.sampel


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_list_of_recipes_needs_no_other_package(arguments, tmp_path):
    command = [sys.executable, "-S", str(ROOT / "run.py"), *arguments]  # -S: nothing that pip installed
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0 and "\n  cifar10 " in shown.stdout and "\n  sample " in shown.stdout, shown.stderr


# --- examples ----------------------------------------------------------------------------------------------------


def blocks(file: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (ROOT / file).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def is_excerpt(block: str) -> bool:
    """Whether it is there to be read: all of its lines, but for a shortened signature, are lines of one source file."""
    shown = [line.strip() for line in block.splitlines() if line.strip() and not line.startswith("def ")]
    sources = (*ROOT.glob("meanflow/*.py"), *ROOT.glob("meanflow/objectives/*.py"))
    return any(is_subsequence(shown, path.read_text(encoding="utf-8").splitlines()) for path in sources)


def is_subsequence(shown: list[str], lines: list[str]) -> bool:
    rest = (line.strip() for line in lines)
    return all(line in rest for line in shown)


@pytest.fixture(scope="module")
def with_a_run(tmp_path_factory) -> Path:
    """A folder with runs/demo, trained for a moment."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "runs").mkdir()
    config = tiny_config(model__classes=10, train__steps=2)
    train_run(config, RunFolder(folder / "runs" / "demo"), DistributedContext(0, 1, torch.device("cpu")))
    return folder


@pytest.mark.parametrize("file", EXAMPLES)
def test_the_examples_run(file, with_a_run, monkeypatch):
    """One after the other, as a reader would type them."""
    monkeypatch.chdir(with_a_run)
    names: dict = {"__name__": "examples"}
    to_run = [block for block in blocks(file) if not is_excerpt(block)]
    assert to_run
    for block in to_run:
        exec(compile(block, file, "exec"), names)


def test_the_examples_show_what_they_say(with_a_run, monkeypatch):
    monkeypatch.chdir(with_a_run)
    model = meanflow.load("runs/demo")
    images = model.sample(16, classes=7)
    assert images.shape == (16, 1, 8, 8) and images.device.type == "cpu"
    torch.testing.assert_close(model.sample(32, classes=7)[:16], images)
