"""The parts of the iMF network: embedders, rotary positions, and a block with RMSNorm and SwiGLU."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit.embedding import FREQUENCIES, frequencies, waves
from dit.model import NORM_EPS, call

ROPE_THETA = 10_000
BLOCK_STD = 0.32  # of a block's weights, times 1/√fan_in


class ScalarEmbedder(nn.Module):
    """(B,) → (B, width): cosines and sines, then linear → SiLU → linear."""

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("frequencies", frequencies(), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))
        for linear in (self.mlp[0], self.mlp[2]):
            initialise(linear, 1.0)

    def forward(self, scalar: Tensor) -> Tensor:
        return self.mlp(waves(scalar, self.frequencies))  # (B, width)


class LabelEmbedder(nn.Module):
    """(B,) int64 → (B, width). The last row is no class."""

    def __init__(self, classes: int, width: int):
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)
        nn.init.normal_(self.embedding_table.weight, std=width**-0.5)

    def forward(self, class_labels: Tensor) -> Tensor:
        return self.embedding_table(class_labels)


class PatchEmbedder(nn.Module):
    """z (B, C, S, S) → tokens (B, N, width), row by row."""

    def __init__(self, channels: int, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)
        nn.init.xavier_uniform_(self.proj.weight.view(width, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, z: Tensor) -> Tensor:
        return self.proj(z).flatten(2).transpose(1, 2)


class RMSNorm(nn.RMSNorm):
    """x / √(mean x² + 10⁻⁶) · weight over the last dimension, in the weight's precision under autocast too."""

    def __init__(self, width: int):
        super().__init__(width, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype))


class Block(nn.Module):
    """Attention and a SwiGLU, each normalised before and scaled after: the identity at initialisation.

    x (B, N, D), rotation (2, N, D/heads) → (B, N, D).
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attn_scale, self.mlp_scale = (nn.Parameter(torch.zeros(width)) for _ in range(2))
        self.norm1, self.attn = RMSNorm(width), Attention(width, heads)
        self.norm2, self.mlp = RMSNorm(width), SwiGLU(width)

    def forward(self, x: Tensor, rotation: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        """run(part, …) is part(…), or saves memory by computing the part again in the backward pass."""
        x = x + self.attn_scale * self.attn(self.norm1(x), rotation, run)
        return x + self.mlp_scale * self.mlp(self.norm2(x), run)


class Attention(nn.Module):
    """Self-attention without biases; q and k of each head are normalised, then rotated by their positions."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (block_linear(width, width) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(width // heads), RMSNorm(width // heads)

    def forward(self, x: Tensor, rotation: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        q, k, v = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)  # (B, heads, N, D/heads)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        q = run(lambda q: rotate(self.q_norm(q), rotation), q)
        k = run(lambda k: rotate(self.k_norm(k), rotation), k)
        out = F.scaled_dot_product_attention(q, k, v)  # softmax(q kᵀ/√(D/heads)) v, the softmax in float32
        return self.out_proj(out.transpose(1, 2).flatten(2))


class SwiGLU(nn.Module):
    """x ↦ w2(silu(w1 x) ⊙ w3 x), without biases. (B, N, D) → (B, N, D)."""

    def __init__(self, width: int):
        super().__init__()
        hidden = int(8 / 3 * width)
        self.w1, self.w3 = block_linear(width, hidden), block_linear(width, hidden)
        self.w2 = block_linear(hidden, width)

    def forward(self, x: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        return run(lambda gate, h: self.w2(F.silu(gate) * h), self.w1(x), self.w3(x))


class FinalLayer(nn.Module):
    """x (B, N, D) → (B, N, out), zero at initialisation."""

    def __init__(self, width: int, out: int):
        super().__init__()
        self.norm, self.linear = RMSNorm(width), nn.Linear(width, out)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.norm(x))


def initialise(linear: nn.Linear, std: float) -> None:
    """N(0, std²/fan_in), and zero for the bias."""
    nn.init.normal_(linear.weight, std=std * linear.in_features**-0.5)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)


def block_linear(fan_in: int, fan_out: int) -> nn.Linear:
    linear = nn.Linear(fan_in, fan_out, bias=False)
    initialise(linear, BLOCK_STD)
    return linear


def rotation_table(tokens: int, head_width: int) -> Tensor:
    """(2, N, D/heads): cosines, and sines with the signs that `rotate` needs, of position · 10000^(−2i/(D/heads)).

    Both members (2i, 2i + 1) of a pair have the same angle.
    """
    frequencies = ROPE_THETA ** -(torch.arange(0, head_width, 2, dtype=torch.float64) / head_width)
    angles = torch.arange(tokens, dtype=torch.float64)[:, None] * frequencies  # (N, D/heads/2)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack([torch.stack([cos, cos], 2), torch.stack([-sin, sin], 2)]).flatten(2).float()


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """RoPE: (x_2i + j·x_2i+1)·exp(j·angle) in real numbers, which dual numbers, bf16 and compilers take.

    x (B, heads, N, D/heads), rotation (2, N, D/heads).
    """
    cos, sin = rotation.unbind(0)
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)  # (x_1, x_0, x_3, x_2, …)
    return x * cos + swapped * sin
