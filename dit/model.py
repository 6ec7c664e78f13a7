"""The Diffusion Transformer of the ImageNet recipes (Table 4): adaLN-Zero, with an embedder for each time.

Every operation here has a tangent rule in `meanflow.dual`; dimension 0 is the batch throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.embedding import TimeEmbedder, sincos_positions

CONDITIONINGS = ("t,t-r", "t,r", "t,r,t-r", "t-r")  # the four rows of Table 1c
NORM_EPS = 1e-6
MLP_RATIO = 4


def call(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the network, with the values of B/4 on 256² images in brackets.

    Raises ValueError, naming the field, for a shape that cannot be built.
    """

    kind: Literal["dit"]
    image_size: int  # positions a side of z (32: latents of 256² images)
    channels: int  # of z (4)
    patch: int  # positions a side of a token (4)
    width: int  # of a token (768)
    depth: int  # blocks (12)
    heads: int  # of attention (12)
    conditioning: str = "t,t-r"  # what is embedded and summed, Table 1c
    classes: int = 0  # number of classes, 0 for unconditional (1000)
    guidance_inputs: ClassVar[tuple[str, ...]] = ()  # of the network, beside labels
    branches: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self):
        if min(self.image_size, self.channels, self.patch, self.depth, self.heads) < 1:
            raise ValueError("image_size, channels, patch, depth and heads must be ≥ 1")
        if self.image_size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide image_size {self.image_size}")
        if self.width < 4 or self.width % 4:
            raise ValueError(f"width must be ≥ 4 and divisible by 4 (positions), got {self.width}")
        if self.width % self.heads:
            raise ValueError(f"heads {self.heads} does not divide width {self.width}")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {CONDITIONINGS}, got {self.conditioning!r}")
        if self.classes < 0:
            raise ValueError(f"classes must be ≥ 0, got {self.classes}")

    @property
    def side(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch


class DiT(nn.Module):
    """u(z, r, t): the average velocity over [r, t] at z.

    `forward(z, r, t, class_labels=None)` with z (B, C, S, S), r and t (B,) in [0, 1] and class_labels (B,) int64
    (None or the value `classes`: no class) gives (B, C, S, S), zero at initialisation. `run_block(block, x, c)`, if
    given, calls a block: training saves memory there, or computes in another precision. All other layers, and the
    output, keep the precision of z.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        width, patch = config.width, config.patch
        self.patch_embed = nn.Conv2d(config.channels, width, patch, stride=patch)
        self.register_buffer("positions", sincos_positions(config.side, width), persistent=False)
        self.time_embed = nn.ModuleDict({name: TimeEmbedder(width) for name in config.conditioning.split(",")})
        self.label_embed = nn.Embedding(config.classes + 1, width) if config.classes else None  # last row: no class
        self.blocks = nn.ModuleList(Block(width, config.heads) for _ in range(config.depth))
        self.final = FinalLayer(width, patch * patch * config.channels)
        self._initialise()

    def _initialise(self) -> None:
        """As DiT: Xavier-uniform, N(0, 0.02) for the embeddings of times and labels, zero for modulation and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.patch_embed.weight.view(self.config.width, -1))
        nn.init.zeros_(self.patch_embed.bias)
        for embedder in self.time_embed.values():
            nn.init.normal_(embedder.fc1.weight, std=0.02)
            nn.init.normal_(embedder.fc2.weight, std=0.02)
        if self.label_embed is not None:
            nn.init.normal_(self.label_embed.weight, std=0.02)
        for module in (*self.blocks, self.final):
            nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.final.linear.weight)

    def embed(self, r: Tensor, t: Tensor, class_labels: Tensor | None) -> Tensor:
        """The conditioning vector (B, D): the sum of all embeddings."""
        times = {"t": t, "r": r, "t-r": t - r}
        c = sum(embed(times[name]) for name, embed in self.time_embed.items())
        if self.label_embed is not None:
            if class_labels is None:
                class_labels = torch.full((t.shape[0],), self.config.classes, device=self.positions.device)
            c = c + self.label_embed(class_labels)
        return c

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        run_block: Callable[..., Tensor] = nn.Module.__call__,
    ) -> Tensor:
        c = self.embed(r, t, class_labels)  # (B, D)
        x = self.patch_embed(z).flatten(2).transpose(1, 2) + self.positions  # (B, N, D), N tokens row by row
        for block in self.blocks:
            x = run_block(block, x, c)
        return unpatchify(self.final(x, c), self.config.side, self.config.patch)  # (B, C, S, S)


class Block(nn.Module):
    """Attention and an MLP, each normalised, modulated by c, and gated: the identity at initialisation (adaLN-Zero).

    x (B, N, D), c (B, D) → (B, N, D).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, MLP_RATIO * width), nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor, c: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        """run(part, …) is part(…), or saves memory: what is cheap in a part, all but its linear layer, comes first."""
        modulation = self.modulation(F.silu(c))[:, None]  # (B, 1, 6D)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=2)  # (B, 1, D) each
        qkv = run(lambda *inputs: self.qkv(modulate(*inputs)), x, shift_a, scale_a)  # (B, N, 3D)
        x = x + gate_a * self.proj(self.attend(qkv))
        h = run(lambda *inputs: self.fc1(modulate(*inputs)), x, shift_m, scale_m)  # (B, N, 4D)
        return x + gate_m * run(lambda h: self.fc2(F.gelu(h, approximate="tanh")), h)

    def attend(self, qkv: Tensor) -> Tensor:
        q, k, v = (y.unflatten(2, (self.heads, -1)).transpose(1, 2) for y in qkv.chunk(3, dim=2))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, heads, N, D/heads)
        return out.transpose(1, 2).flatten(2)


class FinalLayer(nn.Module):
    """x (B, N, D), c (B, D) → (B, N, out)."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.modulation = nn.Linear(width, 2 * width)
        self.linear = nn.Linear(width, out)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, dim=2)
        return self.linear(modulate(x, shift, scale))


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm, with scale and shift given by the conditioning in place of weights. (B, N, D)."""
    return F.layer_norm(x, (x.shape[-1],), eps=NORM_EPS) * (1 + scale) + shift


def unpatchify(x: Tensor, side: int, patch: int) -> Tensor:
    """Tokens (B, side², patch²·C), each (row, column, channel), → (B, C, side·patch, side·patch)."""
    x = x.unflatten(1, (side, side)).unflatten(3, (patch, patch, -1))  # (B, h, w, p, q, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, h, p, w, q)
    return x.flatten(4).flatten(2, 3)
