"""YAML ⇄ frozen dataclasses, strictly: every key is known, of its type and in range, or the error names it.

A key that is left out takes the dataclass's default; one without a default must be there. `base:` names another file
that the rest is merged over. Values from files and from `--set key.path=value` are checked by the same `build`.
"""

import difflib
import math
import shlex
import types
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import MISSING, Field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from meanflow.errors import ConfigError

MAX_BYTES = 2**20  # of a recipe; parsing takes about a second for each 100 kB
MAX_WHOLE = 2**63
SCALARS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}  # in errors
RENAMED = {  # what an earlier version called it: what it is now; the first that fits counts
    "times.share": "objective.times.stratified",
    "times": "objective.times",
    "loss.jvp": "train.jvp",
    "loss": "objective",
    "guidance.dropped": "guidance.unconditional_rows",
}
SYNONYMS = {  # what other projects call it: what it is here
    **dict.fromkeys(("learning_rate", "base_lr"), "optim.lr"),
    **dict.fromkeys(("warmup", "warmup_iters", "lr_warmup_steps"), "optim.warmup_steps"),
    **dict.fromkeys(("grad_clip", "clip_grad", "max_grad_norm", "gradient_clip"), "optim.clip"),
    **dict.fromkeys(("batch_size", "global_batch_size", "bs"), "train.batch"),
    **dict.fromkeys(("epochs", "num_epochs", "max_steps", "iterations", "num_steps", "train_steps"), "train.steps"),
    **dict.fromkeys(("micro_batch", "micro_batch_size", "accumulate", "grad_accum"), "train.microbatch"),
    **dict.fromkeys(("ema_decay", "ema_rate", "decay"), "ema.decays"),
    **dict.fromkeys(("amp", "mixed_precision", "fp16", "bf16", "dtype"), "train.precision"),
    **dict.fromkeys(("gradient_checkpointing", "grad_checkpointing"), "train.activation_checkpointing"),
    **dict.fromkeys(("cfg_scale", "cfg", "omega", "guidance_scale"), "guidance.omega_prime"),
    **dict.fromkeys(("class_dropout_prob", "label_dropout", "cfg_dropout"), "guidance.label_drop"),
    **dict.fromkeys(("num_classes", "n_classes"), "model.classes"),
    **dict.fromkeys(("resolution", "img_size", "size"), "model.image_size"),
    **dict.fromkeys(("data_dir", "dataset", "data_path", "root_dir"), "data.path"),
    **dict.fromkeys(("save_every", "ckpt_every", "save_freq"), "checkpoint.every"),
    **dict.fromkeys(("num_samples", "n_samples"), "eval.samples"),
}


class _PlainLoader(yaml.SafeLoader):
    """YAML silently keeps the last of two equal keys; a recipe must not. Aliases, which multiply, are refused."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.composer.ComposerError(None, None, "an alias (*) is used", self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        repeated = sorted({str(key) for key in keys if keys.count(key) > 1})
        if repeated:
            raise yaml.constructor.ConstructorError(None, None, f"repeats the key {repeated[0]}", node.start_mark)
        return super().construct_mapping(node, deep)


def load(
    kind: type,
    path: Path,
    overrides: Sequence[str] = (),
    upgrade: Callable[[dict], dict] = lambda tree: tree,
    library: Path | None = None,
) -> Any:
    """The dataclass `kind` from the file at `path`, with `--set` overrides applied. Raises ConfigError.

    upgrade: brings the tree of an earlier version into today's layout. library: a folder where a `base` is looked for
    that is not beside the file.
    """
    tree = apply_overrides(read_with_base(path, upgrade, library), overrides)
    source = f"{path} with --set {shlex.join(overrides)}" if overrides else str(path)
    return build(kind, tree, "", source)


def read_with_base(
    path: Path,
    upgrade: Callable[[dict], dict] = lambda tree: tree,
    library: Path | None = None,
    above: tuple[Path, ...] = (),
) -> dict[str, Any]:
    """The mapping at `path` merged over that of the file which its `base` names, and so on; see `load`.

    above: the files on the way here. Raises ConfigError if a base is missing, or leads back to one of these.
    """
    tree = upgrade(read_yaml(path))
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str) or not base or Path(base).name != base:
        raise ConfigError(f"{path}: base must be the name of a recipe, got {base!r}")
    above = (*above, path.resolve())
    folders = [path.parent] if library is None else [path.parent, library]
    found = [file for folder in folders if (file := folder / f"{base.removesuffix('.yaml')}.yaml").exists()]
    if not found:
        known = sorted({file.stem for folder in folders for file in folder.glob("*.yaml")})
        raise ConfigError(f"{path}: its base {base} is no recipe in {folders[-1]}{nearest(base, known)}")
    below = next((file for file in found if file.resolve() not in above), None)
    if below is None:
        raise ConfigError(f"{path}: its base {base} leads back to itself")
    return merge(read_with_base(below, upgrade, library, above), tree)


def merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`changes` over `base`, group by group. A group whose `kind` is another one replaces the base's whole."""
    merged = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        same_kind = isinstance(old, dict) and isinstance(value, dict) and value.get("kind") in (None, old.get("kind"))
        merged[key] = merge(old, value) if same_kind else value
    return merged


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file. Raises ConfigError in one line if it is missing or not a mapping."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise ConfigError(f"{path}: is too large for a recipe (above {MAX_BYTES // 2**20} MB)")
        tree = parse_yaml(data.decode("utf-8"), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from error
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected a mapping of settings, found {type(tree).__name__}")
    return tree


def parse_yaml(text: str, source: str) -> Any:
    try:
        return yaml.load(text, _PlainLoader)
    except (yaml.YAMLError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        # the last ones are what PyYAML makes of !!timestamp 8, !!bool 8 and the like
        reason = getattr(error, "problem", None) or "it is malformed"
        mark = getattr(error, "problem_mark", None)
        raise ConfigError(f"{source}: not valid YAML: {reason}{f' (line {mark.line + 1})' if mark else ''}") from error


def apply_overrides(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of `tree` with each `key.path=value` set; `build` checks that these are settings.

    Raises ConfigError for anything but assignments to single settings.
    """
    tree = _copy(tree)
    for override in overrides:
        path, equals, text = override.partition("=")
        if not equals or not path.strip():
            raise ConfigError(f"--set {override}: expected key.path=value, such as train.steps=1000")
        *parents, last = path.strip().split(".")
        branch = tree
        for key in parents:
            if branch.get(key) is None:
                branch[key] = {}
            branch = branch[key]
            if not isinstance(branch, dict):
                raise ConfigError(f"--set {override}: {path} is not a setting")
        value = parse_yaml(text, f"--set {override}")
        if isinstance(value, dict) or (isinstance(branch.get(last), dict) and value is not None):
            raise ConfigError(f"--set {override}: {path} is a group of settings; set them one by one")
        branch[last] = value
    return tree


def _copy(tree: Any) -> Any:
    return {key: _copy(value) for key, value in tree.items()} if isinstance(tree, dict) else tree


def nearest(name: str, known: Iterable[str]) -> str:
    """Suggestions for an unknown `name`, to end an error message: those with a similar spelling, or else all."""
    known = list(known)
    if matches := difflib.get_close_matches(name, known, n=3, cutoff=0.6):
        return f"; did you mean {' or '.join(matches)}?"
    return f"; known: {', '.join(known)}" if known else ""


def unknown(path: str, kind: type, where: str) -> str:
    """Suggestions for the dotted `path`, which the dataclass `kind` at `where` lacks, to end an error message."""
    for old, new in RENAMED.items():
        if path == old or path.startswith(f"{old}."):
            return f"; it is called {new}{path[len(old) :]} now"
    last, (key, dot, rest) = path.rpartition(".")[2], path[len(where) :].partition(".")
    siblings, inside = [key_of(field) for field in fields(kind)], list(leaves(kind, where))
    if meant := SYNONYMS.get(last):
        same_name = [setting for setting in inside if setting.rpartition(".")[2] == meant.rpartition(".")[2]]
        return f"; did you mean {meant if meant in inside or not same_name else ' or '.join(same_name)}?"
    if near := difflib.get_close_matches(key, siblings, n=1, cutoff=0.6):
        return f"; did you mean {where}{near[0]}{dot}{rest}?"
    names = {setting.rpartition(".")[2] for setting in inside}
    if near := difflib.get_close_matches(last, names, n=1, cutoff=0.75):
        return f"; did you mean {' or '.join(s for s in inside if s.rpartition('.')[2] == near[0])}?"
    return f"; known here: {', '.join(siblings)}"


def leaves(kind: type, where: str = "") -> dict[str, tuple[type, Field]]:
    """{dotted key: (dataclass, field)} of every setting of a dataclass, of all kinds that a group may be."""
    found: dict[str, tuple[type, Field]] = {}
    hints = get_type_hints(kind)
    for field in fields(kind):
        path, groups = f"{where}{key_of(field)}", groups_of(hints[field.name])
        inner = [leaves(group, f"{path}.") for group in groups] or [{path: (kind, field)}]
        for settings in inner:
            found |= {key: value for key, value in settings.items() if key not in found}
    return found


def groups_of(hint: Any) -> list[type]:
    """The dataclasses that a field of this type may hold."""
    if not is_dataclass(hint) and hasattr(hint, "kinds"):
        return list(hint.kinds().values())
    return [arg for arg in get_args(hint) or (hint,) if is_dataclass(arg)]


def build(kind: Any, value: Any, path: str, source: str) -> Any:
    """`value` as type `kind`, checked. `path` is its dotted key and `source` its file, for the error.

    Raises ConfigError naming both. Numbers written as strings ("1e-4", which YAML reads so) are numbers.
    """
    if is_dataclass(kind):
        return _build_dataclass(kind, value, path, source)
    if hasattr(kind, "kinds"):  # an open family of dataclasses, such as objectives
        named = kind.kinds()
        return build(named[_kind_name(named, value, path, source)], value, path, source)
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        words = [word for arg in args if get_origin(arg) is Literal for word in get_args(arg)]
        if isinstance(value, str) and value in words:
            return value
        kinds = [arg for arg in args if arg is not type(None) and get_origin(arg) is not Literal]
        if words and isinstance(value, str) and not isinstance(_number(value), float):
            raise _wrong(path, source, " or ".join([SCALARS[kinds[0]], *words]), value)
        return build(kinds[0] if len(kinds) == 1 else _kind_of(kinds, value, path, source), value, path, source)
    if origin is Literal:
        if value not in args:
            raise _wrong(path, source, " or ".join(args), value)
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise _wrong(path, source, "a list", value)
        if args[-1] is not Ellipsis and len(value) != len(args):
            raise _wrong(path, source, f"a list of {len(args)}", value)
        return tuple(build(args[0], item, f"{path}[{i}]", source) for i, item in enumerate(value))
    return _build_scalar(kind, value, path, source)


def _kind_of(kinds: list[type], value: Any, path: str, source: str) -> type:
    """The dataclass of a union whose field `kind: Literal[…]` is what `value` says."""
    named = {get_args(get_type_hints(kind)["kind"])[0]: kind for kind in kinds}
    return named[_kind_name(named, value, path, source)]


def _kind_name(named: dict[str, type], value: Any, path: str, source: str) -> str:
    if not isinstance(value, dict):
        raise _wrong(path, source, "a group of settings", value)
    if "kind" not in value:
        raise ConfigError(f"{source}: {path}.kind is missing: {' or '.join(named)}")
    if not isinstance(value["kind"], str) or value["kind"] not in named:
        shown = _shown(value["kind"], str)
        raise ConfigError(f"{source}: {path}.kind {shown} is not known{nearest(shown, named)}")
    return value["kind"]


def _build_dataclass(kind: type, value: Any, path: str, source: str) -> Any:
    where = f"{path}." if path else ""
    if not isinstance(value, dict):
        raise _wrong(path or "the file", source, "a group of settings", value)
    hints = get_type_hints(kind)
    known = [key_of(field) for field in fields(kind)]
    for key in value:
        if key not in known:
            setting = _first_setting(f"{where}{_shown(key, str)}", value[key])
            raise ConfigError(f"{source}: {setting} is not a setting{unknown(setting, kind, where)}")
    required = [key_of(f) for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING]
    if missing := [name for name in required if name not in value]:
        raise ConfigError(f"{source}: {where}{missing[0]} is missing")
    built = {
        field.name: build(hints[field.name], value[key_of(field)], f"{where}{key_of(field)}", source)
        for field in fields(kind)
        if key_of(field) in value
    }
    try:
        return kind(**built)
    except ValueError as error:
        raise ConfigError(f"{source}: {where}{error}") from error


def key_of(field: Field) -> str:
    """A field's name in YAML; `from_` is spelt `from`, which Python keeps for itself."""
    return field.name.removesuffix("_")


def _build_scalar(kind: type, value: Any, path: str, source: str) -> Any:
    if kind is float and isinstance(value, str | int) and not isinstance(value, bool):
        value = _number(value)
    if kind is int and isinstance(value, str | float):
        number = _number(value)
        if isinstance(number, float) and number.is_integer():
            value = int(value) if isinstance(value, str) and value.strip("+-").isdecimal() else int(number)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise _wrong(path, source, SCALARS[kind], value)
    if kind is int and abs(value) >= MAX_WHOLE:
        raise _wrong(path, source, "a whole number below 2^63", value)
    return value


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (ValueError, OverflowError):
        return value


def _first_setting(path: str, value: Any) -> str:
    """The dotted key of the first setting inside the unknown group `path`."""
    while isinstance(value, dict) and value:
        key, value = next(iter(value.items()))
        path = f"{path}.{_shown(key, str)}"
    return path


def _wrong(path: str, source: str, expected: str, value: Any) -> ConfigError:
    return ConfigError(f"{source}: {path} must be {expected}, got {_shown(value)}")


def _shown(value: Any, form: Callable[[Any], str] = repr) -> str:
    try:
        shown = form(value)
    except (ValueError, RecursionError):  # a number of thousands of digits, lists in lists in lists
        return f"a {type(value).__name__} too long to show"
    return shown if len(shown) <= 60 else shown[:57] + "..."


def to_tree(config: Any) -> Any:
    """The plain dicts and lists of a dataclass, ready for YAML or JSON."""
    if is_dataclass(config):
        return {key_of(field): to_tree(getattr(config, field.name)) for field in fields(config)}
    return [to_tree(item) for item in config] if isinstance(config, tuple) else config


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} → {"a.b": 1}."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    flat = {}
    for name, branch in tree.items():
        flat |= flatten(branch, f"{prefix}.{name}".lstrip("."))
    return flat


def within(key: str, groups: Collection[str]) -> bool:
    """Whether the dotted `key` is one of `groups`, or in one of them."""
    return any(key == group or key.startswith(f"{group}.") for group in groups)


def shown(value: Any) -> str:
    """A plain value or list as YAML on one line, as it can be given to --set."""
    return yaml.safe_dump(to_tree(value), default_flow_style=True, allow_unicode=True, width=10**6).partition("\n")[0]
