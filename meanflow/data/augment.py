"""EDM augmentation: random flips and small affine warps, told to the network as six labels.

Karras et al. 2022, "Elucidating the Design Space of Diffusion-Based Generative Models", appendix F.2, without
vertical flips and rotations (Geng et al. 2025, appendix A). In the order of application:

    flip         mirror left-right                                   fair coin on every image
    scale        by 2^(0.2 a), a ~ N(0, 1)                            with probability p
    anisotropy   R(θ) diag(s, 1/s) R(−θ), s = 2^(0.2 b), b ~ N(0, 1)  with probability p, θ ~ U(−π, π)
    translation  by (x, y)/8 of width and height, x, y ~ N(0, 1)      with probability p

    labels = [flip, a, b cos θ, b sin θ, x, y]; a transform that was not drawn gives zeros

That is the anisotropy "appendix". "official" is that of the official CIFAR-10 release, which differs from the text in
two ways: θ is drawn with probability ½ and is 0 otherwise, and the stretch lies along −θ (x right, y down) although the
labels are (b cos θ, b sin θ). Scaling, shifts and flips need no such choice: on equal draws they agree with the
release's, with a mean difference of 0.002 between images in [−1, 1], because the filter is centred here (see DELAY).
The release's loader also flips every image with probability ½ without a label; `ImageFeed` does so before `apply`.

The last three are one affine map, applied as a single warp: reflect the image at its borders, double its
resolution with the sym6 wavelet's low-pass filter, look up bilinearly, halve with the same filter's adjoint.
The filter is orthonormal, so the identity and whole-pixel shifts come out exact.

Two things keep an image's result independent of its batch. The reflected image is periodic, so one period
(2(W − 1) pixels) holds all of it and coordinates wrap around: no margin depends on the largest draw. And the
warp is done in float64, which neither TF32 nor autocast touches, for the warped third of the batch alone.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F

AUGMENT_LABELS = 6
ANISOTROPIES = ("appendix", "official")

# sym6 (Daubechies, "Ten Lectures on Wavelets", 1992, ch. 8): 12 taps, sum √2, six vanishing moments.
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip
# Pixel x sits at 2x + DELAY on the doubled grid. With this delay, the filter's first moment, doubling and
# halving reproduce linear ramps exactly; the filter's middle, 5.5, would be off by a fifth of a pixel.
DELAY = sum(k * h for k, h in enumerate(SYM6)) / sum(SYM6)


@dataclass(frozen=True, eq=False)
class AugmentDraw:
    """The random numbers of n images' augmentation, on the CPU: what `apply` does to each of them."""

    labels: torch.Tensor  # (n, 6) float32: what the network is told
    inverse: torch.Tensor  # (n, 2, 2) float64: offset from the centre after the warp (x, y) → offset before
    warped: torch.Tensor  # (n,) bool: any of scale, anisotropy, translation was drawn

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: torch.Tensor | slice) -> "AugmentDraw":
        """The draw of some of the images: those of a process, or of a micro-batch."""
        return AugmentDraw(self.labels[indices], self.inverse[indices], self.warped[indices])


def draw(n: int, p: float, flip: bool, anisotropy: str, generator: torch.Generator) -> AugmentDraw:
    """Draw the augmentation of n images.

    Draw for the global batch and `select`, so that the result does not depend on the number of processes.

    p: probability of each of scale, anisotropy and translation, independently. flip: flip each image with probability
    ½. anisotropy: one of ANISOTROPIES, see the module's docstring. generator: on the CPU; how far it advances depends
    on n and `anisotropy` alone.
    """
    coin = torch.rand(n, generator=generator) < 0.5
    drawn = torch.rand(n, 3, generator=generator) < p  # scale, anisotropy, translation
    theta = (torch.rand(n, generator=generator) * 2 - 1) * math.pi
    normal = torch.randn(n, 4, generator=generator)

    rotated = drawn[:, 1]
    if anisotropy == "official":
        rotated = rotated & (torch.rand(n, generator=generator) < 0.5)
    normal = torch.where(drawn[:, [0, 1, 2, 2]], normal, 0.0)  # (n, 4): a, b, x, y
    theta = torch.where(rotated, theta, 0.0)  # so that the undrawn map is the identity to the bit
    return _from_parameters((coin & flip).float(), normal, theta, drawn.any(1), anisotropy)


def _from_parameters(
    flips: torch.Tensor, normal: torch.Tensor, theta: torch.Tensor, warped: torch.Tensor, anisotropy: str
) -> AugmentDraw:
    """The draw with these parameters: flips (n,) of 0 and 1, normal (n, 4) of a, b, x, y, theta (n,), warped (n,)."""
    a, b = normal[:, 0], normal[:, 1]
    stretch = b[:, None] * torch.stack([theta.cos(), theta.sin()], 1)  # (n, 2)
    labels = torch.cat([flips[:, None], a[:, None], stretch, normal[:, 2:]], 1)  # (n, 6)
    axis = -theta if anisotropy == "official" else theta
    return AugmentDraw(labels, _inverse_linear(a.double(), b.double(), axis.double()), warped)


def _inverse_linear(a: torch.Tensor, b: torch.Tensor, theta: torch.Tensor) -> torch.Tensor:
    """Inverse of R(θ) diag(s, 1/s) R(−θ) · 2^(0.2 a), s = 2^(0.2 b). All (n,) → (n, 2, 2) on (x, y)."""
    cos, sin, zero = theta.cos(), theta.sin(), torch.zeros_like(theta)
    rotation = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    shrink = torch.stack([2 ** (-0.2 * (a + b)), zero, zero, 2 ** (-0.2 * (a - b))], 1).view(-1, 2, 2)
    return rotation @ shrink @ rotation.mT


@torch.no_grad()
def apply(images: torch.Tensor, draw: AugmentDraw) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment images (B, C, H, W), float32 in [−1, 1], H, W ≥ 2, on their device and without waiting for it.

    Returns the images (the filter may overshoot [−1, 1] a little at edges) and their labels, (B, 6) float32.
    """
    if len(images) != len(draw):
        raise ValueError(f"{len(images)} images, but the draw is for {len(draw)}")
    labels = _to_device(draw.labels, images.device)
    out = torch.where(labels[:, 0, None, None, None] != 0, images.flip(-1), images)
    rows = draw.warped.nonzero()[:, 0]  # on the CPU, so that its length costs no synchronisation
    if len(rows):
        affine = _to_device(_lookup(draw.select(rows), *images.shape[-2:]), images.device)
        rows = _to_device(rows, images.device)
        out.index_copy_(0, rows, _warp(out[rows], affine))
    return out, labels


def _to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    pinned = tensor.pin_memory() if device.type == "cuda" else tensor
    return pinned.to(device, non_blocking=True)


def _warp(images: torch.Tensor, affine: torch.Tensor) -> torch.Tensor:
    """Look every image up through its affine map. (B, C, H, W) float32, (B, 3, 2) float64 → (B, C, H, W)."""
    height, width = images.shape[-2:]
    up_y, down_y = _filters(height, images.device)
    up_x, down_x = _filters(width, images.device)
    fine = up_y @ images.double() @ up_x.mT  # (B, C, 4H−3, 4W−3): one period of the reflected image
    # The period is 2 wide in grid_sample's coordinates, −1 … 1, so wrapping is a remainder.
    grid = (_points(height, width, images.device) @ affine[:, None]).remainder(2) - 1  # (B, 2H+10, 2W+10, 2)
    fine = F.grid_sample(fine, grid, mode="bilinear", padding_mode="border", align_corners=True)
    return (down_y @ fine @ down_x.mT).to(images.dtype)  # (B, C, H, W)


def _lookup(draw: AugmentDraw, height: int, width: int) -> torch.Tensor:
    """The maps from `_points`, row vectors (x, y, 1), to half-periods of the doubled grid: float64 (n, 3, 2).

    With L the inverse and t the shift in pixels, a point n of the output's doubled grid, m its centre, comes
    from L (n − m − 2t) + m; a half-period is 2(W − 1) points.
    """
    size = torch.tensor([width, height], dtype=torch.float64)
    shift = draw.labels[:, 4:].double() / 8 * size  # (n, 2)
    constant = size - 1 + DELAY - 2 * (draw.inverse @ shift[..., None])[..., 0]  # (n, 2)
    rows = torch.cat([draw.inverse.mT, constant[:, None]], 1)  # (n, 3, 2)
    return rows / (2 * (size - 1))


@lru_cache(maxsize=8)
def _points(height: int, width: int, device: torch.device) -> torch.Tensor:
    """The doubled output grid about its centre, as (x, y, 1): float64 (2H+10, 2W+10, 3)."""

    def axis(size: int) -> torch.Tensor:
        return torch.arange(2 * size + len(SYM6) - 2, dtype=torch.float64) - (size - 1 + DELAY)

    y, x = torch.meshgrid(axis(height), axis(width), indexing="ij")
    return torch.stack([x, y, torch.ones_like(x)], -1).to(device)


@lru_cache(maxsize=8)
def _filters(size: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Doubling and halving along one axis as matrices, float64: (4·size − 3, size) and (size, 2·size + 10).

    Doubling covers one period of the reflected signal, 2(size − 1) pixels, and its first point once more.
    """
    period = 2 * (size - 1)
    up = torch.zeros(2 * period + 1, size, dtype=torch.float64)
    down = torch.zeros(size, 2 * size + len(SYM6) - 2, dtype=torch.float64)
    for tap, weight in enumerate(SYM6):
        for pixel in range(period):
            up[(2 * pixel + tap) % (2 * period), min(pixel, period - pixel)] += weight
        for pixel in range(size):
            down[pixel, 2 * pixel + tap] = weight
    up[-1] = up[0]
    return up.to(device), down.to(device)
