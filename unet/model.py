"""The NCSN++-style U-net of the CIFAR-10 recipe, 55.9 M parameters.

Where the paper is silent, constants and parameter names are those of the official release, whose checkpoints
load unchanged.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from unet.embedding import CONDITIONINGS, SinusoidalEmbedding, time_variables
from unet.layers import ZERO_INIT, Block, Conv, GroupNorm, linear

RESAMPLING = ("conv", "matmul")


@dataclass(frozen=True)
class UNetConfig:
    """Shape of the network, with the paper's CIFAR-10 values in brackets.

    Raises ValueError, naming the field, for a shape that cannot be built.
    """

    kind: Literal["unet"]
    image_size: int  # pixels a side (32); divisible by 2^(levels − 1)
    channels: int  # image channels (3)
    width: int  # base width (128)
    multipliers: tuple[int, ...]  # width multiplier at each resolution, largest first (2, 2, 2)
    blocks: int  # residual blocks a level on the way down, one more on the way up (4)
    attention: tuple[int, ...]  # resolutions with self-attention (16,)
    dropout: float = 0.0  # in the residual blocks (0.2)
    conditioning: str = "t,t-r"  # what is embedded, Table 1c
    augment_labels: int = 0  # width of the augmentation-label input, 0 for none (6)
    classes: int = 0  # number of classes, 0 for unconditional
    resampling: str = "conv"  # how images are halved and doubled: conv or matmul, equal up to rounding
    guidance_inputs: ClassVar[tuple[str, ...]] = ()  # of the network, beside labels
    branches: ClassVar[tuple[str, ...]] = ("u",)

    def __post_init__(self):
        if self.image_size < 1 or self.channels < 1 or self.blocks < 1:
            raise ValueError("image_size, channels and blocks must be ≥ 1")
        if self.width < 2 or self.width % 2:
            raise ValueError(f"width must be even and ≥ 2, got {self.width}")
        if not self.multipliers or min(self.multipliers) < 1:
            raise ValueError(f"multipliers must be one or more integers ≥ 1, got {self.multipliers}")
        if self.image_size % 2 ** (len(self.multipliers) - 1):
            halvings = len(self.multipliers) - 1
            raise ValueError(
                f"image_size {self.image_size} cannot be halved {halvings} times: use fewer multipliers or "
                f"a size divisible by {2**halvings}"
            )
        unknown = sorted(set(self.attention) - set(self.resolutions))
        if unknown:
            last = self.resolutions[-1]
            raise ValueError(
                f"attention {unknown} is not among this network's resolutions {self.resolutions}: "
                f"set it to one or more of them, such as [{last}]"
            )
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")
        if self.conditioning not in CONDITIONINGS:
            raise ValueError(f"conditioning must be one of {CONDITIONINGS}, got {self.conditioning!r}")
        if self.resampling not in RESAMPLING:
            raise ValueError(f"resampling must be one of {', '.join(RESAMPLING)}, got {self.resampling!r}")
        if self.augment_labels < 0 or self.classes < 0:
            raise ValueError("augment_labels and classes must be ≥ 0")

    @property
    def resolutions(self) -> tuple[int, ...]:
        return tuple(self.image_size >> level for level in range(len(self.multipliers)))


class UNet(nn.Module):
    """u(z, r, t): the average velocity over [r, t] at z.

    `forward(z, r, t, augment_labels=None, class_labels=None)` with z (B, C, H, W), r and t (B,) in [0, 1],
    augment_labels (B, A) (None: zeros, as at sampling) and class_labels (B,) int64 (None or the value `classes`:
    unconditional) gives (B, C, H, W). `run_block(block, x, emb)`, if given, calls a block: training saves memory there,
    or computes in another precision. All other layers, and the output, keep the precision of z.
    """

    def __init__(self, config: UNetConfig):
        super().__init__()
        self.config = config
        width, emb_dim = config.width, 4 * config.width
        variables = len(config.conditioning.split(","))
        self.map_time = SinusoidalEmbedding(2 * width)
        self.map_augment = None
        if config.augment_labels:
            self.map_augment = linear(config.augment_labels, 2 * width * variables, bias=False)
        self.map_class = None
        if config.classes:
            self.map_class = nn.Embedding(config.classes + 1, 2 * width * variables)  # last row: no class
            nn.init.normal_(self.map_class.weight, std=0.02)
        self.map_layer0 = linear(2 * width * variables, emb_dim)
        self.map_layer1 = linear(emb_dim, emb_dim)

        def block(*channels: int, **kwargs) -> Block:
            return Block(*channels, emb_dim=emb_dim, dropout=config.dropout, **kwargs)

        def resampling(channels: int, how: str, side: int) -> Block:
            return block(channels, channels, resample=how, side=side if config.resampling == "matmul" else 0)

        widths = [width * m for m in config.multipliers]
        self.enc = nn.ModuleDict()
        for level, (size, out) in enumerate(zip(config.resolutions, widths, strict=True)):
            if level == 0:
                self.enc[f"{size}x{size}_conv"] = Conv(config.channels, width, 3)
                skips = [width]
            else:
                self.enc[f"{size}x{size}_down"] = resampling(skips[-1], "down", 2 * size)
                skips.append(skips[-1])
            for i in range(config.blocks):
                attention = size in config.attention
                self.enc[f"{size}x{size}_block{i}"] = block(skips[-1], out, attention=attention)
                skips.append(out)

        current = skips[-1]
        self.dec = nn.ModuleDict()
        for level, (size, out) in reversed(list(enumerate(zip(config.resolutions, widths, strict=True)))):
            if level == len(widths) - 1:
                self.dec[f"{size}x{size}_in0"] = block(current, current, attention=True)
                self.dec[f"{size}x{size}_in1"] = block(current, current)
            else:
                self.dec[f"{size}x{size}_up"] = resampling(current, "up", size // 2)
            for i in range(config.blocks + 1):
                # On the way up only a level's last block attends (the official parameter list).
                attention = size in config.attention and i == config.blocks
                self.dec[f"{size}x{size}_block{i}"] = block(current + skips.pop(), out, attention=attention)
                current = out
        size = config.image_size
        self.dec[f"{size}x{size}_aux_norm"] = GroupNorm(current)
        self.dec[f"{size}x{size}_aux_conv"] = Conv(current, config.channels, 3, init=ZERO_INIT)

    def embed(self, r: Tensor, t: Tensor, augment_labels: Tensor | None, class_labels: Tensor | None) -> Tensor:
        """The conditioning vector (B, 4·width)."""
        variables = time_variables(r, t, self.config.conditioning)
        emb = torch.cat([self.map_time(x) for x in variables], dim=1)  # (B, 2·width·variables)
        if self.map_augment is not None and augment_labels is not None:
            emb = emb + self.map_augment(augment_labels)
        if self.map_class is not None:
            if class_labels is None:
                class_labels = torch.full((t.shape[0],), self.config.classes, device=self.map_class.weight.device)
            emb = emb + self.map_class(class_labels)
        emb = F.silu(self.map_layer0(emb))  # (B, 4·width)
        return F.silu(self.map_layer1(emb))

    def forward(
        self,
        z: Tensor,
        r: Tensor,
        t: Tensor,
        augment_labels: Tensor | None = None,
        class_labels: Tensor | None = None,
        run_block: Callable[..., Tensor] = nn.Module.__call__,
    ) -> Tensor:
        emb = self.embed(r, t, augment_labels, class_labels)
        x, skips = z, []
        for name, layer in self.enc.items():
            x = layer(x) if name.endswith("conv") else run_block(layer, x, emb)
            skips.append(x)
        size = self.config.image_size
        norm, conv = f"{size}x{size}_aux_norm", f"{size}x{size}_aux_conv"
        for name, layer in self.dec.items():
            if name in (norm, conv):
                continue
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = run_block(layer, x, emb)
        return self.dec[conv](F.silu(self.dec[norm](x.to(z.dtype))))  # (B, C, H, W)
