"""Latents for the tests: tiny preparations, and a tiny AutoencoderKL in diffusers' layout."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from meanflow.data.latents import LatentsConfig
from meanflow.data.prepare_latents import prepare
from meanflow.logs import log

DIGITS = LatentsConfig("latents", "latents", "space-to-depth", 8, source="digits", flip=True, decode_batch=16)


def digits(latents: Path, **changes: Any) -> LatentsConfig:
    return replace(DIGITS, latents=str(latents), **changes)


def from_folder(images: Path, latents: Path, **changes: Any) -> LatentsConfig:
    return digits(latents, **({"source": "folder", "images": str(images), "image_size": 16} | changes))


def make(config: LatentsConfig, rank: int = 0, world: int = 1, **how: Any) -> list[str]:
    """Prepare on the CPU, four images a shard unless told otherwise; what was logged."""
    lines: list[str] = []
    handler, level = logging.Handler(), log.level
    handler.emit = lambda record: lines.append(record.getMessage())
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        prepare(config, rank, world, "cpu", **({"shard_images": 4} | how))
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return lines


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a preparation by name; fails if something half written is left."""
    files = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
    assert not [name for name in files if name.endswith(".tmp")]
    return files


def save_tiny_vae(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """An AutoencoderKL of 3 channels and halved size with random weights; `changes` are of its config."""
    from diffusers import AutoencoderKL

    config = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "sample_size": 16,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        AutoencoderKL(**(config | changes)).save_pretrained(folder)
    return folder
