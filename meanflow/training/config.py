"""The settings of a run: one frozen object from a recipe's YAML, checked as a whole."""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from dit import DiTConfig, IMFConfig
from meanflow.data import DataConfig, LatentsConfig
from meanflow.errors import ConfigError
from meanflow.guidance import GuidanceConfig, GuidanceInput
from meanflow.jvp import METHODS
from meanflow.objectives import Objective
from meanflow.training import settings
from unet import UNetConfig

RECIPES = Path(__file__).resolve().parents[2] / "recipes"
PRECISIONS = ("fp32", "tf32", "bf16")
AUTO = "auto"  # chosen for the machine
COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")  # of torch.compile
CHECKPOINTING = ("cheap", "blocks")  # norms, activation functions and dropout; or all but each block's input
OPTIMIZERS = ("adam", "radam")
EMA_STORES = ("device", "host")
UINT8_RULES = ("round", "floor")
WEIGHTS = "weights"  # in place of an EMA: the weights as the optimiser left them

# May differ when a run continues: how it is computed and evaluated, not what is learnt.
CHANGEABLE = (
    "description",
    "ema.eval",
    "ema.store",
    "model.resampling",
    "data.root",
    "data.path",  # the images' checksum is compared instead
    "data.cache",
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
# May differ too where --set asks for it: training goes on under other settings, as starts.jsonl then records.
CHANGEABLE_ON_REQUEST = (
    "optim.lr",
    "optim.warmup_steps",
    "optim.clip",
    "optim.weight_decay",
    "guidance.omega_prime",
    "guidance.kappa",
    "guidance.t_start",
    "guidance.t_end",
    "guidance.fade_from",
    "train.spike_guard",
    "ema.decays",
)


@dataclass(frozen=True)
class OptimConfig:
    """Adam or RAdam with a linear warm-up, then a constant rate (MeanFlow, appendix A)."""

    lr: float  # learning rate
    kind: str = "adam"  # adam, or radam: rectified Adam, whose first steps are small by themselves
    betas: tuple[float, float] = (0.9, 0.999)  # of Adam
    eps: float = 1e-8  # of Adam
    weight_decay: float = 0.0  # decoupled, as AdamW has it; 0 in the paper, where this is plain Adam
    warmup_steps: int = 0  # steps over which the rate rises linearly to lr
    clip: float | None = None  # largest norm of the gradient; null: not clipped

    def __post_init__(self):
        if self.kind not in OPTIMIZERS:
            raise ValueError(f"kind must be one of {', '.join(OPTIMIZERS)}, got {self.kind!r}")
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

    decays: tuple[float, ...] = (0.9999,)  # per step, of each average
    every: int = 1  # steps between updates, each with decay^every
    eval: float | None = None  # the average that is sampled and scored; null: the first
    store: str = "device"  # where they are kept; host: the CPU's memory, slower, where the GPU's is short

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
            raise ValueError(f"eval must be one of the decays, got {self.eval} (decays: {self.decays})")
        if self.store not in EMA_STORES:
            raise ValueError(f"store must be one of {', '.join(EMA_STORES)}, got {self.store!r}")


@dataclass(frozen=True)
class InitConfig:
    """What a new run's weights start from (fine-tuning): another run's, wherever names and shapes agree."""

    from_: str | None = None  # a run folder, a checkpoint, or an official DiT or SiT checkpoint; null: random weights
    ema: float | Literal["weights"] | None = None  # which of its averages, or weights; null: its own ema.eval
    teacher: Literal["sit", "dit"] | None = None  # whose an official one is; null: as its name says, or SiT's

    def __post_init__(self):
        if self.from_ is None and self.ema is not None:
            raise ValueError("ema names an average of init.from, which is null")
        if self.from_ is None and self.teacher is not None:
            raise ValueError("teacher says what init.from is, which is null")


@dataclass(frozen=True)
class TrainConfig:
    """How long to train, and how a step is computed."""

    batch: int  # images a step, over all processes
    steps: int  # optimiser steps in all
    microbatch: int | Literal["auto"] | None = AUTO  # images at once on a device; auto: what fits; null: all of them
    precision: str = "fp32"  # tf32: matrix products on tensor cores; bf16: autocast of the blocks
    tangent_precision: str | None = None  # of products in du/dt beside a more precise u: bf16; null: that of u
    jvp: str = "dual"  # how du/dt is computed: dual numbers; func: torch.func.jvp, any network, more memory
    activation_checkpointing: str | None = None  # computed again in the backward pass, not kept: cheap or blocks
    compile: str | None = AUTO  # mode of torch.compile for u and du/dt; auto: on GPUs, in long runs; null: eager
    deterministic: bool = False  # bit-equal runs on one machine, slower on GPUs
    check_every: int = 500  # steps between checks that weights and EMAs are finite and the same on every process
    spike_guard: float | None = None  # skip updates whose gradient norm is above this many times its mean; null: none

    def __post_init__(self):
        if self.batch < 1 or self.steps < 1:
            raise ValueError(f"batch and steps must be ≥ 1, got {self.batch} and {self.steps}")
        if isinstance(self.microbatch, int) and self.microbatch < 1:
            raise ValueError(f"microbatch must be ≥ 1, auto or null, got {self.microbatch}")
        if self.check_every < 1:
            raise ValueError(f"check_every must be ≥ 1, got {self.check_every}")
        if self.spike_guard is not None and self.spike_guard <= 1:
            raise ValueError(f"spike_guard must be > 1 or null, got {self.spike_guard}")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}")
        if self.tangent_precision not in (None, "bf16"):
            raise ValueError(f"tangent_precision must be null or bf16, got {self.tangent_precision!r}")
        if self.tangent_precision and (self.precision == "bf16" or self.jvp != "dual"):
            raise ValueError("tangent_precision=bf16 needs precision fp32 or tf32, and jvp dual")
        if self.jvp not in METHODS:
            raise ValueError(f"jvp must be one of {', '.join(METHODS)}, got {self.jvp!r}")
        if self.activation_checkpointing not in (None, *CHECKPOINTING):
            raise ValueError(
                f"activation_checkpointing must be null or one of {', '.join(CHECKPOINTING)}, "
                f"got {self.activation_checkpointing!r}"
            )
        if self.compile not in (None, AUTO, *COMPILE_MODES):
            raise ValueError(f"compile must be null or one of auto, {', '.join(COMPILE_MODES)}, got {self.compile!r}")

    @property
    def compile_mode(self) -> str | None:
        """The mode of torch.compile, None for eager steps and until `auto` has been decided (see compiling.py)."""
        return None if self.compile == AUTO else self.compile

    def images_at_once(self, local: int) -> int:
        """Of the `local` images of a process, all while `auto` has not been decided (see microbatch.py)."""
        return min(self.microbatch, local) if isinstance(self.microbatch, int) else local


@dataclass(frozen=True)
class CheckpointConfig:
    """When the state is saved, and which files are kept."""

    every: int = 1_000  # steps between checkpoints
    keep: int = 2  # how many of the newest are kept
    milestone_every: int | None = None  # steps; checkpoints at its multiples are never deleted; null: none

    def __post_init__(self):
        if self.every < 1 or self.keep < 1:
            raise ValueError("every and keep must be ≥ 1")
        if self.milestone_every is not None and (self.milestone_every < 1 or self.milestone_every % self.every):
            raise ValueError(f"milestone_every must be null or a multiple of every, got {self.milestone_every}")


@dataclass(frozen=True)
class LoggingConfig:
    """metrics.jsonl and what goes with it."""

    flush_every: int = 50  # steps between reads of a GPU's metrics; each waits for the device once
    tensorboard: bool = False  # write TensorBoard events to the run folder too; needs the package tensorboard
    wandb: bool = False  # log to Weights & Biases too; needs the package wandb, and wandb login or WANDB_MODE=offline

    def __post_init__(self):
        if self.flush_every < 1:
            raise ValueError(f"flush_every must be ≥ 1, got {self.flush_every}")

    @property
    def tracked(self) -> bool:
        """Whether anything but the run folder's own files is written (trackers.py)."""
        return self.tensorboard or self.wandb


@dataclass(frozen=True)
class SampleConfig:
    """The grid of samples at the end of a run, and how samples become images."""

    count: int = 100  # images
    columns: int = 10  # of the grid
    steps: int = 1  # network evaluations a sample (NFE)
    seed: int = 0  # of the noise
    uint8: str = "round"  # round: 127.5·x + 128 truncated (ImageNet release); floor: ⌊255·(x + 1)/2⌋ (CIFAR-10 release)
    guidance: float | None = None  # ω ≥ 1 of samples and scores, where it is an input of the network; null: 1, none
    interval: tuple[float, float] | None = None  # [t_min, t_max] in which it holds; null: all of [0, 1]

    def __post_init__(self):
        if min(self.count, self.columns, self.steps) < 1:
            raise ValueError("count, columns and steps must be ≥ 1")
        if self.seed < 0:
            raise ValueError("seed must be ≥ 0")
        if self.uint8 not in UINT8_RULES:
            raise ValueError(f"uint8 must be one of {', '.join(UINT8_RULES)}, got {self.uint8!r}")
        GuidanceInput(1.0 if self.guidance is None else self.guidance, self.interval or (0.0, 1.0))


@dataclass(frozen=True)
class EvalConfig:
    """How a run is scored, at its end and on the way; see eval/fid.py."""

    extractor: str = "inception-v3-compat"  # features; with this one the distance is FID (bash run.sh fid --help)
    reference: str | None = None  # statistics or images to compare with; null: the training set, unflipped
    samples: int = 50_000  # at the end of training
    steps: tuple[int, ...] = (1,)  # network evaluations a sample (NFE), each scored
    batch: int = 100  # images at once
    every: int | None = None  # training steps between evaluations; null: only at the end
    every_samples: int = 10_000  # samples of each evaluation on the way
    guidance: tuple[float, ...] = ()  # scales ω to compare at the end, see eval/sweep.py; empty: none are

    def __post_init__(self):
        if self.samples < 2 or self.every_samples < 2:
            raise ValueError("samples and every_samples must be ≥ 2")
        if self.batch < 1:
            raise ValueError("batch must be ≥ 1")
        if not self.steps or min(self.steps) < 1:
            raise ValueError(f"steps must be one or more numbers ≥ 1, got {self.steps}")
        if self.every is not None and self.every < 1:
            raise ValueError(f"every must be ≥ 1 or null, got {self.every}")
        for omega in self.guidance:
            GuidanceInput(omega)


@dataclass(frozen=True)
class RunConfig:
    """One complete run. Raises ValueError, naming the fields, where its parts contradict each other."""

    description: str  # a line for lists and reports
    model: UNetConfig | DiTConfig | IMFConfig
    data: DataConfig | LatentsConfig
    objective: Objective
    optim: OptimConfig
    train: TrainConfig
    seed: int = 0  # of the initial weights, batches, noise and times
    init: InitConfig = InitConfig()
    guidance: GuidanceConfig | None = None  # null: no guidance, labels are never dropped
    ema: EmaConfig = EmaConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    logging: LoggingConfig = LoggingConfig()
    sample: SampleConfig = SampleConfig()
    eval: EvalConfig = EvalConfig()

    def __post_init__(self):
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be in [0, 2^63), got {self.seed}")
        if self.train.compile_mode and self.train.activation_checkpointing == "blocks":
            raise ValueError(
                "train.activation_checkpointing=blocks has no effect in a compiled graph: "
                "set train.activation_checkpointing=null or train.compile=null"
            )
        if self.train.activation_checkpointing and self.train.jvp != "dual":
            raise ValueError("train.activation_checkpointing does not work with torch.func: set train.jvp=dual")
        if self.train.compile_mode and self.train.jvp == "func" and self.objective.varying_rows:
            raise ValueError(
                "train.compile with train.jvp=func needs the same number of r ≠ t in each step: "
                "set objective.times.sampler=v0 objective.times.stratified=true, or train.jvp=dual"
            )
        if self.guidance is not None and not self.model.classes:
            raise ValueError("guidance needs classes: set model.classes to their number, or guidance=null")
        kind = self.objective.kind
        if self.guidance is not None and self.guidance.terms and not self.objective.learns_velocity:
            raise ValueError(
                f"objective.kind={kind} does not learn u(z, t, t), which guidance evaluates: "
                "set guidance.omega_prime=1 guidance.kappa=0, or guidance=null"
            )
        if self.train.compile_mode and self.objective.same_dropout and getattr(self.model, "dropout", 0):
            raise ValueError(
                f"objective.kind={kind} needs the same dropout mask in two passes, which train.compile does not "
                "promise: set train.compile=null or model.dropout=0"
            )
        if self.train.tangent_precision and not self.objective.needs_jvp:
            raise ValueError(f"train.tangent_precision has no effect: objective.kind={kind} takes no derivative")
        self.objective.check_network(self.model.guidance_inputs, self.model.branches, self.model.classes)
        if self.objective.omega_range is not None and self.guidance is not None:
            raise ValueError(
                "guidance is a fixed scale in the target, but this objective trains with the scale as an input of the "
                "network: set guidance=null"
            )
        chosen = self.sample.guidance, self.sample.interval, self.eval.guidance or None
        if self.objective.omega_range is None and any(value is not None for value in chosen):
            raise ValueError(
                "sample.guidance, sample.interval and eval.guidance need an objective that trains with guidance as an "
                "input of the network: set them to null, null and []"
            )
        teacher = self.objective.teacher_decay
        if teacher is not None and (teacher not in self.ema.decays or self.ema.store != "device"):
            raise ValueError(
                f"objective.kind={kind} learns from the average {teacher}: "
                f"ema.decays must contain it, and ema.store must be device"
            )
        given = self.data.augment_labels if isinstance(self.data, DataConfig) else 0
        if self.augment_labels != given:
            raise ValueError(
                f"model.augment_labels is {self.augment_labels}, but data.augment_p and data.flip give {given} labels: "
                f"set model.augment_labels={given}"
            )

    @property
    def z_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of what the network takes and makes."""
        return self.model.channels, self.model.image_size, self.model.image_size

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that a sample becomes: decoded, where the network works on latents."""
        if isinstance(self.data, LatentsConfig):
            return self.data.image_channels, self.data.image_size, self.data.image_size
        return self.z_shape

    @property
    def augment_labels(self) -> int:
        """Width of the network's augmentation-label input; the others have none."""
        return self.model.augment_labels if isinstance(self.model, UNetConfig) else 0


def load_config(path: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe, or the run folder's config.yaml, at `path` with `--set` overrides applied. Raises ConfigError.

    The `base` of a recipe is one beside it, or one of `recipes/`.
    """
    return settings.load(RunConfig, path, overrides, upgraded, RECIPES)


def config_from_tree(tree: Any, source: str) -> RunConfig:
    """The config stored in a checkpoint. Raises ConfigError."""
    return settings.build(RunConfig, upgraded(tree), "", source)


def upgraded(tree: Any) -> Any:
    """The tree of a recipe or run of an earlier version in today's layout; others are returned unchanged.

    A setting that is newer than a run is absent from its config.yaml and takes its default, so a default must be what
    runs did before the setting existed. Where that is not the best value for new runs, the recipes say so.
    """
    if not isinstance(tree, dict):
        return tree
    if isinstance(tree.get("train"), dict) and isinstance(tree["train"].get("activation_checkpointing"), bool):
        how = "blocks" if tree["train"]["activation_checkpointing"] else None
        tree = tree | {"train": tree["train"] | {"activation_checkpointing": how}}
    if not {"times", "loss"} <= tree.keys():
        return tree
    if not all(isinstance(tree.get(key), dict) for key in ("times", "loss", "train")):
        return tree  # `build` raises the error
    times, loss, train = dict(tree["times"]), dict(tree["loss"]), dict(tree["train"])
    if "share" in times:
        times["stratified"] = times.pop("share") != "per_sample"
    if "jvp" in loss:
        train["jvp"] = loss.pop("jvp")
    new = {"objective": {"kind": "meanflow", "times": times, **loss}, "train": train}
    if isinstance(tree.get("guidance"), dict):
        guidance = new["guidance"] = {key: value for key, value in tree["guidance"].items() if key != "omega"}
        if "dropped" in guidance:  # omega is (1 − κ) ω′
            rows = {"official": "r_eq_t_first", "independent": "any"}
            dropped = guidance.pop("dropped")
            guidance["unconditional_rows"] = rows.get(dropped, dropped) if isinstance(dropped, str) else dropped
    return {key: value for key, value in tree.items() if key not in ("times", "loss")} | new


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
    differing = {key: pair for key, pair in changes(old, new).items() if not settings.within(key, CHANGEABLE)}
    on_request = {key for key in differing if settings.within(key, CHANGEABLE_ON_REQUEST)}
    if not set(old.ema.decays) <= set(new.ema.decays):  # averages may be added, not dropped
        on_request.discard("ema.decays")
    refused = {key: pair for key, pair in differing.items() if key not in on_request or key not in requested}
    if not refused:
        return
    where = shlex.quote(where)
    before, now = (" ".join(_assignment(key, pair[k]) for key, pair in refused.items()) for k in (0, 1))
    if on_request >= refused.keys():
        ways = f", or repeat --set {before}. To change it from here on: --set {now}"
    else:
        ways = ". These settings make another run: for a new one give another --out"
        if not any(settings.within(key, ["model"]) for key in refused.keys() - {"model.dropout"}):  # else nothing fits
            ways += (
                f"; --set init.from={where} starts it from this one's averaged weights, with init.ema=weights from its "
                "last ones"
            )
    listed = "; ".join(
        f"{key} is {settings.shown(a)} there, {settings.shown(b)} now" for key, (a, b) in refused.items()
    )
    raise ConfigError(
        f"{where} holds a run with other settings: {listed}. To continue it: bash run.sh resume {where}{ways}"
    )


def _assignment(key: str, value: Any) -> str:
    """In a form that can be pasted after --set."""
    return shlex.quote(f"{key}={settings.shown(value)}")
