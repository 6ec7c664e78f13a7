"""Sampling as a module that torch.export and the ONNX exporter can trace: noise (and classes) → images."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from meanflow.guidance import GuidanceInput
from meanflow.sampling import sample

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Velocity(nn.Module):
    """u(z, r, t) alone, for samplers of your own; where guidance is an input of the network, with this one."""

    def __init__(self, network: nn.Module, guidance: GuidanceInput | None = None):
        super().__init__()
        self.network, self.guidance = network, guidance

    def forward(self, z: Tensor, r: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """z (B, *z_shape), r and t (B,), class_labels (B,) int64 → (B, *z_shape)."""
        cond = {} if class_labels is None else {"class_labels": class_labels}
        if self.guidance is not None:
            cond |= self.guidance.inputs(z.shape[0], z.device)
        return self.network(z, r, t, **cond)


class Generator(nn.Module):
    """All `steps` evaluations of u in one graph, and the decoder of latents behind them, if given."""

    def __init__(self, u: Velocity, steps: int, sampler: str, decoder: nn.Module | None = None):
        super().__init__()
        self.u, self.steps, self.sampler, self.decoder = u, steps, sampler, decoder

    def forward(self, noise: Tensor, class_labels: Tensor | None = None) -> Tensor:
        """noise (B, *z_shape), class_labels (B,) int64 if the network knows classes → (B, C, H, W), float32."""
        cond = {} if class_labels is None else {"class_labels": class_labels}
        z = sample(self.u, noise, self.steps, sampler=self.sampler, **cond)
        return z if self.decoder is None else self.decoder(z)


def lower_precision(network: nn.Module, dtype: torch.dtype, z_shape: tuple[int, ...]) -> None:
    """Let the convolutions and linear layers of the blocks, in place, keep their weights and compute in `dtype`.

    The blocks are what the network calls by `run_block`, as training has them (a network without takes all its layers).
    Norms, the embedding of the times, the first and the last layer stay in float32, as autocast would have it.
    """
    blocks: list[nn.Module] = [network]
    if "run_block" in inspect.signature(network.forward).parameters:
        blocks = []

        def note(block: nn.Module, *inputs: Tensor) -> Tensor:
            blocks.append(block)
            return block(*inputs)

        device = next(network.parameters()).device
        with torch.no_grad():
            z, zero, one = (
                torch.zeros(1, *z_shape, device=device),
                *(torch.full((1,), x, device=device) for x in (0.0, 1.0)),
            )
            network(z, zero, one, run_block=note)
    for layer in {layer for block in blocks for layer in block.modules()}:
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.to(dtype)
            layer.register_forward_pre_hook(_to_weights_dtype)


def _to_weights_dtype(layer: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(x.to(layer.weight.dtype) for x in inputs)
