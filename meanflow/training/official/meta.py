"""The `meta` of a checkpoint of ours that is made from an official one."""

from typing import Any

from meanflow.training import settings
from meanflow.training.checkpoint import FORMAT
from meanflow.training.config import RunConfig
from meanflow.training.run_folder import environment

IMAGENET = 1_281_167  # training images


def meta_of(config: RunConfig, description: str, step: int, images: int, origin: dict[str, Any]) -> dict[str, Any]:
    """step: optimiser steps done; images: their number in the training set; origin: where all this was read from."""
    return {
        "format": FORMAT,
        "step": step,
        "images": step * config.train.batch,
        "seconds": 0.0,
        "config": settings.to_tree(config) | {"description": description},
        "data": {"images": images, "classes": [], "sha256": None},
        "environment": environment(),
        "origin": origin,
    }
