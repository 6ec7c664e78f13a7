"""The arrows between the packages go one way: every import of the source is read and checked."""

import ast
from pathlib import Path

import pytest
from running import ROOT

# What of this repository a package imports besides itself. The core is meanflow/*.py, dual and objectives.
CORE = {f"meanflow.{path.stem}" for path in (ROOT / "meanflow").glob("*.py")} | {"meanflow.dual", "meanflow.objectives"}
ALLOWED = {
    "unet": set(),
    "dit": set(),
    "meanflow": CORE,
    "meanflow.dual": CORE,
    "meanflow.objectives": CORE,
    "meanflow.data": {f"meanflow.{name}" for name in ("errors", "files", "logs", "precision", "random")},
    "meanflow.training": {"meanflow", "unet", "dit"},
    "eval": {"meanflow"},
    "run.py": {"meanflow", "eval"},
}
COMMAND_OF = {  # folder of eval → the command that its parts belong to
    **{"scoring": "eval.fid", "sampling": "eval.sample", "reports": "eval.report"},
    **{"tables": "eval.table", "benchmark": "eval.bench", "toy": "eval.toy2d"},
    **{"checking": "eval.check", "sharing": "eval.share", "exporting": "eval.export", "timing": "eval.latency"},
}
OURS = {"unet", "dit", "meanflow", "eval", "run", "tests"}
SOURCES = sorted([ROOT / "run.py", *(path for name in OURS - {"run", "tests"} for path in (ROOT / name).rglob("*.py"))])
FILES = {"os", "shutil", "pathlib", "io", "json", "yaml", "pickle", "tempfile", "subprocess", "urllib", "glob"}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package_of(path: Path) -> str:
    """The key of `ALLOWED` that a file belongs to."""
    if path.parent == ROOT:
        return path.name
    parts = path.relative_to(ROOT).parts[:-1]
    return "eval" if parts[0] == "eval" else ".".join(parts[:2])


def nodes(path: Path, kind):
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kind)]


def imports_of(path: Path) -> set[str]:
    """Dotted names that a file imports, wherever in it; `from a import b` counts as a.b, which a or b may be."""
    found = set()
    for node in nodes(path, ast.Import | ast.ImportFrom):
        assert not getattr(node, "level", 0), f"{path}: relative import"
        prefix = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
        found |= {prefix + alias.name for alias in node.names}
    return found


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def wrong_arrows(path: Path, package: str) -> set[str]:
    allowed = ALLOWED[package] | {package} - {"meanflow"}  # whose folders are packages of their own
    ours = {name for name in imports_of(path) if name.partition(".")[0] in OURS}
    return {name for name in ours if not any(within(name, other) for other in allowed)}


def test_the_sources_are_found():
    assert {package_of(path) for path in SOURCES} == set(ALLOWED)
    assert {folder.name for folder in (ROOT / "eval").iterdir() if any(folder.glob("*.py"))} == set(COMMAND_OF)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_imports_follow_the_arrows(path):
    assert not wrong_arrows(path, package_of(path))
    command = COMMAND_OF.get(path.parent.name) if path.is_relative_to(ROOT / "eval") else None
    assert command is None or not any(within(name, command) for name in imports_of(path)), "a part knows its command"


def test_the_checker_sees_a_wrong_arrow(tmp_path):
    file = tmp_path / "bad.py"
    file.write_text("def f():\n    from eval.plot import plot\n    import meanflow.training.loop as loop\n")
    assert imports_of(file) == {"eval.plot.plot", "meanflow.training.loop"}
    assert wrong_arrows(file, "meanflow.training") == {"eval.plot.plot"}
    assert wrong_arrows(file, "meanflow") == wrong_arrows(file, "unet") == imports_of(file)
    assert not within("meanflow.datasets", "meanflow.data")


def test_no_objective_is_named():
    """Outside their folder objectives are found by `kind`; `meanflow/__init__.py` offers MeanFlow to scripts."""
    files = (ROOT / "meanflow" / "objectives").glob("*.py")
    objectives = {module_of(file) for file in files} - {"meanflow.objectives", "meanflow.objectives.base"}
    assert "meanflow.objectives.meanflow" in objectives
    for path in SOURCES:
        if package_of(path) == "meanflow.objectives" or module_of(path) == "meanflow":
            continue
        words = {str(node.value) for node in nodes(path, ast.Constant)} | imports_of(path)
        assert not any(within(word, objective) for word in words for objective in objectives), path


def test_networks_and_method_know_no_files():
    """Tensors and callables. `errors`, `files` and `logs` are about files and streams, `random` hashes JSON text."""
    packages = {"unet", "dit", "meanflow", "meanflow.dual", "meanflow.objectives"}
    others = {"meanflow.errors", "meanflow.files", "meanflow.logs", "meanflow.random"}
    for path in SOURCES:
        if package_of(path) in packages and module_of(path) not in others:
            assert not {name.partition(".")[0] for name in imports_of(path)} & FILES, path
            assert "open" not in {getattr(call.func, "id", "") for call in nodes(path, ast.Call)}, path


def test_importing_has_no_effect():
    """Nothing at import time but definitions: no statement of a module's body calls something for its effect."""
    for path in SOURCES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
                call = ast.unparse(node.value)
                assert call.startswith("matplotlib.use("), f"{path}:{node.lineno}: {call}"


def test_no_exception_is_swallowed():
    for path in SOURCES:
        for node in nodes(path, ast.ExceptHandler):
            assert node.type is not None and not isinstance(node.body[0], ast.Pass), f"{path}:{node.lineno}"


def test_library_code_logs_and_does_not_print():
    """Only commands write to stdout; errors.py and logs.py do it for them."""
    for path in SOURCES:
        if package_of(path) in {"eval", "run.py"} or module_of(path) in {"meanflow.errors", "meanflow.logs"}:
            continue
        for call in nodes(path, ast.Call):
            to_stdout = not any(keyword.arg == "file" for keyword in call.keywords)
            assert getattr(call.func, "id", "") != "print" or not to_stdout, f"{path}:{call.lineno}"
