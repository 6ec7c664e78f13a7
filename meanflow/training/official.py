"""The official PyTorch release's CIFAR-10 checkpoints, read strictly.

A file of that release is a `torch.save` dictionary: `model` holds `net.*` and three averages, `net_ema.*`,
`net_ema1.*`, `net_ema2.*` (0.9999, 0.99995, 0.9996; the published 2.80 is `net_ema1`), and `num_updates`; beside it
are `optimizer`, `lr_schedule`, `epoch` and `args`, an `argparse.Namespace`. Our U-net's parameters bear the
release's names; its constant resampling filters are buffers there and checked here.
"""

import argparse
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meanflow.errors import AssetError
from meanflow.training import settings
from meanflow.training.checkpoint import FORMAT, Checkpoint, file_sha256, load_tensors
from meanflow.training.config import RunConfig, load_config
from meanflow.training.run_folder import environment
from unet import UNet
from unet.layers import RESAMPLE_TAPS

WEIGHTS = "net"
EMAS = {"net_ema": 0.9999, "net_ema1": 0.99995, "net_ema2": 0.9996}
COUNTER = "num_updates"
RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "cifar10.yaml"


def official_names(network: nn.Module) -> tuple[dict[str, str], list[str]]:
    """What the release calls our tensors: ({its parameter: ours}, [its buffers]), from the network's structure."""
    parameters = {name: name for name, _ in network.named_parameters()}
    filters = [f"{name}.resample_filter" for name, module in network.named_modules() if getattr(module, "resample", "")]
    return parameters, filters


def read_official(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` in our form if it is the official release's, None if it is something else.

    Only tensors, plain containers and `argparse.Namespace` are unpickled. Raises AssetError if it is official but
    does not fit the CIFAR-10 U-net name by name and shape by shape.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_tensors(path, mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged file raises nearly anything in PyTorch's reader
        return None  # whoever asked reports it as what they expected
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not any(str(key).startswith(f"{WEIGHTS}.") for key in model):
        return None
    config = load_config(RECIPE)
    with torch.device("meta"):
        network = UNet(config.model)
    copies = {prefix: _copy_of(model, prefix, network, path) for prefix in (WEIGHTS, *EMAS)}
    _refuse([key for key in model if key.partition(".")[0] not in copies and key != COUNTER], "unknown", path)
    averages = {repr(decay): copies[prefix] for prefix, decay in EMAS.items()}
    return Checkpoint(copies[WEIGHTS], averages, {}, _meta(content, config, path))


def _copy_of(model: dict[str, Tensor], prefix: str, network: nn.Module, path: Path) -> dict[str, Tensor]:
    """One of the four copies of the network, {our name: tensor}. Raises AssetError for any name or shape too many."""
    held = {key[len(prefix) + 1 :]: value for key, value in model.items() if key.startswith(f"{prefix}.")}
    names, filters = official_names(network)
    _refuse([f"{prefix}.{name}" for name in (*names, *filters) if name not in held], "missing", path)
    _refuse([f"{prefix}.{name}" for name in held if name not in names and name not in filters], "unknown", path)
    shapes = dict(network.named_parameters())
    wrong = [f"{prefix}.{name}" for name, ours in names.items() if held[name].shape != shapes[ours].shape]
    _refuse(wrong, "of another shape", path)
    taps = torch.tensor(RESAMPLE_TAPS)
    expected = torch.outer(taps, taps)[None, None]
    for name in filters:
        value = held[name].float()
        same = value.shape == expected.shape and torch.allclose(value / value.sum(), expected / expected.sum())
        _refuse([] if same else [f"{prefix}.{name}"], "another filter than [1, 3, 3, 1]", path)
    return {ours: held[name] for name, ours in names.items()}


def _refuse(names: list[str], what: str, path: Path) -> None:
    if names:
        raise AssetError(
            f"{path}: is no official CIFAR-10 checkpoint of the 55.9 M U-net: {len(names)} tensor(s) {what}, "
            f"such as {names[0]}"
        )


def _meta(content: dict[str, Any], config: RunConfig, path: Path) -> dict[str, Any]:
    """What our checkpoints say of themselves. The count of steps is the release's own number of EMA updates."""
    step = int(content["model"].get(COUNTER, 0))
    tree = settings.to_tree(config)
    tree["description"] = "the official PyTorch release's CIFAR-10 checkpoint"
    origin = {"file": path.name, "sha256": file_sha256(path), "epoch": content.get("epoch")}
    return {
        "format": FORMAT,
        "step": step,
        "images": step * config.train.batch,
        "seconds": 0.0,
        "config": tree,
        "data": {"images": 50_000, "classes": [], "sha256": None},
        "environment": environment(),
        "origin": origin,
    }
