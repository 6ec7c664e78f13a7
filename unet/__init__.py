"""The pixel backbone: an NCSN++-style U-net u(z, r, t)."""

from unet.model import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
