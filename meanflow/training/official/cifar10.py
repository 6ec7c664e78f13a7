"""The official PyTorch release's CIFAR-10 checkpoints, read strictly.

A file of that release is a `torch.save` dictionary: `model` holds `net.*` and three averages, `net_ema.*`,
`net_ema1.*`, `net_ema2.*` (0.9999, 0.99995, 0.9996; the published 2.80 is `net_ema1`), and `num_updates`; beside it
are `optimizer`, `lr_schedule`, `epoch` and `args`, an `argparse.Namespace`. Our U-net's parameters have the release's
names; its constant resampling filters are buffers there and checked here.

How the file was trained is read from its `args`: see `settings_of`.
"""

import argparse
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from meanflow.errors import AssetError, ConfigError
from meanflow.files import sha256_file
from meanflow.training.checkpoint import Checkpoint, load_tensors
from meanflow.training.config import RECIPES, RunConfig, load_config
from meanflow.training.official.meta import meta_of
from unet import UNet
from unet.layers import RESAMPLE_TAPS

WEIGHTS = "net"
EMAS = {"net_ema": 0.9999, "net_ema1": 0.99995, "net_ema2": 0.9996}
COUNTER = "num_updates"
RECIPE_OF = {"v0": "cifar10", "v1": "cifar10_v1"}  # by the release's name of its time sampler
LOOKED_FOR = (
    *("objective.times.sampler", "objective.times.ratio", "train.steps", "optim.warmup_steps", "optim.lr"),
    "model.dropout",
)
ITERATIONS = 48  # an epoch: 50,000 images in batches of 1,024, the incomplete one dropped


def official_names(network: nn.Module) -> tuple[dict[str, str], list[str]]:
    """What the release calls our tensors: ({its parameter: ours}, [its buffers]), from the network's structure."""
    parameters = {name: name for name, _ in network.named_parameters()}
    filters = [f"{name}.resample_filter" for name, module in network.named_modules() if getattr(module, "resample", "")]
    return parameters, filters


def read_official(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` in our form if it is the official release's, None if it is something else.

    `meta["origin"]` says what its settings are taken from. Only tensors, plain containers and `argparse.Namespace` are
    unpickled. Raises AssetError if it is official but does not fit the CIFAR-10 U-net name by name and shape by shape.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_tensors(path, mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged file raises nearly anything in PyTorch's reader
        return None  # the caller reports the error
    model = content.get("model") if isinstance(content, dict) else None
    if not isinstance(model, dict) or not any(str(key).startswith(f"{WEIGHTS}.") for key in model):
        return None
    config, origin = config_of(content.get("args"))
    with torch.device("meta"):
        network = UNet(config.model)
    copies = {prefix: _copy_of(model, prefix, network, path) for prefix in (WEIGHTS, *EMAS)}
    _refuse([key for key in model if key.partition(".")[0] not in copies and key != COUNTER], "unknown", path)
    averages = {repr(decay): copies[prefix] for prefix, decay in EMAS.items()}
    epoch, step = content.get("epoch"), int(model.get(COUNTER, 0))  # steps: the release counts its EMA updates
    origin |= {"file": path.name, "sha256": sha256_file(path), "epoch": epoch if isinstance(epoch, int) else None}
    meta = meta_of(config, "the official PyTorch release's CIFAR-10 checkpoint", step, 50_000, origin)
    return Checkpoint(copies[WEIGHTS], averages, {}, meta)


def config_of(args: Any) -> tuple[RunConfig, dict[str, Any]]:
    """The run that a checkpoint's `args` describe, and where its settings come from.

    What `settings_of` does not find, or finds out of range, is that of our recipe for the same time sampler (`cifar10`
    for v0 or an unknown one). The second value is {"recipe": its name, "args": {setting: value read}, "assumed": those
    looked for that are the recipe's}.
    """
    found = settings_of(args)
    recipe = RECIPE_OF[found.get("objective.times.sampler", "v0")]
    path = RECIPES / f"{recipe}.yaml"
    read = {key: value for key, value in found.items() if _fits(path, f"{key}={value}")}
    config = load_config(path, [f"{key}={value}" for key, value in read.items()])
    return config, {"recipe": recipe, "args": read, "assumed": [key for key in LOOKED_FOR if key not in read]}


def _fits(recipe: Path, change: str) -> bool:
    try:
        load_config(recipe, [change])
    except ConfigError:
        return False
    return True


def settings_of(args: Any) -> dict[str, Any]:
    """{setting of ours: value} of what can be told from a release's `args`; {} if that is no Namespace.

    The names of its fields were not known when this was written, so they are recognised by what they must mean, and
    nothing is taken that could mean two things:

    * the time sampler is the only string that is "v0" or "v1";
    * `lr` and `dropout`, numbers, are what they say;
    * `ratio` may be the fraction of samples with r ≠ t or that with r = t: .75 and .25 are taken, both as 75 % r ≠ t;
    * the length is the only whole number with "epochs" but not "warmup" in its name, each of 48 iterations;
    * the warm-up is the only whole number with "warmup" in its name, whose unit the name has too: "epochs", or "iters"
      or "steps".

    The parameters of the logit-normals are not looked for, nor is the batch, which may be that of one GPU.
    """
    values = vars(args) if isinstance(args, argparse.Namespace) else {}
    words = {name: set(re.findall("[a-z]+", str(name).lower().replace("warm_up", "warmup"))) for name in values}
    found = {}

    def only(word: str, without: str = "") -> str | None:
        fitting = [name for name in values if word in words[name] and without not in words[name]]
        whole = [name for name in fitting if type(values[name]) is int and 0 <= values[name] < 2**40]
        return whole[0] if len(whole) == 1 else None

    samplers = {value for value in values.values() if isinstance(value, str) and value in RECIPE_OF}
    if len(samplers) == 1:
        found["objective.times.sampler"] = samplers.pop()
    if type(values.get("ratio")) is float and values["ratio"] in (0.25, 0.75):
        found["objective.times.ratio"] = 0.75
    if epochs := only("epochs", without="warmup"):
        found["train.steps"] = values[epochs] * ITERATIONS
    warmup = only("warmup")
    if warmup and words[warmup] & {"epochs", "iters", "steps"}:
        found["optim.warmup_steps"] = values[warmup] * (ITERATIONS if "epochs" in words[warmup] else 1)
    for name, key in (("lr", "optim.lr"), ("dropout", "model.dropout")):
        if type(values.get(name)) is float:
            found[key] = values[name]
    return found


def _copy_of(model: dict[str, Tensor], prefix: str, network: nn.Module, path: Path) -> dict[str, Tensor]:
    """One of the four copies of the network, {our name: tensor}. Raises AssetError unless names and shapes fit."""
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
