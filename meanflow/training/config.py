"""A run in one frozen object: what a recipe's YAML spells, checked as a whole."""

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dit import DiTConfig
from meanflow.data import DataConfig, LatentsConfig
from meanflow.errors import ConfigError
from meanflow.guidance import GuidanceConfig
from meanflow.jvp import METHODS
from meanflow.objectives import Objective
from meanflow.training import settings
from unet import UNetConfig

PRECISIONS = ("fp32", "tf32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
EMA_STORES = ("device", "host")

UINT8_RULES = ("round", "floor")
WEIGHTS = "weights"  # in place of an EMA: the weights as the optimiser left them

# What may differ when a run continues without saying more: how it is run and judged, never what is learnt.
CHANGEABLE = (
    "description",
    "ema.eval",
    "ema.store",
    "data.root",
    "data.path",  # the images' fingerprint is compared instead
    "data.images",
    "data.latents",
    "data.decode_precision",
    "data.decode_batch",
    "train.steps",
    "train.microbatch",
    "train.jvp",
    "train.activation_checkpointing",
    "train.compile",
    "train.check_every",
    "checkpoint",
    "logging",
    "sample",
    "eval",
)
# What may differ besides, where it is asked for: learning goes on under other settings. Noted in starts.jsonl, and
# marked in the curves.
CHANGEABLE_ON_REQUEST = (
    "optim.lr",
    "optim.warmup_steps",
    "optim.clip",
    "optim.weight_decay",
    "guidance.omega_prime",
    "guidance.kappa",
    "guidance.t_start",
    "guidance.t_end",
    "train.spike_guard",
    "ema.decays",
)


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a linear warm-up, then a constant rate (MeanFlow, appendix A)."""

    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0  # decoupled; 0 in the paper, where this is plain Adam
    warmup_steps: int = 0  # the rate rises linearly to lr over these
    clip: float | None = None  # largest norm of the gradient, null for none

    def __post_init__(self):
        if self.lr <= 0 or self.eps <= 0:
            raise ValueError(f"lr and eps must be > 0, got {self.lr} and {self.eps}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas must be in [0, 1), got {self.betas}")
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise ValueError("weight_decay and warmup_steps must be ≥ 0")
        if self.clip is not None and self.clip <= 0:
            raise ValueError(f"clip must be > 0 or null, got {self.clip}")


@dataclass(frozen=True)
class EmaConfig:
    """Exponential moving averages of the weights, side by side."""

    decays: tuple[float, ...] = (0.9999,)  # per step
    every: int = 1  # applied every so many steps, with decay^every
    eval: float | None = None  # the one that samples and scores; null: the first
    store: str = "device"  # device, or host: the computer's memory, where the device's is short (slower)

    def __post_init__(self):
        if not self.decays or not all(0 <= decay < 1 for decay in self.decays):
            raise ValueError(f"decays must be one or more numbers in [0, 1), got {self.decays}")
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"decays repeats a value: {self.decays}")
        if self.every < 1:
            raise ValueError(f"every must be ≥ 1, got {self.every}")
        if self.eval is None:
            object.__setattr__(self, "eval", self.decays[0])
        if self.eval not in self.decays:
            raise ValueError(f"eval must be one of decays {self.decays}, got {self.eval}")
        if self.store not in EMA_STORES:
            raise ValueError(f"store must be one of {', '.join(EMA_STORES)}, got {self.store!r}")


@dataclass(frozen=True)
class InitConfig:
    """What a new run's weights start from (fine-tuning): another run's average, wherever names and shapes agree."""

    from_: str | None = None  # a run folder or a checkpoint of it; null: freshly initialised
    ema: float | Literal["weights"] | None = None  # which of its averages; null: the one that its own recipe evaluates

    def __post_init__(self):
        if self.from_ is None and self.ema is not None:
            raise ValueError("ema names an average of init.from, which is null")


@dataclass(frozen=True)
class TrainConfig:
    batch: int  # images a step, over all processes
    steps: int
    microbatch: int | None = None  # images at once on one device (null: all of its share); the rest by accumulation
    precision: str = "fp32"  # fp32, tf32 (matrix products on tensor cores) or bf16 (autocast of the blocks)
    jvp: str = "dual"  # how derivatives are taken: dual, or func (any network, more memory); see meanflow/jvp.py
    activation_checkpointing: bool = False  # keep only each block's input, compute it again in the backward pass
    compile: str | None = None  # mode of torch.compile for u and du/dt together, minutes at the start; null: eager
    deterministic: bool = False  # bit-equal runs on one machine, slower on GPUs
    check_every: int = 500  # steps between checks that weights and EMAs are finite and the same on every process
    spike_guard: float | None = (
        None  # leave out updates whose gradient norm is above so many times its mean; null: never
    )

    def __post_init__(self):
        if self.batch < 1 or self.steps < 1:
            raise ValueError(f"batch and steps must be ≥ 1, got {self.batch} and {self.steps}")
        if self.microbatch is not None and self.microbatch < 1:
            raise ValueError(f"microbatch must be ≥ 1 or null, got {self.microbatch}")
        if self.check_every < 1:
            raise ValueError(f"check_every must be ≥ 1, got {self.check_every}")
        if self.spike_guard is not None and self.spike_guard <= 1:
            raise ValueError(f"spike_guard must be > 1 or null, got {self.spike_guard}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {PRECISIONS}, got {self.precision!r}")
        if self.jvp not in METHODS:
            raise ValueError(f"jvp must be one of {', '.join(METHODS)}, got {self.jvp!r}")
        if self.compile not in (None, *COMPILE_MODES):
            raise ValueError(f"compile must be null or one of {', '.join(COMPILE_MODES)}, got {self.compile!r}")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 1_000  # steps
    keep: int = 2  # newest ones kept
    milestone_every: int | None = None  # steps; checkpoints at its multiples are kept for good

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be ≥ 1")
        if self.milestone_every is not None and (self.milestone_every < 1 or self.milestone_every % self.every):
            raise ValueError(f"milestone_every must be null or a multiple of every = {self.every}")


@dataclass(frozen=True)
class LoggingConfig:
    flush_every: int = 50  # steps between reads of the device's metrics; each read waits for the device once
    tensorboard: bool = False  # events in the run folder too; needs the package tensorboard

    def __post_init__(self):
        if self.flush_every < 1:
            raise ValueError(f"flush_every must be ≥ 1, got {self.flush_every}")


@dataclass(frozen=True)
class SampleConfig:
    """The grid of samples at the end of a run, and how samples become images."""

    count: int = 100
    columns: int = 10
    steps: int = 1  # NFE
    seed: int = 0
    uint8: str = "round"  # round: 127.5·x + 128 truncated (ImageNet release); floor: ⌊255·(x + 1)/2⌋ (CIFAR-10 release)

    def __post_init__(self):
        if min(self.count, self.columns, self.steps) < 1 or self.seed < 0:
            raise ValueError("count, columns and steps must be ≥ 1 and seed ≥ 0")
        if self.uint8 not in UINT8_RULES:
            raise ValueError(f"uint8 must be one of {', '.join(UINT8_RULES)}, got {self.uint8!r}")


@dataclass(frozen=True)
class EvalConfig:
    """How a run is scored: see eval/fid.py."""

    extractor: str = "inception-v3-compat"  # then the distance is FID; or another registered name
    reference: str | None = None  # statistics or images to compare with; null: the training set, unflipped
    samples: int = 50_000
    steps: tuple[int, ...] = (1,)  # NFE, each scored
    batch: int = 100
    every: int | None = None  # steps between evaluations during training, null for none
    every_samples: int = 10_000  # samples of each of those

    def __post_init__(self):
        if self.samples < 2 or self.batch < 1 or self.every_samples < 2:
            raise ValueError("samples and every_samples must be ≥ 2 and batch ≥ 1")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be one or more numbers ≥ 1, got {self.steps}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be ≥ 1 or null, got {self.every}")


@dataclass(frozen=True)
class RunConfig:
    """One complete run. Raises ValueError, naming the fields, where its parts contradict each other."""

    description: str
    model: UNetConfig | DiTConfig
    data: DataConfig | LatentsConfig
    objective: Objective
    optim: OptimConfig
    train: TrainConfig
    seed: int = 0
    init: InitConfig = InitConfig()
    guidance: GuidanceConfig | None = None  # null: trained without, labels are never dropped
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.train.compile and self.train.activation_checkpointing and self.train.jvp == "dual":
            raise ValueError(
                "train.activation_checkpointing is lost in a compiled graph: set it to false, or train.compile to null"
            )
        if self.train.activation_checkpointing and self.train.jvp != "dual":
            raise ValueError("train.activation_checkpointing: torch.func has no such thing; set train.jvp to dual")
        if self.train.compile and self.train.jvp == "func" and self.objective.varying_rows:
            raise ValueError(
                "train.compile with train.jvp: func needs the same number of r ≠ t in each step: "
                "set objective.times.sampler to v0 and objective.times.stratified to true, or train.jvp to dual"
            )
        if self.guidance is not None and not self.model.classes:
            raise ValueError("guidance needs classes: set model.classes, or guidance to null")
        teacher = self.objective.teacher_decay
        if teacher is not None and (teacher not in self.ema.decays or self.ema.store != "device"):
            raise ValueError(
                f"ema.decays must have {teacher}, the teacher of objective.kind {self.objective.kind}, "
                "and ema.store must be device"
            )
        given = self.data.augment_labels if isinstance(self.data, DataConfig) else 0
        if self.augment_labels != given:
            raise ValueError(
                f"model.augment_labels is {self.augment_labels}, but data.augment_p and data.flip give {given} labels: "
                f"set model.augment_labels to {given}"
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that a sample becomes: decoded, where the network works on latents."""
        if isinstance(self.data, LatentsConfig):
            return self.data.image_channels, self.data.image_size, self.data.image_size
        return self.model.channels, self.model.image_size, self.model.image_size

    @property
    def augment_labels(self) -> int:
        """Width of the network's augmentation-label input; a DiT has none."""
        return self.model.augment_labels if isinstance(self.model, UNetConfig) else 0


def load_config(path: Path, overrides: list[str] = ()) -> RunConfig:
    """The recipe, or the run folder's config.yaml, at `path` with `--set` overrides applied. Raises ConfigError."""
    return settings.load(RunConfig, path, overrides, upgraded)


def config_from_tree(tree: Any, source: str) -> RunConfig:
    """The config stored in a checkpoint. Raises ConfigError."""
    return settings.build(RunConfig, upgraded(tree), "", source)


def upgraded(tree: Any) -> Any:
    """The tree of a recipe or run of an earlier version in today's layout; others as they are.

    A setting that is newer than a run is absent from its config.yaml and takes its default, so a default must be what
    runs did before the setting existed. Where that is not the best value for new runs, the recipes say so.
    """
    if not isinstance(tree, dict) or not {"times", "loss"} <= tree.keys():
        return tree
    times, loss, train, init, guidance = (_group(tree, key) for key in ("times", "loss", "train", "init", "guidance"))
    if "share" in times:
        times["stratified"] = times.pop("share") != "per_sample"
    if "jvp" in loss:
        train["jvp"] = loss.pop("jvp")
    if guidance:
        guidance.pop("omega", None)  # (1 − κ) ω′
        rows = {"official": "r_eq_t_first", "independent": "any"}
        if "dropped" in guidance:
            guidance["unconditional_rows"] = rows.get(guidance["dropped"], guidance["dropped"])
            del guidance["dropped"]
    objective = {"kind": "meanflow", "times": times, **loss}
    new = {"objective": objective, "train": train, "init": init, "guidance": guidance or None}
    return {key: value for key, value in tree.items() if key not in ("times", "loss")} | new


def _group(tree: dict[str, Any], key: str) -> dict[str, Any]:
    return dict(tree[key]) if isinstance(tree.get(key), dict) else {}


def config_to_yaml(config: Any) -> str:
    return yaml.safe_dump(settings.to_tree(config), sort_keys=False, allow_unicode=True, width=110)


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} for all that differs."""
    a, b = settings.flatten(settings.to_tree(old)), settings.flatten(settings.to_tree(new))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def refuse_changed_run(old: RunConfig, new: RunConfig, where: str, requested: Collection[str] = ()) -> None:
    """Raises ConfigError, saying what differs and what to do, if `new` would make another run of `old`.

    requested: dotted keys that were given by --set; of these, `CHANGEABLE_ON_REQUEST` may differ.
    """
    differing = {key: pair for key, pair in changes(old, new).items() if not _within(key, CHANGEABLE)}
    refused = {
        key: pair for key, pair in differing.items() if key not in requested or not _within(key, CHANGEABLE_ON_REQUEST)
    }
    if "ema.decays" in differing and not set(old.ema.decays) <= set(new.ema.decays):
        refused["ema.decays"] = differing["ema.decays"]  # averages may be added, not lost
    if not refused:
        return
    listed = "; ".join(f"{key} is {_shown(a)} there, {_shown(b)} now" for key, (a, b) in refused.items())
    on_request = all(_within(key, CHANGEABLE_ON_REQUEST) for key in refused)
    ways = (
        "Repeat its --set, give another --out, or go on under the new settings with "
        + " ".join(f"--set {key}={_shown(b)}" for key, (_, b) in refused.items())
        if on_request and "ema.decays" not in refused
        else f"Repeat its --set, or give another --out; a new run may begin with its weights: --set init.from={where}"
    )
    raise ConfigError(f"{where} holds a run with other settings: {listed}. {ways}")


def _within(key: str, allowed: Collection[str]) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in allowed)


def _shown(value: Any) -> str:
    """As it can be typed behind --set."""
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value).replace(" ", "")
