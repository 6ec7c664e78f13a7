"""A small network with guidance inputs and a v-head, and batches with what iMF draws for them."""

from dataclasses import replace

import torch
from method_helpers import DIT, batch, perturbed
from torch import nn

from dit import DiT, DiTConfig
from meanflow.training.batches import MicroBatch

GUIDED = {  # the tiny run with guidance as an input, for `tiny_config`
    "model": {
        **{"kind": "imf", "image_size": 8, "channels": 1, "patch": 4, "width": 16, "depth": 2, "heads": 2},
        **{"head_depth": 1, "classes": 10, "v_head": True},
    },
    "objective": {"kind": "imeanflow", "times": {"ratio": 0.5}},
    "train__batch": 12,
    "train__microbatch": 5,
}


class TwoHeads(nn.Module):
    """Two DiTs, for u and v, which share the sum of linear embeddings of ω, t_min and t_max."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.u, self.v = DiT(config), DiT(config)
        self.embed = nn.Linear(3, DIT.channels)

    def forward(self, z, r, t, class_labels=None, omega=None, t_min=None, t_max=None, head="u", primal=lambda x: x):
        if omega is not None:
            inputs = torch.stack([1 - 1 / omega, t_min, t_max], 1).to(self.embed.weight)
            z = z + self.embed(inputs)[:, :, None, None]
        outputs = {"u": lambda: self.u(z, r, t, class_labels)}
        outputs["v"] = lambda: self.v(primal(z), primal(t), primal(t), class_labels)
        return (outputs["u"](), outputs["v"]()) if head == "both" else outputs[head]()


def two_heads(dtype: torch.dtype = torch.float64, config: DiTConfig = DIT) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(TwoHeads(config).to(dtype))


def guided_batch(objective, dtype=torch.float64, n: int = 8, r_eq_t: int = 3, config=DIT) -> MicroBatch:
    b = batch(config, dtype, n, r_eq_t)
    drawn = objective.sample_cond(b.r, b.t, config.classes, torch.Generator().manual_seed(5))
    return replace(b, cond={**b.cond, **drawn})
