"""The arrows between the packages go one way: every import of the source is read and checked."""

import ast
from pathlib import Path

import pytest
from running import ROOT

PACKAGES = ("unet", "dit", "meanflow", "eval", "tests")
# Where imports come from → what of ours they may name, besides their own package. A later package may be missing.
CORE = {
    "errors",
    "random",
    "progress",
    "objective",
    "times",
    "sampling",
    "guidance",
    "dual",
    "tangent",
    "recompute",
    "precision",
}
ALLOWED = {
    "unet": set(),
    "dit": set(),
    "meanflow": {f"meanflow.{name}" for name in CORE},
    "meanflow.dual": {"meanflow.errors"},
    "meanflow.data": {"meanflow.errors", "meanflow.random", "meanflow.logs", "meanflow.precision"},
    "meanflow.training": {"meanflow", "unet", "dit"},
    "eval": {"meanflow", "unet", "dit"},
    "eval.tables": {"meanflow", "eval"},
    "eval.reports": {"meanflow", "eval"},
    "eval.benchmark": {"meanflow", "eval"},
    "eval.toy": {"meanflow", "eval"},
}
PART_OF = {
    "eval.tables": "eval.table",
    "eval.reports": "eval.report",
    "eval.benchmark": "eval.bench",
    "eval.toy": "eval.toy2d",
}
SOURCES = sorted(path for package in PACKAGES if package != "tests" for path in (ROOT / package).rglob("*.py"))


def package_of(path: Path) -> str:
    parts = path.relative_to(ROOT).parts[:-1]
    return ".".join(parts[:2])


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from a import b` counts as a.b, which a or b may be."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(name: str) -> bool:
    return name.partition(".")[0] in PACKAGES


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def test_the_sources_are_found():
    names = {package_of(path) for path in SOURCES}
    assert {"unet", "meanflow", "meanflow.data", "meanflow.training", "eval"} <= names <= set(ALLOWED)
    assert len(SOURCES) > 30


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_follow_the_arrows(path):
    package = package_of(path)
    for name in sorted(filter(ours, imports_of(path))):
        if package == "meanflow":  # the method: its own top-level modules, never the packages below it
            assert any(within(name, module) for module in ALLOWED["meanflow"]), f"{package} → {name}"
            continue
        allowed = {package, *ALLOWED[package]}
        assert any(within(name, other) for other in allowed), f"{package} → {name}"


@pytest.mark.parametrize(("package", "command"), PART_OF.items())
def test_the_parts_of_a_command_do_not_know_it(package, command):
    for path in (ROOT / package.replace(".", "/")).glob("*.py"):
        assert not any(within(name, command) for name in imports_of(path)), path


def test_the_core_modules_are_those_listed():
    """A new module of the method is a decision: name it above."""
    assert {path.stem for path in (ROOT / "meanflow").glob("*.py")} - {"__init__"} <= CORE


@pytest.mark.parametrize("package", ["unet", "meanflow", "meanflow/dual"])
def test_networks_and_method_know_no_files(package):
    """unet and meanflow/*.py: tensors and callables. `errors` names paths in messages, `progress` writes to stderr."""
    files = {"os", "shutil", "pathlib", "io", "json", "yaml", "pickle", "tempfile", "subprocess", "urllib", "glob"}
    for path in (ROOT / package).glob("*.py"):
        if path.stem in ("errors", "random"):  # random hashes JSON text, errors names paths
            continue
        top = {name.partition(".")[0] for name in imports_of(path)}
        assert not top & files, f"{path}: {top & files}"
        tree = ast.parse(path.read_text(encoding="utf-8"))
        calls = {
            node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert "open" not in calls, path


def test_importing_has_no_effect():
    """Nothing at import time but definitions: no statement of a module's body calls something for its effect."""
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.Expr) or not isinstance(node.value, ast.Call):
                continue
            call = ast.unparse(node.value)
            assert call.startswith(("matplotlib.use(", "register(")), f"{path}:{node.lineno}: {call}"


def test_no_exception_is_swallowed():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ExceptHandler):
                assert node.type is not None, f"{path}:{node.lineno}: bare except"
                assert not isinstance(node.body[0], ast.Pass), f"{path}:{node.lineno}: except … pass"


def test_library_code_does_not_print():
    """Below the entry points, words go through a `say` that the caller chooses."""
    for path in SOURCES:
        if package_of(path) == "eval" or path.stem == "errors":
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            assert not (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"), f"{path}:{node.lineno}"


def test_the_checker_sees_a_wrong_arrow(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from eval.plot import plot\n    import meanflow.training.loop as loop\n")
    assert imports_of(file) == {"eval.plot.plot", "meanflow.training.loop"}
    assert not any(within("eval.plot.plot", other) for other in ALLOWED["meanflow.training"])
    assert not within("meanflow.datasets", "meanflow.data")
