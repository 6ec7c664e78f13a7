"""The official PyTorch release's iMF checkpoints, read strictly and written.

A file is the plain state_dict of the release's inference code, of B/2, M/2, L/2 or XL/2, with v's branch or without.
Its names are those of our network with the wrappers of flax's layers in between: `q_proj._flax_linear.weight`. How it
was trained is not in it: the settings are those of the recipe that has this network.
"""

import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit import IMF, IMFConfig
from meanflow.errors import AssetError, UserError, write_errors_named
from meanflow.files import replacing, sha256_file
from meanflow.training.checkpoint import Checkpoint, load_tensors
from meanflow.training.config import RECIPES, RunConfig, load_config
from meanflow.training.official.meta import IMAGENET, meta_of
from meanflow.training.official.names import listed

SIZES = ("imf_b2", "imf_m2", "imf_l2", "imf_xl2")  # recipes, one of each network
WRAPPERS = {nn.Linear: "_flax_linear", nn.Embedding: "_flax_embedding"}
MARKS = {"class_tokens", "omega_tokens", "t_min_tokens", "t_max_tokens"}  # names that no other release has
V_BRANCH = ("v_heads.", "v_final_layer.")
WHAT = ("missing", "unknown", "of another shape", "not of floating point")


def official_names(network: nn.Module) -> dict[str, str]:
    """{the release's name: ours} of all parameters, in the release's order."""
    names = {}
    for path, module in network.named_modules():
        wrapper = WRAPPERS.get(type(module))
        for name, _ in module.named_parameters(path, recurse=False):
            parent, _, leaf = name.rpartition(".")
            names[f"{parent}.{wrapper}.{leaf}" if wrapper else name] = name
    return names


def read_official(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` in our form if it is one of iMF, None if it is something else.

    Its one set of weights stands for the weights and all averages. `meta["origin"]` says what its settings are taken
    from. Only tensors and plain containers are unpickled. Raises AssetError if it is damaged, or does not fit one of
    the recipes name by name and shape by shape.
    """
    try:
        content = load_tensors(path, mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged file raises nearly anything in PyTorch's reader
        return None  # the caller reports the error
    if not isinstance(content, dict) or not MARKS & content.keys():
        return None
    _refuse_damaged(path)
    recipe, config, names = recipe_of(content, path)
    tensors = {ours: content[name].detach().float() for name, ours in names.items()}
    notes = ["its one set of weights is taken as the weights and as each average"]
    if not config.model.v_head:
        notes.append("it has no branch for v: objective.velocity is boundary, so that it can be trained on")
    origin = {"file": path.name, "sha256": sha256_file(path), "recipe": recipe, "notes": notes}
    averages = {repr(decay): tensors for decay in config.ema.decays}
    what = f"the official PyTorch release's iMF checkpoint; {config.description}"
    steps = config.train.steps  # a file does not say after how many: the recipe does
    return Checkpoint(tensors, averages, {}, meta_of(config, what, steps, IMAGENET, origin))


def _refuse_damaged(path: Path) -> None:
    """PyTorch compares no checksums of what it reads, but writes them."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if (part := archive.testzip()) is not None:
                raise AssetError(f"{path}: is damaged: {part} in it does not have its checksum")


def recipe_of(content: dict[str, Any], path: Path) -> tuple[str, RunConfig, dict[str, str]]:
    """The recipe that has this network, its settings, and `official_names`.

    Raises AssetError, with what differs from the one most like it.
    """
    with_v = any(str(name).startswith(V_BRANCH) for name in content)
    changes = [] if with_v else ["model.v_head=false", "objective.velocity=boundary"]
    complaints = {}
    for recipe in SIZES:
        config = load_config(RECIPES / f"{recipe}.yaml", changes)
        with torch.device("meta"):
            network = IMF(config.model)
        names = official_names(network)
        parameters = dict(network.named_parameters())
        wrong = _differences(content, {name: parameters[ours].shape for name, ours in names.items()})
        if not any(wrong):
            return recipe, config, names
        lines = [listed(those, what) for those, what in zip(wrong, WHAT, strict=True) if those]
        complaints[recipe] = sum(map(len, wrong)), "; ".join(lines)
    nearest = min(complaints, key=lambda recipe: complaints[recipe][0])
    raise AssetError(f"{path}: is no official iMF checkpoint; compared with {nearest}: {complaints[nearest][1]}")


def _differences(content: dict[str, Any], shapes: dict[str, torch.Size]) -> tuple[list[str], ...]:
    """Official names that do not fit, as in `WHAT`."""
    common = [name for name in shapes if name in content]
    tensors = [name for name in common if _is_plain(content[name])]
    return (
        [name for name in shapes if name not in content],
        [str(name) for name in content if name not in shapes],
        [name for name in tensors if content[name].shape != shapes[name]],
        [name for name in common if name not in tensors],
    )


def _is_plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout is torch.strided and x.is_floating_point()


def write_official(path: Path, model: Any, tensors: dict[str, Tensor], source: str) -> None:
    """Write weights of our network, {our name: tensor}, as the release's file; `source` is where they are from.

    model: the network's settings. Raises UserError for another network than iMF's, AssetError for tensors that do not
    fit it or a disk that refuses.
    """
    if not isinstance(model, IMFConfig):
        raise UserError(f"{source}: has model.kind={model.kind}, and official files are written of imf alone")
    sizes = [load_config(RECIPES / f"{recipe}.yaml").model for recipe in SIZES]
    if model not in [replace(size, v_head=model.v_head) for size in sizes]:
        raise UserError(f"{source}: is none of the release's networks ({', '.join(SIZES)}): it has no official file")
    with torch.device("meta"):
        network = IMF(model)
    names = official_names(network)
    shapes = {name: p.shape for name, p in network.named_parameters()}
    if {name: x.shape for name, x in tensors.items()} != shapes:
        raise AssetError(f"{source}: the weights do not fit the network that its settings describe")
    try:
        with replacing(path) as file, write_errors_named(path):
            torch.save({name: tensors[ours].contiguous() for name, ours in names.items()}, file)
    except RuntimeError as error:  # torch reports a failed write so
        raise AssetError(f"{path}: cannot be written ({str(error).partition(chr(10))[0]})") from error
