"""Does the exported file give the network's images?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eval.exporting.files import Program
from eval.exporting.graph import Velocity
from meanflow.errors import NumericsError
from meanflow.guidance import GuidanceInput
from meanflow.precision import exact_float32
from meanflow.sampling import sample
from meanflow.training.model import Model, noise

SAMPLES = 5  # another batch than the one that was traced
LIMITS = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}  # largest difference of a value in about [−1, 1]


@dataclass(frozen=True)
class Expected:
    """The network's own samples: `images` (N, C, H, W) float32 of `inputs`, all in plain float32."""

    inputs: dict[str, Tensor]
    images: Tensor


def inputs_of(model: Model, n: int, seed: int = 0) -> dict[str, Tensor]:
    """noise (n, *z_shape) of samples 0 … n − 1, and class_labels (n,) if the network knows classes."""
    inputs = {"noise": noise(seed, 0, n, model.config.z_shape).to(model.device)}
    labels = model.class_labels(n)
    return inputs if labels is None else inputs | {"class_labels": labels.to(model.device)}


def expected(model: Model, steps: int, guidance: GuidanceInput | None, decoder: torch.nn.Module | None) -> Expected:
    inputs = inputs_of(model, SAMPLES)
    cond = {name: x for name, x in inputs.items() if name != "noise"}
    z = inputs["noise"].contiguous(memory_format=torch.channels_last)
    with exact_float32(), torch.no_grad():
        u = Velocity(model.network, guidance)
        z = sample(u, z, steps, sampler=model.config.objective.sampler, **cond)
        return Expected(inputs, z if decoder is None else decoder(z))


def difference(program: Program, known: Expected, precision: str, what: str) -> float:
    """The largest difference of a value. Raises NumericsError if it is above the limit of the precision."""
    with exact_float32(), torch.no_grad():
        images = program(*known.inputs.values()).float()
    found = (images - known.images).abs().max().item() if images.shape == known.images.shape else float("nan")
    if not found <= LIMITS[precision]:
        raise NumericsError(
            f"{what}: its samples differ from the network's by {found:.2g}, more than the {LIMITS[precision]:.0e} that "
            f"{precision} may: nothing was written"
        )
    return found
