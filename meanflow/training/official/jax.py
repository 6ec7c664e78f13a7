"""The official JAX release's ImageNet checkpoints, read strictly and without JAX.

A checkpoint is an Orbax folder `checkpoint_N`, or a msgpack file of older flax, of a training state: `params` and
`ema_params` hold the network's tensors (`names.jax_name`); `step`, the optimiser's state and whatever else is beside
them is not taken over. Kernels are (in, out), the patch embedding's (rows, columns, in, out). How it was trained is not
in it: the settings are those of the recipe that has this network.
"""

import re
from pathlib import Path

from torch import Tensor

from dit import DiT
from meanflow.errors import AssetError
from meanflow.files import sha256_file, sha256_json
from meanflow.training.checkpoint import Checkpoint
from meanflow.training.config import RECIPES, RunConfig, load_config
from meanflow.training.official.jax_arrays import FLOATS, Arrays, StoredArray, stored_arrays
from meanflow.training.official.meta import IMAGENET, meta_of
from meanflow.training.official.names import jax_name, listed, parameters_of

SIZES = ("imagenet_b4", "imagenet_b2", "imagenet_m2", "imagenet_l2", "imagenet_xl2")  # recipes, one of each network
WEIGHTS, AVERAGE, ROOT = "params", "ema_params", "net"
WHAT = ("missing", "unknown", "of another shape", "not of floating point")
ITEMS = ("default", "state")  # names under which Orbax or its user may have put the whole state


def read_official(path: Path) -> Checkpoint | None:
    """The checkpoint at `path` in our form if it is one of JAX, None if it is something else.

    `meta["origin"]` says what its settings are taken from, and in `notes` what it lacks. Raises AssetError if it is
    damaged, a package to read it is missing, or it does not fit one of the recipes name by name and shape by shape.
    """
    arrays = stored_arrays(path)
    if arrays is None:
        return None
    copies = copies_of(arrays)
    if not copies:
        tops = ", ".join(sorted({keys[0] for keys in arrays})[:4]) or "nothing"
        raise AssetError(f"{path}: is no MeanFlow checkpoint of the official JAX release: no params, but {tops}")
    recipe, config = recipe_of(copies, path)
    read = {kind: _tensors(copy, config) for kind, copy in copies.items()}
    weights, average = read.get(WEIGHTS), read.get(AVERAGE)
    decay, notes = repr(config.ema.decays[0]), []
    if average is None:
        notes.append(f"it has no {AVERAGE}: there is no average to sample from, so name the weights, --ema weights")
    if weights is None:
        notes.append(f"it has no {WEIGHTS}: its {AVERAGE} are taken as the weights too")
        weights = average
    origin = {"file": path.name, "sha256": _hash(path), "recipe": recipe, "notes": notes}
    what = f"the official JAX release's checkpoint; {config.description}"
    meta = meta_of(config, what, _step(arrays, path), IMAGENET, origin)
    return Checkpoint(weights, {} if average is None else {decay: average}, {}, meta)


def copies_of(arrays: Arrays) -> dict[str, Arrays]:
    """The copies of the network, {"params" or "ema_params": {path below `net`: array}}.

    Both may be below the name of an Orbax item, and have flax's own `params` and then `net` before the names; a tree
    that begins with `net` is one of weights.
    """
    copies: dict[str, Arrays] = {}
    for keys, array in arrays.items():
        keys = keys[1:] if len(keys) > 1 and keys[0] in ITEMS else keys
        kind, rest = (WEIGHTS, keys) if keys[0] == ROOT else (keys[0], keys[1:])
        if kind in (WEIGHTS, AVERAGE):
            for prefix in (WEIGHTS, ROOT):
                rest = rest[1:] if rest[:1] == (prefix,) else rest
            copies.setdefault(kind, {})[rest] = array
    return {kind: copies[kind] for kind in (WEIGHTS, AVERAGE) if kind in copies}


def recipe_of(copies: dict[str, Arrays], path: Path) -> tuple[str, RunConfig]:
    """The recipe that has this network. Raises AssetError, with what differs from the one most like it."""
    complaints = {}
    for recipe in SIZES:
        config = load_config(RECIPES / f"{recipe}.yaml")
        wrong = [_differences(copy, config, kind) for kind, copy in copies.items()]
        if not any(map(any, wrong)):
            return recipe, config
        lines = [listed(names, what) for each in wrong for names, what in zip(each, WHAT, strict=True) if names]
        complaints[recipe] = sum(len(names) for each in wrong for names in each), "; ".join(lines)
    nearest = min(complaints, key=lambda recipe: complaints[recipe][0])
    raise AssetError(
        f"{path}: is no MeanFlow checkpoint of the official JAX release; compared with {nearest}: "
        f"{complaints[nearest][1]}"
    )


def _differences(copy: Arrays, config: RunConfig, kind: str) -> tuple[list[str], ...]:
    """Names that do not fit, as in `WHAT`."""
    shapes = {jax_name(name): shape for name, shape in parameters_of(DiT, config.model).items()}
    common = [name for name in shapes if name in copy]
    return tuple(
        ["/".join((kind, ROOT, *name)) for name in names]
        for names in (
            [name for name in shapes if name not in copy],
            [name for name in copy if name not in shapes],
            [name for name in common if [copy[name].shape[k] for k in _axes(name, copy[name])] != list(shapes[name])],
            [name for name in common if copy[name].dtype not in FLOATS],
        )
    )


def _axes(name: tuple[str, ...], array: StoredArray) -> tuple[int, ...]:
    """The order in which PyTorch has the array's dimensions: a kernel's out, in, and then its rows and columns."""
    given = tuple(range(len(array.shape)))
    return {2: (1, 0), 4: (3, 2, 0, 1)}.get(len(given), given) if name[-1] == "kernel" else given


def _tensors(copy: Arrays, config: RunConfig) -> dict[str, Tensor]:
    """{our name: float32 tensor}."""
    paths = {name: jax_name(name) for name in parameters_of(DiT, config.model)}
    return {name: copy[path].read().permute(_axes(path, copy[path])).contiguous() for name, path in paths.items()}


def _step(arrays: Arrays, path: Path) -> int:
    """The number of iterations done: that of the state, else the one in the name, `checkpoint_N`."""
    in_state = [array for keys, array in arrays.items() if keys[-1] == "step" and len(keys) <= 2 and array.shape == ()]
    in_name = re.search(r"(?:^|_)(\d{1,15})$", path.stem)
    return max([0, *(int(array.read()) for array in in_state)]) or int(in_name[1] if in_name else 0)


def _hash(path: Path) -> str:
    """SHA-256 of the file, or over the names and hashes of all files of the folder."""
    if path.is_file():
        return sha256_file(path)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return sha256_json({str(file.relative_to(path)): sha256_file(file) for file in files})
