"""Checkpoints of official releases in our form, one file for each release."""

from pathlib import Path

from meanflow.training.checkpoint import Checkpoint
from meanflow.training.official import cifar10, imf, jax
from meanflow.training.official.imf import write_official

__all__ = ["read_official", "write_official"]

# Each gives the checkpoint at a path in our form, None if that is something else; raises AssetError if it is of its
# release but does not fit.
READERS = (cifar10.read_official, jax.read_official, imf.read_official)


def read_official(path: Path) -> Checkpoint | None:
    """The checkpoint at `path`, a file or folder, in our form if it is an official one, None if it is something else.

    `meta["origin"]` says what its settings are taken from. Raises AssetError if it is official but damaged, or does not
    fit its network name by name and shape by shape.
    """
    return next((found for read in READERS if (found := read(path)) is not None), None)
