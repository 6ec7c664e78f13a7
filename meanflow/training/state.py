"""What a run is at a step: weights, averages, optimiser; and how it goes to disk and back."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from meanflow.errors import AssetError
from meanflow.training import settings
from meanflow.training.checkpoint import FORMAT, Checkpoint
from meanflow.training.config import OptimConfig, RunConfig
from meanflow.training.ema import Ema
from meanflow.training.guard import Guard
from meanflow.training.network import build_network
from meanflow.training.run_folder import environment


@dataclass
class TrainState:
    """`step` optimiser steps are done. Every random number is a function of (seed, step), so this is all there is."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema
    guard: Guard
    step: int = 0
    seconds: float = 0.0

    def tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """Weights and averages, by name."""
        averages = {f"EMA {decay}": average for decay, average in self.ema.averages.items()}
        return {"weights": dict(self.network.named_parameters()), **averages}


def fresh_state(config: RunConfig, device: torch.device) -> TrainState:
    network = build_network(config, device)
    guard = Guard(config.train.spike_guard, device)
    return TrainState(network, make_optimizer(network, config.optim), Ema(network, config.ema), guard)


def make_optimizer(network: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        network.parameters(),
        lr=config.lr,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=True,
    )


def learning_rate(config: OptimConfig, step: int) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant."""
    return config.lr * min(1.0, (step + 1) / max(config.warmup_steps, 1))


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
    """Fill `state` in place, strictly. Raises AssetError naming what does not fit."""
    parameters = dict(state.network.named_parameters())
    copy_strictly(parameters, checkpoint.model, f"{where}: weights")
    for decay, average in state.ema.averages.items():
        if repr(decay) not in checkpoint.ema:
            raise AssetError(f"{where}: has no EMA {decay}, only {', '.join(checkpoint.ema)}")
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
def copy_strictly(into: dict[str, torch.Tensor], source: dict[str, torch.Tensor], what: str) -> None:
    """Copy tensors by name. Raises AssetError if a name is missing or left over or a shape differs."""
    wrong = sorted(into.keys() ^ source.keys())
    wrong += [name for name in into.keys() & source.keys() if into[name].shape != source[name].shape]
    if wrong:
        raise AssetError(f"{what} do not fit the network: {len(wrong)} tensors differ, such as {wrong[0]}")
    for name, tensor in into.items():
        tensor.copy_(source[name])
