"""Exponential moving averages of the weights, several decays side by side."""

import torch
from torch import Tensor, nn

from meanflow.training.config import EmaConfig


class Ema:
    """`averages[decay][name]` follows each parameter of `network`, in float32, from its initial value.

    They live on the parameters' device or, with `config.store` "host", in the computer's memory.

    Every `config.every` steps each average moves by 1 − decay^every towards the weights (the official CIFAR-10
    release: every 16 steps; the ImageNet one: every step). No ramp.
    """

    def __init__(self, network: nn.Module, config: EmaConfig):
        self.config = config
        self._weights = {name: p.detach() for name, p in network.named_parameters()}
        self.averages: dict[float, dict[str, Tensor]] = {decay: {} for decay in config.decays}
        self.restart()

    def restart(self) -> None:
        """Every average becomes the weights as they are now."""
        for average in self.averages.values():
            average.update({name: self._stored(weight).clone() for name, weight in self._weights.items()})

    @torch.no_grad()
    def update(self, step: int) -> None:
        """To be called once after each optimiser step; `step` counts those steps from 1."""
        if step % self.config.every:
            return
        weights = [self._stored(weight) for weight in self._weights.values()]
        for decay, average in self.averages.items():
            torch._foreach_lerp_(list(average.values()), weights, 1 - decay**self.config.every)

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.cpu() if self.config.store == "host" else weight
