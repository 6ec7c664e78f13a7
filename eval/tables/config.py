"""Tables as data: a YAML of recipes/tables/ names a recipe, the rows' changes to it, and the paper's values."""

from dataclasses import dataclass, replace
from pathlib import Path

from eval.tables import SCALES
from meanflow.errors import ConfigError, UserError
from meanflow.training import settings
from meanflow.training.config import RECIPES, RunConfig, load_config


@dataclass(frozen=True)
class RowConfig:
    """One row: its name in the table, its run folder's name, the paper's figures, and `key.path=value` changes.

    Rows of several tables that name one folder are one run; `paper` has a value for each of the table's `paper.nfe`.
    """

    name: str
    folder: str
    paper: tuple[float | None, ...] = ()
    set: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.folder or Path(self.folder).name != self.folder:
            raise ValueError(f"folder must be a plain name, got {self.folder!r}")


@dataclass(frozen=True)
class PaperConfig:
    """Which figures of the paper the rows quote: their metric, and with how many network evaluations (NFE)."""

    metric: str
    nfe: tuple[int, ...]


@dataclass(frozen=True)
class ScaleConfig:
    """What a row trains at one scale: full (the paper's), gpu (one card, an hour a table), cpu (two cores, minutes)."""

    base: str  # a recipe's name; {folder} is replaced by the row's
    set: tuple[str, ...] = ()  # changes to it, before the row's
    each: tuple[tuple[str, ...], ...] | None = None  # further changes, a list for each row, after the row's
    seeds: tuple[int, ...] = (0,)
    classifier: bool = False  # also judge samples by a classifier (small images; see eval/scoring/classifier.py)
    note: str | None = None  # what a run of this scale can and cannot show

    def __post_init__(self):
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds must be one or more numbers ≥ 0, each once, got {self.seeds}")


@dataclass(frozen=True)
class TableConfig:
    """What a table compares. Raises ValueError where its parts do not fit together."""

    description: str
    question: str  # that it answers
    parameter: str  # what the rows differ in: the head of the first column
    rows: tuple[RowConfig, ...]
    paper: PaperConfig | None = None
    milestones: bool = False  # also score the checkpoints that checkpoint.milestone_every keeps along each run
    full: ScaleConfig | None = None
    gpu: ScaleConfig | None = None
    cpu: ScaleConfig | None = None

    def __post_init__(self):
        folders = [row.folder for row in self.rows]
        if not folders or len(set(folders)) < len(folders):
            raise ValueError(f"rows must be one or more, each with another folder, got {folders}")
        if not self.scales:
            raise ValueError(f"one or more of {', '.join(SCALES)} must be a group of settings")
        quoted = len(self.paper.nfe) if self.paper else 0
        if wrong := [row.name for row in self.rows if len(row.paper) != quoted]:
            raise ValueError(f"paper must have {quoted} value(s) in every row, for paper.nfe; see {wrong[0]}")
        for name, scale in self.scales.items():
            if scale.each is not None and len(scale.each) != len(self.rows):
                raise ValueError(f"{name}.each must be null or have a list for each of the {len(self.rows)} rows")

    @property
    def scales(self) -> dict[str, ScaleConfig]:
        return {name: scale for name in SCALES if (scale := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Run:
    """One row with one seed: the recipe that it is, where that comes from, and its run folder's name."""

    row: RowConfig
    seed: int
    recipe: RunConfig
    changes: str  # the base recipe's name and what was set, to be read

    @property
    def folder(self) -> str:
        return f"{self.row.folder}-seed{self.seed}"


@dataclass(frozen=True)
class Table:
    """A table at one scale, with the runs chosen."""

    name: str
    config: TableConfig
    scale: str
    changes: tuple[str, ...]  # --set, in every row
    runs: tuple[Run, ...]

    @property
    def settings(self) -> ScaleConfig:
        return self.config.scales[self.scale]

    @property
    def rows(self) -> tuple[RowConfig, ...]:
        return tuple(dict.fromkeys(run.row for run in self.runs))


def load_table(
    path: Path,
    scale: str | None = None,
    rows: str | None = None,
    seeds: str | None = None,
    changes: tuple[str, ...] | list[str] = (),
) -> Table:
    """The table at `scale` (None: full, or the first that it has), each run with its recipe.

    `rows`: numbers or folders, comma-separated, None for all; `seeds`: numbers; `changes`: --set for every row.
    Raises ConfigError (the file, a recipe, a setting) or UserError (what was asked for is not there).
    """
    config = settings.build(TableConfig, settings.read_yaml(path), "", str(path))
    scale = scale or next(iter(config.scales))
    if scale not in config.scales:
        raise UserError(f"--scale {scale}: {path.stem} has {', '.join(config.scales)}")
    chosen = config.scales[scale]
    numbers = chosen.seeds if seeds is None else _seeds(seeds)
    runs = []
    for k in _rows(rows, config.rows):
        row = config.rows[k]
        base = RECIPES / f"{chosen.base.replace('{folder}', row.folder)}.yaml"
        if not base.exists():
            raise ConfigError(f"{path}: {scale}.base {base.stem} is not a recipe")
        each = chosen.each[k] if chosen.each else ()
        sets = [*chosen.set, *row.set, *each, *changes]
        if any(change.partition("=")[0].strip() == "seed" for change in sets):
            raise ConfigError(f"{path}: seed is set by seeds, or --seeds")
        recipe = load_config(base, sets)
        if config.milestones and recipe.checkpoint.milestone_every is None:
            raise ConfigError(f"{path}: milestones need checkpoint.milestone_every, which is null in {base.stem}")
        runs += [Run(row, seed, replace(recipe, seed=seed), " ".join([base.stem, *sets])) for seed in numbers]
    return Table(path.stem, config, scale, tuple(changes), tuple(runs))


def _seeds(text: str) -> tuple[int, ...]:
    parts = text.split(",")
    if not all(part.isdecimal() and len(part) < 10 for part in parts) or len(set(map(int, parts))) < len(parts):
        raise UserError(f"--seeds {text}: expected whole numbers, each once, comma-separated")
    return tuple(map(int, parts))


def _rows(text: str | None, rows: tuple[RowConfig, ...]) -> list[int]:
    if text is None:
        return list(range(len(rows)))
    known = {key: k for k, row in enumerate(rows) for key in (str(k + 1), row.folder)}
    asked = text.split(",")
    if unknown := [name for name in asked if name not in known]:
        raise UserError(f"--rows {unknown[0]}: the rows are {', '.join(known)}")
    return list(dict.fromkeys(known[name] for name in asked))
