"""The state of a run: weights, averages, optimiser; how it is initialised, saved and restored."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit import IMF, DiT, DiTConfig, IMFConfig
from meanflow.errors import AssetError, ConfigError, write_errors_named
from meanflow.random import derive_seed
from meanflow.training import settings
from meanflow.training.checkpoint import FORMAT, Checkpoint
from meanflow.training.config import WEIGHTS, EmaConfig, InitConfig, OptimConfig, RunConfig, config_from_tree
from meanflow.training.divergence import Guard
from meanflow.training.official.dit import Teacher, read_teacher
from meanflow.training.radam import RAdam
from meanflow.training.run_folder import environment, find_checkpoint
from meanflow.training.shared import is_hub_name
from unet import UNet, UNetConfig

NAMES_SHOWN = 4
BACKBONES = {UNetConfig: UNet, DiTConfig: DiT, IMFConfig: IMF}


@dataclass
class TrainState:
    """After `step` optimiser steps. Random numbers are functions of (seed, step), so this is the whole state."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: "Ema"
    guard: Guard
    step: int = 0
    seconds: float = 0.0

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """Weights and averages, by name."""
        averages = {f"EMA {decay}": average for decay, average in self.ema.averages.items()}
        return {"weights": dict(self.network.named_parameters()), **averages}


def fresh_state(config: RunConfig, device: torch.device) -> TrainState:
    network = build_network(config, device)
    guard = Guard(config.train.spike_guard, device)
    return TrainState(network, make_optimizer(network, config.optim), Ema(network, config.ema), guard)


# --- network and optimiser ---------------------------------------------------------------------------------------


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """The freshly initialised network, a function of the seed alone, on `device` in channels_last."""
    first = device if device.type == "meta" else torch.device("cpu")  # whose weights are the same for every device
    with torch.random.fork_rng(devices=[]), first:
        torch.manual_seed(derive_seed(config.seed, "init"))
        network = BACKBONES[type(config.model)](config.model)
    return network.to(device=device, memory_format=torch.channels_last)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    how = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "weight_decay": config.weight_decay}
    if config.kind == "radam":
        return RAdam(network.parameters(), **how)
    return torch.optim.AdamW(network.parameters(), **how, fused=True)


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))


# --- averages ------------------------------------------------------------------------------------------------------


class Ema:
    """`averages[decay][name]`: the moving average of each parameter of `network`, in float32, from its initial value.

    They are on the parameters' device or, with `config.store` "host", in the CPU's memory.

    Every `config.every` steps each average moves by 1 − decay^every towards the weights (the official CIFAR-10
    release: every 16 steps; the ImageNet one: every step). No ramp.
    """

    def __init__(self, network: nn.Module, config: EmaConfig):
        self.config = config
        self._weights = {name: p.detach() for name, p in network.named_parameters()}
        self._host = HostCopy(list(self._weights.values())) if config.store == "host" else None
        self._averages: dict[float, dict[str, Tensor]] = {decay: {} for decay in config.decays}
        self.restart()

    @property
    def averages(self) -> dict[float, dict[str, Tensor]]:
        """Up to date: with `store` "host" this waits for the last update."""
        if self._host is not None:
            self._host.wait()
        return self._averages

    def restart(self) -> None:
        """Set every average to the current weights."""
        weights = {name: weight if self._host is None else weight.cpu() for name, weight in self._weights.items()}
        for average in self.averages.values():
            average.update({name: weight.clone() for name, weight in weights.items()})

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called once after each optimiser step; `step` counts those steps from 1."""
        if step % self.config.every:
            return
        if self._host is None:
            self._move(list(self._weights.values()))
        else:
            self._host.copy(then=self._move)

    def _move(self, weights: list[Tensor]) -> None:
        for decay, average in self._averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay**self.config.every)

    def before_weights_change(self) -> None:
        """To be called before each optimiser step: it may have to come after the copy of the last update."""
        if self._host is not None:
            self._host.before_weights_change()


class HostCopy:
    """Copies of tensors in the CPU's memory, made while the device and this thread go on.

    From a CUDA device the copies go to pinned memory on a stream of their own. What is done with them runs in a thread:
    of a large network it takes a second.
    """

    def __init__(self, tensors: list[Tensor]):
        cuda = tensors[0].is_cuda
        self.tensors = tensors
        self.copies = [torch.empty_like(x, device="cpu", pin_memory=cuda) for x in tensors]
        self.stream = torch.cuda.Stream(tensors[0].device) if cuda else None
        self.copied: torch.cuda.Event | None = None
        self.thread, self.work = ThreadPoolExecutor(1), None

    def copy(self, then: Callable[[list[Tensor]], None]) -> None:
        """Copy the tensors as they are now, then call `then` with the copies; `wait` waits for it."""
        self.wait()
        if self.stream is None:
            torch._foreach_copy_(self.copies, self.tensors)
        else:
            self.stream.wait_stream(torch.cuda.current_stream(self.stream.device))
            with torch.cuda.stream(self.stream):
                torch._foreach_copy_(self.copies, self.tensors, non_blocking=True)
                self.copied = self.stream.record_event()
        self.work = self.thread.submit(self._after_copy, then)

    def _after_copy(self, then: Callable[[list[Tensor]], None]) -> None:
        if self.copied is not None:
            self.copied.synchronize()
        with torch.no_grad():
            then(self.copies)

    def before_weights_change(self) -> None:
        """The device's work from here on comes after the copy."""
        if self.copied is not None:
            torch.cuda.current_stream(self.stream.device).wait_event(self.copied)

    def wait(self) -> None:
        if self.work is not None:
            self.work.result()
            self.work = None


# --- saved and restored ----------------------------------------------------------------------------------------------


def to_checkpoint(state: TrainState, config: RunConfig, data: dict[str, Any]) -> Checkpoint:
    names = {p: name for name, p in state.network.named_parameters()}
    optimizer = {names[p]: dict(values) for p, values in state.optimizer.state.items()}
    meta = {
        "format": FORMAT,
        "step": state.step,
        "images": state.step * config.train.batch,
        "seconds": state.seconds,
        "config": settings.to_tree(config),
        "data": data,
        "spike_guard": state.guard.numbers(),
        "environment": environment(),
    }
    model = {name: p.detach() for name, p in state.network.named_parameters()}
    ema = {repr(decay): average for decay, average in state.ema.averages.items()}
    return Checkpoint(model, ema, optimizer, meta)


@torch.no_grad()
def restore(state: TrainState, checkpoint: Checkpoint, where: str) -> None:
    """Fill `state` in place, strictly. An average that the checkpoint lacks starts from its weights.

    Raises AssetError naming what does not fit.
    """
    parameters = dict(state.network.named_parameters())
    copy_strictly(parameters, checkpoint.model, f"{where}: weights")
    state.ema.restart()
    for decay, average in state.ema.averages.items():
        if repr(decay) in checkpoint.ema:
            copy_strictly(average, checkpoint.ema[repr(decay)], f"{where}: EMA {decay}")
    for name, values in checkpoint.optimizer.items():
        like = parameters.get(name)
        shapes = {key: value.shape for key, value in values.items()}
        if like is None or shapes != {key: () if key == "step" else like.shape for key in values}:
            raise AssetError(f"{where}: the optimiser's state of {name} does not fit the network")
        state.optimizer.state[like] = {
            key: value.to(device=like.device, dtype=torch.float32)
            if value.ndim == 0
            else torch.empty_like(like).copy_(value)
            for key, value in values.items()
        }
    spikes = checkpoint.meta.get("spike_guard")
    if spikes is not None:
        if not isinstance(spikes, list) or len(spikes) != 3 or not all(isinstance(x, float) for x in spikes):
            raise AssetError(f"{where}: the spike guard's state is not three numbers")
        state.guard.restore(spikes)
    state.step, state.seconds = checkpoint.meta["step"], checkpoint.meta["seconds"]


@torch.no_grad()
def copy_strictly(into: dict[str, Tensor], source: dict[str, Tensor], what: str) -> None:
    """Copy tensors by name. Raises AssetError if a name is missing or left over or a shape differs."""
    wrong = sorted(into.keys() ^ source.keys())
    wrong += [name for name in into.keys() & source.keys() if into[name].shape != source[name].shape]
    if wrong:
        raise AssetError(f"{what} do not fit the network: {len(wrong)} tensors differ, such as {wrong[0]}")
    for name, tensor in into.items():
        tensor.copy_(source[name])


# --- fine-tuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Initialised:
    """What a fine-tuning run took from another one. `reshaped`: in both, but of another shape, so not taken."""

    source: str
    step: int
    weights: str  # which average, or "weights"
    taken: list[str]
    fresh: list[str]
    reshaped: list[str]
    unused: list[str]
    changed: str = ""  # how the tensors of an official DiT or SiT were

    def summary(self) -> str:
        total = len(self.taken) + len(self.fresh) + len(self.reshaped)
        which = self.weights if self.weights == WEIGHTS else f"EMA {self.weights}"
        origin = f"official, {self.weights}" if self.changed else f"step {self.step:,}, {which}"
        parts = [f"init.from {self.source} ({origin}): took {len(self.taken)} of {total} tensors"]
        parts += [self.changed] if self.changed else []
        for names, what in (
            (self.fresh, "not there, so fresh"),
            (self.reshaped, "of another shape there, so fresh"),
            (self.unused, "there and not used"),
        ):
            if names:
                more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")
        return "; ".join(parts)

    def write(self, path: Path) -> None:
        with write_errors_named(path):
            path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@torch.no_grad()
def initialise(state: TrainState, config: InitConfig) -> Initialised:
    """Fill the weights from another run, wherever names and shapes agree, and all averages with them.

    Of an official DiT or SiT checkpoint all tensors are taken, changed as `official/dit.py` says. Raises AssetError if
    the checkpoint cannot be read, and ConfigError if it lacks the average asked for or fits so little that the network
    must be another one: less than half of the parameters.
    """
    if (teacher := read_teacher(Path(config.from_).expanduser(), state.network, config)) is not None:
        return _initialise_from_teacher(state, config.from_, teacher)
    if config.teacher is not None:
        raise ConfigError(f"init.teacher: init.from {config.from_} is no official DiT or SiT checkpoint")
    path, checkpoint, _ = find_checkpoint(Path(config.from_).expanduser())
    ema = config_from_tree(checkpoint.meta["config"], str(path)).ema.eval if config.ema is None else config.ema
    which = WEIGHTS if ema == WEIGHTS else repr(ema)
    if config.ema is None:
        which = checkpoint.meta.get("ema", which)  # of a shared folder: the one that it is about
    if which not in checkpoint.kept:
        raise ConfigError(f"init.ema: {path} keeps no average {which}, but {', '.join(checkpoint.kept)}")
    there = checkpoint.kept[which]
    here = dict(state.network.named_parameters())
    common = [name for name in here if name in there]
    taken = [name for name in common if here[name].shape == there[name].shape]
    fraction = sum(here[name].numel() for name in taken) / sum(p.numel() for p in here.values())
    if fraction < 0.5:
        raise ConfigError(f"init.from: {path} holds another network: only {fraction:.0%} of the parameters fit by name")
    for name in taken:
        here[name].copy_(there[name])
    state.ema.restart()
    fresh = [name for name in here if name not in there]
    reshaped = [name for name in common if name not in taken]
    unused = [name for name in there if name not in here]
    return Initialised(str(path), checkpoint.meta["step"], which, taken, fresh, reshaped, unused)


def _initialise_from_teacher(state: TrainState, source: str, teacher: Teacher) -> Initialised:
    here = dict(state.network.named_parameters())
    for name, tensor in (teacher.tensors | teacher.zeros).items():
        here[name].copy_(tensor)
    state.ema.restart()
    fresh = [name for name in here if name not in teacher.tensors]
    return Initialised(source, 0, teacher.which, list(teacher.tensors), fresh, [], [], teacher.said)


def refuse_missing_source(config: InitConfig) -> None:
    """Raises AssetError if init.from names nothing that is there: to be known before the data are prepared."""
    path = None if config.from_ is None else Path(config.from_).expanduser()
    if path is not None and not path.exists() and not is_hub_name(path):
        raise AssetError(f"init.from {config.from_}: no such file or folder; name yours with --set init.from=PATH")
