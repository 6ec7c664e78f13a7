"""The latent backbone: a Diffusion Transformer with two time embedders."""

from dit.model import DiT, DiTConfig

__all__ = ["DiT", "DiTConfig"]
