"""torch.compile of u and du/dt together, in one graph."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from meanflow.tangent import Network, value_and_tangent

PARTS = 8  # how many different numbers of rows with r ≠ t are told apart


def compiled_derivative(network: nn.Module, jvp: str, mode: str) -> Callable:
    """`value_and_tangent` for `network` alone, compiled at its first call; one more graph for each shape of batch.

    Compiled as a whole: PyTorch runs a compiled *network* eagerly, without a word, inside its own jvp.
    """
    if jvp == "dual":
        return TracedDual(network, mode)
    return torch.compile(value_and_tangent, dynamic=False, fullgraph=True, mode=mode)


class TracedDual:
    """torch.compile cannot read dual numbers, but torch.export need not: it runs the network on them once and keeps
    the plain operations that they turn into. That graph is then compiled.

    Where the number of rows with r ≠ t varies from step to step it is rounded up, so that few graphs serve all.
    """

    def __init__(self, network: nn.Module, mode: str):
        self.network, self.mode = network, mode
        self.graphs: dict[tuple, Callable] = {}

    def __call__(
        self,
        u: Network,
        z: Tensor,
        t: Tensor,
        r: Tensor,
        tangents: tuple[Tensor, float, float],
        rows: int,
        jvp: str,
        cond: dict[str, Tensor],
    ) -> tuple[Tensor, Tensor]:
        dz, dt, dr = tangents
        part = -(-len(z) // PARTS)
        padded = min(-(-rows // part) * part, len(z))
        dz = F.pad(dz.flatten(1), (0, 0, 0, padded - rows)).view(padded, *z.shape[1:])
        key = (tuple(z.shape), padded, dt, dr, *sorted(cond))
        if key not in self.graphs:
            self.graphs[key] = _compile(_Pair(self.network, u, dt, dr), (z, t, r, dz, cond), self.mode)
        value, tangent = self.graphs[key](z, t, r, dz, cond)
        return value, tangent[:rows]


class _Pair(nn.Module):
    """What is traced: the network, whose parameters the graph shares, called by way of `u`."""

    def __init__(self, network: nn.Module, u: Network, dt: float, dr: float):
        super().__init__()
        self.network, self.u, self.speeds = network, u, (dt, dr)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, dz: Tensor, cond: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return value_and_tangent(self.u, z, t, r, (dz, *self.speeds), len(dz), "dual", cond)


def _compile(pair: nn.Module, inputs: tuple, mode: str) -> Callable:
    traced = torch.export.export(pair, inputs, strict=False).module(check_guards=False)
    return torch.compile(traced, dynamic=False, fullgraph=True, mode=mode)
