"""docs/paper-to-code.md: whatever it names is there, and the values that it gives are those of the recipes."""

import ast
import pydoc
import re
from fnmatch import fnmatchcase
from functools import cache
from pathlib import Path

import pytest
from running import ROOT

import run
from eval.tables.config import Run, load_table
from meanflow.errors import ConfigError
from meanflow.training import settings
from meanflow.training.config import RunConfig, config_from_tree, load_config

TEXT = (ROOT / "docs" / "paper-to-code.md").read_text(encoding="utf-8")
RECIPES = {path.stem: path for path in sorted((ROOT / "recipes").glob("*.yaml"))}
TABLES = ROOT / "recipes" / "tables"
COMMANDS = {"test", "lint", "stress", *run.commands()}  # of run.sh, besides recipes
ASSIGNMENT = re.compile(r" (?=\w+(?:\.\w+)+=)")
ITEMS = [
    *(f"({n})" for n in range(1, 25)),
    *("Algorithm 1", "Algorithm 2", "Table 1a", "Table 1b", "Table 1c", "Table 1d", "Table 1e", "Table 1f", "Table 2"),
    *("Table 3", "Table 4", "Table 5", "Figure 1", "Figure 2", "Figure 3", "Figure 4", "Figure 5"),
    *("B.1", "B.2", "B.3", "B.4", "C:"),
]


@cache
def names(path: Path) -> set[str]:
    """What a module defines: functions, classes and constants, and as Class.name what its classes do."""

    def of(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found = set()
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            found |= {prefix + n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)}
            if isinstance(node, ast.ClassDef):
                found |= of(node.body, f"{prefix}{node.name}.")
        return found

    return of(ast.parse(path.read_text(encoding="utf-8")).body)


@cache
def recipe(name: str) -> RunConfig:
    return load_config(RECIPES[name])


@cache
def rows(name: str) -> tuple[Run, ...]:
    return load_table(TABLES / f"{name}.yaml").runs


def holds(config: RunConfig, assignments: list[str]) -> bool:
    """Whether these overrides leave `config` as it is."""
    try:
        tree = settings.apply_overrides(settings.to_tree(config), assignments)
        return config_from_tree(tree, "the guide") == config
    except ConfigError:
        return False


def accepts(name: str, assignments: list[str]) -> bool:
    try:
        return bool(load_config(RECIPES[name], assignments))
    except ConfigError:
        return False


def wrong_names(path: str, listed: str) -> str:
    if not (ROOT / path).is_file():
        return f"there is no file {path}"
    return ", ".join(name for name in re.split(r", ?", listed) if name not in names(ROOT / path))


def wrong_settings(where: str | None, text: str) -> str:
    assignments = ASSIGNMENT.split(text)
    known = {key for name in RECIPES for key in settings.flatten(settings.to_tree(recipe(name)))}
    if unknown := [key for key in (part.partition("=")[0] for part in assignments) if key not in known]:
        return f"no setting {', '.join(unknown)}"
    if where is None:
        given = "=" in text and not any(accepts(name, assignments) for name in RECIPES)
        return "no recipe takes this value" if given else ""
    if matching := [name for name in RECIPES if fnmatchcase(name, where)]:
        return ", ".join(name for name in matching if not holds(recipe(name), assignments))
    if not (TABLES / f"{where}.yaml").is_file():
        return f"there is no recipe or table {where}"
    return "" if any(holds(run.recipe, assignments) for run in rows(where)) else "no row has it"


def wrong_command(name: str) -> str:
    return "" if name in COMMANDS or list((ROOT / "recipes").rglob(f"{name}.yaml")) else "run.sh knows no such name"


READERS = {
    r"(tests/\S+\.py)::(test_\w+)": wrong_names,
    r"(\S+\.py): (\w+(?:\.\w+)*(?:, \w+(?:\.\w+)*)*)": wrong_names,
    r"bash run\.sh (\w+)(?: .+)?": wrong_command,
    r"(torch(?:\.\w+)+)": lambda name: "" if pydoc.locate(name) else "PyTorch has no such thing",
    r"([\w-]+(?:/[\w-]+)+\.(?:py|md|yaml))": lambda path: "" if (ROOT / path).is_file() else "there is no such file",
    r"(?:([\w*?\[\]]+): )?([a-z]+(?:\.\w+)+(?:=.+)?)": wrong_settings,
}


def complaint(span: str) -> str:
    """What is wrong with what stands between two backticks; empty if nothing is."""
    for pattern, judge in READERS.items():
        if found := re.fullmatch(pattern, span):
            return judge(*found.groups())
    return "is in none of the guide's notations"


def tables() -> list[list[list[str]]]:
    """Every table of the guide: its rows, and their cells. No cell has a | in it."""
    blocks = re.findall(r"(?:^\|.*\|\n)+", TEXT, re.MULTILINE)
    return [[[cell.strip() for cell in row.strip("|").split("|")] for row in block.splitlines()] for block in blocks]


def test_everything_it_names_exists():
    spans = set(re.findall(r"`([^`]+)`", TEXT))
    assert len(spans) > 200
    wrong = {span: said for span in sorted(spans) if (said := complaint(span))}
    assert not wrong, "\n".join(f"{span}: {said}" for span, said in wrong.items())


@pytest.mark.parametrize(
    "span",
    [
        "meanflow/objectives.py",
        "meanflow/objectives/meanflow.py: MeanFlow.lost",
        "meanflow/training/batches.py: BatchStream.micro_batch",
        "tests/test_times.py::test_exact_shares",
        "tests/test_time.py::test_exact_share",
        "objective.times.ratios",
        "objective.times.sampler=v2",
        "cifar10: objective.times.ratio=0.25",
        "imagenet_*: model.depth=12",
        "cifar100: objective.times.ratio=0.75",
        "demo_guided: guidance.omega_prime=4",
        "bash run.sh table9",
        "bash run.sh bunch",
        "torch.func.jpv",
        "sample",
    ],
)
def test_missing_names_are_found(span):
    assert complaint(span)


def test_every_row_has_its_test_or_says_that_there_is_none():
    kept = [table for table in tables() if table[0][-1] == "test"]
    assert len(kept) >= 5
    for row in (row for table in kept for row in table[2:]):
        assert row[-1] == "none" or "`tests/" in row[-1], row
    assert all(len(row) == len(table[0]) for table in tables() for row in table)


def test_the_papers_figures_are_those_of_the_tables():
    """Written down twice, here and in recipes/tables/, by different hands."""
    quoted = [
        (float(row[1]), *found.groups())
        for table in tables()
        for row in table
        if len(row) == 3
        and re.fullmatch(r"\d+\.\d+", row[1])
        and (found := re.fullmatch(r"`(table\w+): (.+)`", row[2]))
    ]
    assert len(quoted) == 32
    for value, table, text in quoted:
        matching = [run for run in rows(table) if holds(run.recipe, ASSIGNMENT.split(text))]
        assert any(value in run.row.paper for run in matching), f"{table}: {text}: {value}"


def test_nothing_of_the_paper_is_left_out():
    heads = [row[0] for table in tables() for row in table] + re.findall(r"^#+ (.*)$", TEXT, re.MULTILINE)
    missing = [item for item in ITEMS if not any(item in head for head in heads)]
    assert not missing
