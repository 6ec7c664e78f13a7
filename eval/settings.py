"""settings: a page of every setting: meaning, range, default, and whether it may change (docs/settings.md).

The meaning is the comment on the field's line in the source, the range what the field's own check demands; the rest
comes from the dataclasses.
"""

import ast
import inspect
import re
import textwrap
from dataclasses import MISSING, Field, fields, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from eval.scoring.options import Parser, path
from meanflow.errors import run_main
from meanflow.files import write_text
from meanflow.training import settings
from meanflow.training.config import CHANGEABLE, CHANGEABLE_ON_REQUEST, RECIPES, RunConfig, load_config

INTRODUCTION = """# Settings

Every setting of a recipe, written from the code by `bash run.sh settings --out docs/settings.md`. `--set key=value`
overrides one; `base: NAME` in a recipe takes all others from another recipe. Numbers may be written as 1e-4.

The last column says whether a run may continue with another value. *yes*: it may. *--set*: it may if `--set` asks for
it, which `starts.jsonl` records. Otherwise it would be another run; `init.from` starts one from these weights.
"""
WORDS = {bool: "true or false", int: "whole number", float: "number", str: "text", type(None): "null"}
IMPOSSIBLE = (-1, (-1,), (), "?")  # of which a field's own check refuses those of its type


def page() -> str:
    """The page, as Markdown."""
    examples = examples_from_recipes()
    parts = [INTRODUCTION, _table("", RunConfig, examples[RunConfig])]
    for name, comment in _comments(RunConfig).items():
        for kind in settings.groups_of(get_type_hints(RunConfig)[name]):
            parts += _sections(name, kind, examples[kind], comment)
    return "\n".join(parts)


def examples_from_recipes() -> dict[type, Any]:
    """{dataclass: a valid instance} of all groups of settings."""
    found = {kind: kind() for kind in settings.groups_of(get_type_hints(RunConfig)["objective"])}
    for recipe in sorted(RECIPES.glob("*.yaml"), reverse=True):
        config = load_config(recipe)
        for part in (config, *(getattr(config, field.name) for field in fields(config))):
            found.setdefault(type(part), part)
    return found


def _sections(path: str, kind: type, example: Any, comment: str = "") -> list[str]:
    """The section of a group of settings, and those of the groups in it."""
    title = f"## `{path}`" + (f", kind `{example.kind}`" if _is_tag(get_type_hints(kind).get("kind")) else "")
    about = inspect.cleandoc(kind.__doc__).partition("\n")[0].partition(" Raises ")[0]
    parts = [f"{title}\n\n{about}{f' {comment[0].upper()}{comment[1:]}.' if comment else ''}\n"]
    parts.append(_table(f"{path}.", kind, example))
    for field in fields(kind):
        for inner in settings.groups_of(get_type_hints(kind)[field.name]):
            parts += _sections(f"{path}.{field.name}", inner, getattr(example, field.name))
    return parts


def _table(where: str, kind: type, example: Any) -> str:
    comments, hints = _comments(kind), get_type_hints(kind)
    rows = [("setting", "meaning", "values", "default", "may change"), ("---",) * 5]
    for field in fields(kind):
        if settings.groups_of(hints[field.name]) or (field.name == "kind" and _is_tag(hints["kind"])):
            continue
        key = f"{where}{settings.key_of(field)}"
        values = _range(field.name, example) or _type(hints[field.name])
        rows.append((f"`{key}`", comments[field.name], values, _default(field), _may_change(key)))
    return "\n".join(f"| {' | '.join(row)} |" for row in rows) + "\n"


def _is_tag(hint: Any) -> bool:
    """Whether a field `kind` of this type only names its dataclass: the section's title says it."""
    return get_origin(hint) is Literal


def _comments(kind: type) -> dict[str, str]:
    """{field: the comment on its line} of a dataclass, from the source."""
    source = textwrap.dedent(inspect.getsource(kind))
    found = {}
    for node in ast.parse(source).body[0].body:
        if isinstance(node, ast.AnnAssign):
            line = source.encode().splitlines()[node.end_lineno - 1][node.end_col_offset :].decode()
            found[node.target.id] = line.partition("# ")[2].strip()
    return found


def _range(name: str, example: Any) -> str:
    """What the dataclass's check demands of a field, from its error for an impossible value; "" if nothing."""
    for bad in IMPOSSIBLE:
        if found := re.search(
            rf"\b{name}\b.*? must (?:be|lie in) (.+?)(, (?:got|not) |$)", _refusal(name, example, bad)
        ):
            choices = found[1].removeprefix("one of ") if "," in found[1] else found[1]
            return choices.strip("()").replace("'", "") if "'" in choices else choices
    return ""


def _refusal(name: str, example: Any, value: Any) -> str:
    try:
        replace(example, **{name: value})
    except (ValueError, TypeError) as error:  # TypeError: the value is not of the field's type
        return str(error) if isinstance(error, ValueError) else ""
    return ""


def _type(hint: Any) -> str:
    args = get_args(hint)
    if get_origin(hint) is tuple:
        return f"list of {WORDS[args[0]]}s"
    if get_origin(hint) is Literal:
        return " or ".join(args)
    return " or ".join(_type(arg) for arg in args) if args else WORDS[hint]


def _default(field: Field) -> str:
    if field.default is MISSING and field.default_factory is MISSING:
        return "required"
    return f"`{settings.shown(field.default)}`"


def _may_change(key: str) -> str:
    if settings.within(key, CHANGEABLE):
        return "yes"
    return "--set" if settings.within(key, CHANGEABLE_ON_REQUEST) else ""


def main(argv: list[str] | None = None) -> int:
    parser = Parser("settings", __doc__.partition(": ")[2])
    parser.add_argument("--out", type=path, help="write the page to this file, such as docs/settings.md")
    args = parser.parse_args(argv)
    if args.out is None:
        print(page(), end="")
        return 0
    write_text(args.out, page())
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
