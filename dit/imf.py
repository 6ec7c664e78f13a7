"""The network of Improved Mean Flows (arXiv 2512.02012): conditions are tokens, and guidance is one of them.

A trunk of blocks is shared by two branches: u, the average velocity, and v, the velocity that iMF's loss needs while
training. Parameters have the official release's names. Every operation has a tangent rule in `meanflow.dual`;
dimension 0 is the batch throughout.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from dit.imf_layers import Block, FinalLayer, LabelEmbedder, PatchEmbedder, ScalarEmbedder, rotation_table
from dit.model import unpatchify

# Tokens before those of the patches, in this order: what each embeds, and how many there are.
PREFIX = {"class": 8, "omega": 4, "t_min": 2, "t_max": 2, "time": 4}
HEADS = ("u", "v", "both")


@dataclass(frozen=True)
class IMFConfig:
    """Shape of the network, with the values of B/2 on 256² images in brackets.

    Raises ValueError, naming the field, for a shape that cannot be built.
    """

    kind: Literal["imf"]
    image_size: int  # positions a side of z (32: latents of 256² images)
    channels: int  # of z (4)
    patch: int  # positions a side of a token (2)
    width: int  # of a token (768)
    depth: int  # blocks between z and u (12)
    heads: int  # of attention (12)
    head_depth: int = 8  # blocks of u's branch and as many of v's; the first depth − head_depth blocks are shared
    classes: int = 0  # number of classes, 0 for unconditional (1000)
    v_head: bool = True  # whether there is a branch for v: iMF's loss needs it, sampling does not
    guidance_inputs: ClassVar[tuple[str, ...]] = ("omega", "t_min", "t_max")  # of the network, beside labels

    def __post_init__(self):
        if min(self.image_size, self.channels, self.patch, self.depth, self.heads, self.head_depth) < 1:
            raise ValueError("image_size, channels, patch, depth, heads and head_depth must be ≥ 1")
        if self.image_size % self.patch:
            raise ValueError(f"patch {self.patch} does not divide image_size {self.image_size}")
        if self.width < 1 or self.width % (2 * self.heads):
            raise ValueError(f"width must be ≥ 2 and divisible by 2·heads (rotary pairs), got {self.width}")
        if self.head_depth > self.depth:
            raise ValueError(f"head_depth must be at most depth {self.depth}, got {self.head_depth}")
        if self.classes < 0:
            raise ValueError(f"classes must be ≥ 0, got {self.classes}")

    @property
    def side(self) -> int:
        """Tokens along a side."""
        return self.image_size // self.patch

    @property
    def branches(self) -> tuple[str, ...]:
        """The outputs of the network, which `head` chooses from."""
        return ("u", "v") if self.v_head else ("u",)


class IMF(nn.Module):
    """u(z, r, t), guided: the average velocity over [r, t] at z, and v(z, r, t), the velocity at t.

    `forward(z, r, t, class_labels=None, omega=None, t_min=None, t_max=None)` with z (B, C, S, S) and the others (B,):
    r, t in [0, 1], of which only t − r is an input; class_labels int64 (None or the value `classes`: no class); the
    guidance scale omega > 0 (None: 1, no guidance), which holds where t_min ≤ t ≤ t_max (None: 0 and 1).

    head: "u" gives u, "v" gives v, each (B, C, S, S), without running the other's branch; "both" gives (u, v). All are
    zero at initialisation. Raises ValueError for v of a network without its branch.

    `run_block(block, x, rotation)`, if given, calls a block, as a DiT's does. `primal(x)`, if given, takes the tangent
    off a dual number x: with "both", v's branch then starts from the primal alone, since its derivative is not needed
    and would cost as much as u's. A network knows no dual numbers, so this is a function given by whoever sends them
    through it; without it v has a tangent too, and the same value.
    """

    def __init__(self, config: IMFConfig):
        super().__init__()
        self.config = config
        width, shared = config.width, config.depth - config.head_depth

        def tokens(name: str) -> nn.Parameter:
            return nn.Parameter(torch.randn(PREFIX[name], width) * width**-0.5)

        def blocks(depth: int) -> nn.ModuleList:
            return nn.ModuleList(Block(width, config.heads) for _ in range(depth))

        def final_layer() -> FinalLayer:
            return FinalLayer(width, config.patch**2 * config.channels)

        self.time_tokens, self.class_tokens, self.omega_tokens = tokens("time"), tokens("class"), tokens("omega")
        self.t_min_tokens, self.t_max_tokens = tokens("t_min"), tokens("t_max")
        self.x_embedder = PatchEmbedder(config.channels, config.patch, width)
        self.h_embedder, self.omega_embedder = ScalarEmbedder(width), ScalarEmbedder(width)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = ScalarEmbedder(width), ScalarEmbedder(width)
        self.y_embedder = LabelEmbedder(config.classes, width)
        rotation = rotation_table(sum(PREFIX.values()) + config.side**2, width // config.heads)
        self.register_buffer("rotation", rotation, persistent=False)

        self.shared_blocks, self.u_heads = blocks(shared), blocks(config.head_depth)
        self.v_heads = blocks(config.head_depth) if config.v_head else None
        self.u_final_layer, self.v_final_layer = final_layer(), final_layer() if config.v_head else None

    def drop_v_head(self) -> None:
        """Remove v's branch: samples need u alone."""
        self.v_heads = self.v_final_layer = None
        self.config = replace(self.config, v_head=False)

    def embed(
        self,
        z: Tensor,
        h: Tensor,
        class_labels: Tensor | None,
        omega: Tensor | None,
        t_min: Tensor | None,
        t_max: Tensor | None,
    ) -> Tensor:
        """The sequence (B, N, D): 20 tokens of conditions, then those of the patches."""

        def given(x: Tensor | None, default: float) -> Tensor:
            return torch.full(z.shape[:1], default, dtype=z.dtype, device=z.device) if x is None else x

        if class_labels is None:
            class_labels = torch.full(z.shape[:1], self.config.classes, device=z.device)
        prefix = [
            (self.class_tokens, self.y_embedder(class_labels)),
            (self.omega_tokens, self.omega_embedder(1 - 1 / given(omega, 1.0))),
            (self.t_min_tokens, self.cfg_t_start_embedder(given(t_min, 0.0))),
            (self.t_max_tokens, self.cfg_t_end_embedder(given(t_max, 1.0))),
            (self.time_tokens, self.h_embedder(h)),
        ]
        return torch.cat([*(tokens + c[:, None] for tokens, c in prefix), self.x_embedder(z)], dim=1)

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        class_labels: Tensor | None = None,
        omega: Tensor | None = None,
        t_min: Tensor | None = None,
        t_max: Tensor | None = None,
        *,
        head: str = "u",
        run_block: Callable[..., Tensor] = nn.Module.__call__,
        primal: Callable[[Tensor], Tensor] = lambda x: x,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if head not in HEADS:
            raise ValueError(f"head must be {', '.join(HEADS)}, got {head!r}")
        if head != "u" and not self.config.v_head:
            raise ValueError(f"this network is without v_head: head must be u, got {head!r}")

        def through(blocks: nn.ModuleList, x: Tensor) -> Tensor:
            for block in blocks:
                x = run_block(block, x, self.rotation)
            return x

        def output(blocks: nn.ModuleList, final: nn.Module, x: Tensor) -> Tensor:
            patches = through(blocks, x)[:, sum(PREFIX.values()) :]  # (B, side², D)
            return unpatchify(final(patches), self.config.side, self.config.patch)  # (B, C, S, S)

        x = through(self.shared_blocks, self.embed(z, t - r, class_labels, omega, t_min, t_max))  # (B, N, D)
        if head == "v":
            return output(self.v_heads, self.v_final_layer, x)
        u = output(self.u_heads, self.u_final_layer, x)
        return u if head == "u" else (u, output(self.v_heads, self.v_final_layer, primal(x)))
