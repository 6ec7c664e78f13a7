"""Where a recipe's model section becomes a network."""

import torch
from torch import nn

from dit import DiT, DiTConfig
from meanflow.random import derive_seed
from meanflow.training.config import RunConfig
from unet import UNet


def build_network(config: RunConfig, device: torch.device) -> nn.Module:
    """The freshly initialised network, a function of the seed alone, on `device` in channels_last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(config.seed, "init"))
        backbone = DiT if isinstance(config.model, DiTConfig) else UNet
        network = backbone(config.model)  # on the CPU: the same weights whatever the device
    return network.to(device=device, memory_format=torch.channels_last)


def count_parameters(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())
