"""The latent backbones: a Diffusion Transformer with two time embedders, and the network of Improved Mean Flows."""

from dit.imf import IMF, IMFConfig
from dit.model import DiT, DiTConfig

__all__ = ["IMF", "DiT", "DiTConfig", "IMFConfig"]
