"""A run as it is shared: a folder, or a model of the Hugging Face hub, of safetensors and JSON alone.

`config.json`: {"format", "library_name", "ema": the average meant first, "weights": {average: {"file", "sha256"}},
"config": the settings of the run, "meta": the rest of a checkpoint's}. `model.safetensors` holds the first average;
others have files of their own. Nothing else in the folder is read.
"""

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from meanflow.errors import AssetError, UserError
from meanflow.files import read_json, sha256_file, write_json

if TYPE_CHECKING:  # these import PyTorch: seconds that other readers of a folder do not need
    from torch import Tensor

    from meanflow.training.checkpoint import Checkpoint
    from meanflow.training.config import RunConfig

FORMAT = 1
LIBRARY = "meanflow-kit"
CONFIG, WEIGHTS_FILE = "config.json", "model.safetensors"
OTHER_FILES = {".pt", ".pth", ".safetensors", ".json", ".yaml", ".yml", ".npz"}
HUB_PART = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_shared(folder: Path) -> bool:
    """Whether this is a shared folder; a run's has checkpoints."""
    return (folder / CONFIG).is_file() and not (folder / "checkpoints").exists()


def is_hub_name(what: Path) -> bool:
    """Whether `what` is to be looked up on the hub: owner/name, where neither the path nor the folder owner is here."""
    parts = what.parts
    named = len(parts) == 2 and all(HUB_PART.fullmatch(part) for part in parts) and what.suffix not in OTHER_FILES
    return named and not what.exists() and not what.parent.is_dir()


# --- written -----------------------------------------------------------------------------------------------------


def weights_file(ema: str, first: str) -> str:
    """model.safetensors for the average meant first, model-ema0.999.safetensors or model-weights.safetensors."""
    if ema == first:
        return WEIGHTS_FILE
    return f"model-{'ema' if _is_decay(ema) else ''}{ema}.safetensors"


def write_shared(folder: Path, config: "RunConfig", averages: Mapping[str, dict[str, "Tensor"]], meta: Any) -> None:
    """`config.json` and the weights of a run, in an existing folder.

    averages: {decay, or "weights": {name: tensor}}, the one meant first at the front; meta: the checkpoint's. Raises
    AssetError if safetensors is not installed, or the disk refuses.
    """
    from meanflow.training import settings

    save_file = _safetensors().save_file
    first, weights = next(iter(averages)), {}
    for ema, tensors in averages.items():
        path = folder / weights_file(ema, first)
        try:
            save_file({name: x.contiguous() for name, x in tensors.items()}, path, metadata={"format": "pt"})
            path.chmod(0o644)  # safetensors leaves it to its owner alone
        except Exception as error:  # of a full disk, say, one of its own kinds
            raise AssetError(f"{path}: cannot be written ({_reason(error)})") from error
        weights[ema] = {"file": path.name, "sha256": sha256_file(path)}
    content = {"format": FORMAT, "library_name": LIBRARY, "ema": first, "weights": weights}
    content |= {
        "config": settings.to_tree(config),
        "meta": {k: v for k, v in meta.items() if k not in ("config", "spike_guard")},
    }
    write_json(folder / CONFIG, content)


def paths_in(config: "RunConfig") -> dict[str, str]:
    """{dotted key: absolute path of this machine} of the settings, which a shared config.json tells everyone."""
    from meanflow.training import settings

    flat = settings.flatten(settings.to_tree(config))
    return {key: x for key, x in flat.items() if isinstance(x, str) and x.startswith(("/", "~"))}


# --- read --------------------------------------------------------------------------------------------------------


def read_shared(folder: Path) -> tuple[Path, "Checkpoint"]:
    """The weights' file and the content of a shared folder, in a checkpoint's form without an optimiser's state.

    `meta["ema"]` is the average meant first. Raises AssetError if something is missing, damaged or of another kind.
    """
    from meanflow.training.checkpoint import Checkpoint, check_kinds
    from meanflow.training.config import WEIGHTS, config_from_tree

    file = folder / CONFIG
    content = read_json(file)
    try:
        if content["format"] != FORMAT:
            raise AssetError(f"{file}: has format {content['format']}, this version reads {FORMAT}")
        first, listed = content["ema"], content["weights"]
        names = {ema: entry["file"] for ema, entry in listed.items()}
        expected = {ema: weights_file(ema, first) for ema in listed}
        if first not in names or not all(map(_is_ema, names)) or names != expected:
            raise ValueError
        averages = {ema: _tensors(folder / entry["file"], entry["sha256"]) for ema, entry in listed.items()}
        model = averages.pop(WEIGHTS, {})
        checkpoint = Checkpoint(model, averages, {}, content["meta"] | {"config": content["config"], "ema": first})
        check_kinds(checkpoint)
        if not all(isinstance(name, str) for name in list(checkpoint.meta["data"]["classes"] or [])):
            raise TypeError
        config = config_from_tree(content["config"], str(file))
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise AssetError(f"{file}: is not of a shared run of this project (bash run.sh share makes one)") from error
    _refuse_misfits(config, checkpoint, folder)
    return folder / WEIGHTS_FILE, checkpoint


def _refuse_misfits(config: "RunConfig", checkpoint: "Checkpoint", folder: Path) -> None:
    """Before memory is taken for a network of the size that the settings ask for. Raises AssetError."""
    import torch

    from meanflow.training.state import build_network

    try:
        shapes = {name: p.shape for name, p in build_network(config, torch.device("meta")).named_parameters()}
    except RuntimeError as error:
        raise AssetError(f"{folder / CONFIG}: no network is as large as this one's settings ask for") from error
    for ema, tensors in checkpoint.kept.items():
        found = {name: x.shape for name, x in tensors.items()}
        wrong = sorted(name for name in shapes.keys() | found.keys() if shapes.get(name) != found.get(name))
        if wrong:
            raise AssetError(
                f"{folder}: the tensors of {ema} do not fit the network of {CONFIG}: {len(wrong)} differ, such as "
                f"{wrong[0]}"
            )


def _is_decay(ema: str) -> bool:
    try:
        return repr(float(ema)) == ema
    except ValueError:
        return False


def _is_ema(ema: str) -> bool:
    return ema == "weights" or _is_decay(ema)


def _tensors(path: Path, digest: str) -> dict[str, "Tensor"]:
    if not path.is_file():
        raise AssetError(f"{path}: is missing, though {CONFIG} names it")
    if sha256_file(path) != digest:
        raise AssetError(f"{path}: is damaged (its checksum differs from the one in {CONFIG})")
    load_file = _safetensors().load_file
    try:
        return load_file(path, device="cpu")
    except Exception as error:  # what its reader raises is not documented
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise AssetError(f"{path}: cannot be read as safetensors ({reason})") from error


def _safetensors() -> Any:
    try:
        import safetensors.torch
    except ImportError as error:
        raise _missing("a shared run is safetensors, a package that is missing here", "safetensors") from error
    return safetensors.torch


def _missing(what: str, *packages: str) -> AssetError:
    return AssetError(f"{what}: {sys.executable} -m pip install {' '.join(packages)}")


# --- the hub -----------------------------------------------------------------------------------------------------


def download(name: str) -> Path:
    """The folder of the hub's model `name` in huggingface_hub's cache, brought up to date where there is a network.

    Raises AssetError if it cannot be downloaded and is not in the cache.
    """
    hub = _hub(f"{name} is no run, checkpoint or shared folder here; as a name on the hub it needs huggingface_hub")
    try:
        with _quiet():
            return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, "model*.safetensors"]))
    except Exception as error:  # the hub's client has a dozen kinds, some of its HTTP library's
        raise AssetError(
            f"{name}: there is no such run, checkpoint or shared folder here, and as a model of the Hugging Face hub "
            f"it is neither in the cache nor can it be downloaded ({_reason(error)})"
        ) from error


def push(folder: Path, name: str, files: Sequence[str], private: bool = False, update: bool = False) -> str:
    """Upload `files` of a shared folder as the hub's model `name`; its address.

    update: whether the model may be there already. Raises UserError if it is and may not, AssetError if the hub cannot
    be reached or refuses.
    """
    hub = _hub("--push needs huggingface_hub")
    by_hand = f"{folder} is complete; to upload it later: hf upload {name} {folder}"
    try:
        with _quiet():
            api = hub.HfApi()
            if not update and api.repo_exists(name, repo_type="model"):
                raise UserError(f"--push {name}: is there already; --update replaces its files ({by_hand})")
            api.create_repo(name, repo_type="model", private=private, exist_ok=update)
            api.upload_folder(repo_id=name, folder_path=folder, allow_patterns=list(files), repo_type="model")
    except UserError:
        raise
    except Exception as error:
        raise AssetError(f"--push {name}: cannot be uploaded ({_reason(error)}); {by_hand}") from error
    return f"https://huggingface.co/{name}"


def _hub(what: str) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise _missing(what, "huggingface-hub", "safetensors") from error
    return huggingface_hub


@contextmanager
def _quiet() -> Iterator[None]:
    """The hub's client reports each of its attempts; one line at the end says more."""
    from huggingface_hub.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).removeprefix("Got: ")
    for end in (" For more information", " An error happened", ". "):
        text = text.partition(end)[0]
    return text[:160] or type(error).__name__
