"""A run in one frozen object: what a recipe's YAML spells, checked as a whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dit import DiTConfig
from meanflow.data import DataConfig, LatentsConfig
from meanflow.errors import ConfigError
from meanflow.guidance import GuidanceConfig
from meanflow.objective import LossConfig
from meanflow.times import TimesConfig
from meanflow.training import settings
from unet import UNetConfig

PRECISIONS = ("fp32", "tf32", "bf16")
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
EMA_STORES = ("device", "host")

# What may differ when a run continues: how it is run and judged, never what is learnt.
CHANGEABLE = (
    "description",
    "ema.eval",
    "ema.store",
    "loss.jvp",
    "data.root",
    "data.path",  # the images' fingerprint is compared instead
    "data.images",
    "data.latents",
    "data.decode_precision",
    "data.decode_batch",
    "train.steps",
    "train.microbatch",
    "train.activation_checkpointing",
    "train.compile",
    "train.check_every",
    "checkpoint",
    "logging",
    "sample",
    "eval",
)


@dataclass(frozen=True)
class OptimConfig:
    """Adam with a linear warm-up, then a constant rate (MeanFlow, appendix A)."""

    lr: float
    betas: tuple[float, float]
    eps: float
    weight_decay: float  # decoupled; 0 in the paper, where this is plain Adam
    warmup_steps: int  # the rate rises linearly to lr over these
    clip: float | None  # largest norm of the gradient, null for none

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

    decays: tuple[float, ...]  # per step
    every: int  # applied every so many steps, with decay^every
    eval: float  # the one that counts
    store: str  # device, or host: the computer's memory, where the device's is short (slower)

    def __post_init__(self):
        if not self.decays or not all(0 <= decay < 1 for decay in self.decays):
            raise ValueError(f"decays must be one or more numbers in [0, 1), got {self.decays}")
        if len(set(self.decays)) < len(self.decays):
            raise ValueError(f"decays repeats a value: {self.decays}")
        if self.every < 1:
            raise ValueError(f"every must be ≥ 1, got {self.every}")
        if self.eval not in self.decays:
            raise ValueError(f"eval must be one of decays {self.decays}, got {self.eval}")
        if self.store not in EMA_STORES:
            raise ValueError(f"store must be one of {', '.join(EMA_STORES)}, got {self.store!r}")


@dataclass(frozen=True)
class InitConfig:
    """What a new run's weights start from (fine-tuning): another run's average, wherever names and shapes agree."""

    from_: str | None  # a run folder or a checkpoint of it; null: freshly initialised
    ema: float | None  # which of its averages; null: the one that its own recipe evaluates

    def __post_init__(self):
        if self.from_ is None and self.ema is not None:
            raise ValueError("ema names an average of init.from, which is null")


@dataclass(frozen=True)
class TrainConfig:
    batch: int  # images a step, over all processes
    microbatch: int | None  # images at once on one device (null: all of its share); the rest by accumulation
    steps: int
    precision: str  # fp32, tf32 (matrix products on tensor cores) or bf16 (autocast of the blocks)
    activation_checkpointing: bool  # keep only each block's input, compute it again in the backward pass
    compile: str | None  # mode of torch.compile for u and du/dt together, minutes at the start; null: eager
    deterministic: bool  # bit-equal runs on one machine, slower on GPUs
    check_every: int  # steps between checks that weights and EMAs are finite and the same on every process
    spike_guard: float | None  # leave out updates whose gradient norm is above so many times its mean; null: never

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
        if self.compile not in (None, *COMPILE_MODES):
            raise ValueError(f"compile must be null or one of {', '.join(COMPILE_MODES)}, got {self.compile!r}")


@dataclass(frozen=True)
class CheckpointConfig:
    every: int  # steps
    keep: int  # newest ones kept
    milestone_every: int | None  # steps; checkpoints at its multiples are kept for good

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be ≥ 1")
        if self.milestone_every is not None and (self.milestone_every < 1 or self.milestone_every % self.every):
            raise ValueError(f"milestone_every must be null or a multiple of every = {self.every}")


@dataclass(frozen=True)
class LoggingConfig:
    flush_every: int  # steps between reads of the device's metrics; each read waits for the device once
    tensorboard: bool  # events in the run folder too; needs the package tensorboard

    def __post_init__(self):
        if self.flush_every < 1:
            raise ValueError(f"flush_every must be ≥ 1, got {self.flush_every}")


@dataclass(frozen=True)
class SampleConfig:
    """The grid of samples at the end of a run."""

    count: int
    columns: int
    steps: int  # NFE
    seed: int

    def __post_init__(self):
        if min(self.count, self.columns, self.steps) < 1 or self.seed < 0:
            raise ValueError("count, columns and steps must be ≥ 1 and seed ≥ 0")


@dataclass(frozen=True)
class EvalConfig:
    """How a run is scored: see eval/fid.py."""

    extractor: str  # inception-v3-compat (then the distance is FID) or another registered name
    reference: str | None  # statistics or images to compare with; null: the training set, unflipped
    samples: int
    steps: tuple[int, ...]  # NFE, each scored
    batch: int
    every: int | None  # steps between evaluations during training, null for none
    every_samples: int  # samples of each of those

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
    seed: int
    model: UNetConfig | DiTConfig
    init: InitConfig
    data: DataConfig | LatentsConfig
    times: TimesConfig
    loss: LossConfig
    guidance: GuidanceConfig | None  # null: trained without, labels are never dropped
    optim: OptimConfig
    ema: EmaConfig
    train: TrainConfig
    checkpoint: CheckpointConfig
    logging: LoggingConfig
    sample: SampleConfig
    eval: EvalConfig

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.train.compile and self.train.activation_checkpointing and self.loss.jvp == "dual":
            raise ValueError(
                "train.activation_checkpointing is lost in a compiled graph: set it to false, or train.compile to null"
            )
        if self.train.activation_checkpointing and self.loss.jvp != "dual":
            raise ValueError("train.activation_checkpointing: torch.func has no such thing; set loss.jvp to dual")
        if self.train.compile and self.loss.jvp == "func" and self.times.varies:
            raise ValueError(
                "train.compile with loss.jvp: func needs the same number of r ≠ t in each step: "
                "set times.sampler to v0 and times.share to exact, or loss.jvp to dual"
            )
        if self.guidance is not None and not self.model.classes:
            raise ValueError("guidance needs classes: set model.classes, or guidance to null")
        given = self.data.augment_labels if isinstance(self.data, DataConfig) else 0
        if self.augment_labels != given:
            raise ValueError(
                f"model.augment_labels is {self.augment_labels}, but data.augment_p and data.flip give {given} labels: "
                "make them agree"
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
    """The recipe at `path` with `--set` overrides applied. Raises ConfigError."""
    return settings.load(RunConfig, path, overrides)


def config_from_tree(tree: Any, source: str) -> RunConfig:
    """The config stored in a checkpoint. Raises ConfigError."""
    return settings.build(RunConfig, tree, "", source)


def config_to_yaml(config: Any) -> str:
    return yaml.safe_dump(settings.to_tree(config), sort_keys=False, allow_unicode=True, width=110)


def changes(old: RunConfig, new: RunConfig) -> dict[str, tuple[Any, Any]]:
    """{dotted key: (old value, new value)} for all that differs."""
    a, b = settings.flatten(settings.to_tree(old)), settings.flatten(settings.to_tree(new))
    return {key: (a.get(key), b.get(key)) for key in {**a, **b} if a.get(key) != b.get(key)}


def refuse_changed_run(old: RunConfig, new: RunConfig, where: str) -> None:
    """Raises ConfigError, saying what differs, if `new` would make another run of `old`."""
    differing = {
        key: pair
        for key, pair in changes(old, new).items()
        if not any(key == allowed or key.startswith(f"{allowed}.") for allowed in CHANGEABLE)
    }
    if differing:
        listed = "; ".join(f"{key} is {a!r} there, {b!r} now" for key, (a, b) in differing.items())
        raise ConfigError(f"{where} holds a run with other settings: {listed}. Repeat its --set, or give another --out")
