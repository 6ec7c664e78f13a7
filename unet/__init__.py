"""The pixel backbone: an NCSN++-style U-net u(z, t, r). Knows tensors only: no loss, no files, no noise."""

from unet.model import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
