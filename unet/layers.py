"""Building blocks of the U-net. Every operation here has a tangent rule in `meanflow.dual`."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

SKIP_SCALE = math.sqrt(0.5)  # keeps the variance of a sum of two branches
RESAMPLE_TAPS = (1.0, 3.0, 3.0, 1.0)
ZERO_INIT = 1e-5  # the last convolution of a branch starts near zero: the block starts as its skip
QKV_INIT = math.sqrt(0.2)
JVP_OF_GROUP_NORM = torch.__version__ >= (2, 14)  # 2.8 and 2.11 fail on channels_last and give bf16 a float32 tangent


def xavier_(layer: nn.Module, scale: float = 1.0) -> None:
    """Xavier-uniform weight times `scale`, zero bias (in place)."""
    nn.init.xavier_uniform_(layer.weight, gain=scale)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def linear(in_features: int, out_features: int, bias: bool = True) -> nn.Linear:
    layer = nn.Linear(in_features, out_features, bias=bias)
    xavier_(layer)
    return layer


def call(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    return function(*inputs)


def has_kernel(x: Tensor) -> bool:
    """Whether F.group_norm is right and fast for x.

    CPUs alone have a kernel that keeps channels_last: a GPU's returns the default format, and every convolution behind
    it would copy its input. `torch.func.jvp` of it fails in compiled code (PyTorch issue 152185), and before 2.14 in
    any case. Dual numbers (not a Tensor) have a rule of their own for the CPU's kernel.
    """
    if x.device.type != "cpu":
        return False
    if not isinstance(x, Tensor):
        return True
    return not torch.compiler.is_compiling() and (JVP_OF_GROUP_NORM or unpack_dual(x).tangent is None)


class GroupNorm(nn.GroupNorm):
    """At most 32 groups, at least four channels in each. Statistics, and the result under autocast, are in float32."""

    def __init__(self, channels: int):
        groups = min(32, max(1, channels // 4))
        while channels % groups:
            groups -= 1
        super().__init__(groups, channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if has_kernel(x):
            return super().forward(x)
        x = x if x.dtype == torch.float64 else x.float()
        groups = x.unflatten(1, (self.num_groups, -1))  # (B, G, C/G, H, W)
        variance, mean = torch.var_mean(groups, dim=(2, 3, 4), correction=0, keepdim=True)  # (B, G, 1, 1, 1)
        scale = self.weight.view(*groups.shape[1:3], 1, 1) * torch.rsqrt(variance + self.eps)  # (B, G, C/G, 1, 1)
        shift = self.bias.view(*groups.shape[1:3], 1, 1) - mean * scale
        return torch.addcmul(shift.flatten(1, 2), x, scale.flatten(1, 2))  # keeps the memory format of x


class Conv(nn.Conv2d):
    """A k×k convolution, after resampling by 2 with the filter [1, 3, 3, 1] if `resample` is "up" or "down".

    (B, C_in, H, W) → (B, C_out, H', W') with H' = H, 2H or H/2. With `side`, resampling is for square inputs of that
    size, and by matrix products along each axis; otherwise by convolutions of each channel.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel: int, resample: str = "", init: float = 1.0, side: int = 0
    ):
        super().__init__(in_channels, out_channels, kernel, padding=kernel // 2)
        self.resample, self.side = resample, side
        xavier_(self, init)
        if not resample:
            return
        taps = torch.tensor(RESAMPLE_TAPS)
        taps = taps / taps.sum() * (2.0 if resample == "up" else 1.0)  # "up" inserts zeros: gain 2 per axis
        if side:
            along = F.conv_transpose1d if resample == "up" else F.conv1d
            matrix = along(torch.eye(side)[:, None], taps[None, None], stride=2, padding=1)[:, 0].T.contiguous()
            self.register_buffer("matrix", matrix, persistent=False)  # (H', H)
        else:
            filters = torch.outer(taps, taps)[None, None].repeat(in_channels, 1, 1, 1)
            self.register_buffer("filters", filters, persistent=False)  # (C_in, 1, 4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.resample and self.side:
            x = self.matrix @ x.permute(0, 2, 3, 1)  # (B, H, W', C), as channels_last has it in memory
            x = (self.matrix @ x.flatten(2)).unflatten(2, (len(self.matrix), -1)).permute(0, 3, 1, 2)
        elif self.resample == "up":
            x = F.conv_transpose2d(x, self.filters, None, stride=2, padding=1, groups=self.in_channels)
        elif self.resample == "down":
            x = F.conv2d(x, self.filters, None, stride=2, padding=1, groups=self.in_channels)
        return F.conv2d(x, self.weight, self.bias, padding=self.padding)


class Block(nn.Module):
    """A residual block, shifted by the time embedding, with self-attention if asked for.

    x (B, C_in, H, W), emb (B, E) → (B, C_out, H', W'). Parameter names are the official release's.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        dropout: float,
        resample: str = "",
        attention: bool = False,
        side: int = 0,
    ):
        """resample, side: see `Conv`."""
        super().__init__()
        self.dropout = dropout
        self.norm0 = GroupNorm(in_channels)
        self.conv0 = Conv(in_channels, out_channels, 3, resample, side=side)
        self.affine = linear(emb_dim, out_channels)
        self.norm1 = GroupNorm(out_channels)
        self.conv1 = Conv(out_channels, out_channels, 3, init=ZERO_INIT)
        self.skip = None
        if resample or in_channels != out_channels:
            self.skip = Conv(in_channels, out_channels, 1, resample, side=side)
        self.attention = attention
        if attention:
            self.norm2 = GroupNorm(out_channels)
            self.qkv = Conv(out_channels, 3 * out_channels, 1, init=QKV_INIT)
            self.proj = Conv(out_channels, out_channels, 1, init=ZERO_INIT)

    def forward(self, x: Tensor, emb: Tensor, run: Callable[..., Tensor] = call) -> Tensor:
        """run(part, x) is part(x), or saves memory: what is cheap in a part, all but its convolution, comes first."""
        h = run(lambda x: self.conv0(F.silu(self.norm0(x))), x)  # (B, C_out, H', W')
        h = h + self.affine(emb)[:, :, None, None]
        h = run(lambda h: self.conv1(F.dropout(F.silu(self.norm1(h)), self.dropout, self.training)), h)
        x = (h + (x if self.skip is None else self.skip(x))) * SKIP_SCALE
        if self.attention:
            x = (self.proj(attend(run(lambda x: self.qkv(self.norm2(x)), x))) + x) * SKIP_SCALE
        return x


def attend(qkv: Tensor) -> Tensor:
    """Single-head self-attention over the H·W positions. qkv (B, 3C, H, W) → (B, C, H, W)."""
    height, width = qkv.shape[2:]
    tokens = qkv.flatten(2).transpose(1, 2)[:, None]  # (B, 1, H·W, 3C)
    q, k, v = tokens.chunk(3, dim=-1)  # (B, 1, H·W, C) each
    out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, H·W, C)
    return out[:, 0].transpose(1, 2).unflatten(2, (height, width))  # (B, C, H, W)
