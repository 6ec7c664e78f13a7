"""Exponential moving averages of the weights, several decays side by side."""

import torch
from torch import Tensor, nn

from meanflow.training.config import EmaConfig


class Ema:
    """`averages[decay][name]` follows each parameter of `network`, in float32 on its device, from its initial value.

    Every `config.every` steps each average moves by 1 − decay^every towards the weights (the official CIFAR-10
    release: every 16 steps; the ImageNet one: every step). No ramp.
    """

    def __init__(self, network: nn.Module, config: EmaConfig):
        self.config = config
        self._weights = [p.detach() for p in network.parameters()]
        self.averages: dict[float, dict[str, Tensor]] = {
            decay: {name: p.detach().clone() for name, p in network.named_parameters()} for decay in config.decays
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called once after each optimiser step; `step` counts those steps from 1."""
        if step % self.config.every:
            return
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), self._weights, 1 - decay**self.config.every)
