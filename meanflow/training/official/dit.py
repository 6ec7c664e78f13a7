"""Official DiT and SiT checkpoints as the start of a run (`init.from`).

Both releases have one network: our DiT with a single time embedder, whose output has twice the channels (the second
half, a learnt variance, is cut). What the network means differs, and the file does not say which it is:

* SiT predicts the velocity x − ε of the same path at its time s = 1 − t in [0, 1], which it embeds as it is. So
  v(z, t) = −v_SiT(z, 1 − t): the output layer is negated, and since the features of 1 − t are a rotation of those of t,
  so are the weights of the embedder's first layer.
* DiT predicts the noise of a diffusion process at steps 0 … 999, of inputs with another scale. Its velocity depends on
  t through both, so no map of weights gives it: the weights are a start and no more. See `steps_in_unit_time`.

The other embedders (of t − r) start with a last layer of zeros, so u(z, r, t) does not depend on r at first and is the
teacher's velocity.
"""

import argparse
import math
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit import DiT
from dit.embedding import TimeEmbedder
from meanflow.errors import AssetError, ConfigError
from meanflow.training.checkpoint import load_tensors
from meanflow.training.config import WEIGHTS, InitConfig
from meanflow.training.official.names import dit_name, listed

Release = Literal["sit", "dit"]
MARKS = ("t_embedder.mlp.0.weight", "blocks.0.adaLN_modulation.1.weight", "final_layer.adaLN_modulation.1.weight")
WHAT = ("missing", "unknown", "of another shape")
POSITIONS = "pos_embed"
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # by width, of both releases: no tensor has the number in its shape
STEPS, BETAS = 1000, (1e-4, 0.02)  # DDPM's linear schedule, with which DiT was trained
BEND, STEEPEST = 3.0, 3e3  # slope of a unit times the distance to the next one, and its limit (float32)
CUTOFF = 1e-6  # singular values of the fit below this part of the largest are left out


@dataclass(frozen=True)
class Teacher:
    """Tensors for our network: those of the file, and zeros for others.

    which: ema or model of a training state, "weights" of a plain file. said: how they were changed, in words.
    """

    tensors: dict[str, Tensor]
    zeros: dict[str, Tensor]
    which: str
    said: str


def read_teacher(path: Path, network: nn.Module, config: InitConfig) -> Teacher | None:
    """The official DiT or SiT checkpoint at `path` as weights of `network`; None if the file is something else.

    Only tensors, plain containers and `argparse.Namespace` are unpickled. Raises AssetError if names are missing or
    left over, ConfigError if it is for a network of another shape, naming the settings to change.
    """
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = load_tensors(path, mmap=zipfile.is_zipfile(path))
    except Exception:  # a damaged file raises nearly anything in PyTorch's reader
        return None  # the caller reports the error
    copies = {WEIGHTS: content} if _is_network(content) else {}
    if isinstance(content, dict):
        copies |= {name: content[name] for name in ("ema", "model") if _is_network(content.get(name))}
    if not copies:
        return None
    which = _chosen(copies, config, path)
    held = {name: value for name, value in copies[which].items() if isinstance(value, Tensor)}
    if not isinstance(network, DiT):
        raise ConfigError(f"init.from: {path} is an official DiT or SiT checkpoint: it needs model.kind=dit")
    _refuse_other_sizes(held, network, path)
    return converted(held, network, config.teacher or release_of(path), which, path)


def release_of(path: Path) -> Release:
    """By the file's name, as DiT-XL-2-256x256.pt and SiT-XL-2-256.pt; SiT if it says neither."""
    return "dit" if re.search(r"(?<![a-z])dit(?![a-z])", path.name.lower()) else "sit"


def _is_network(content: Any) -> bool:
    return isinstance(content, dict) and any(isinstance(content.get(name), Tensor) for name in MARKS)


def _chosen(copies: dict[str, Any], config: InitConfig, path: Path) -> str:
    """init.ema: null takes the average if there is one, "weights" the others. A plain file has one network."""
    if isinstance(config.ema, float):
        raise ConfigError(
            f"init.ema: {path} names no decays: it holds {', '.join(copies)}; set init.ema=null or weights"
        )
    order = ("model", WEIGHTS, "ema") if config.ema == WEIGHTS else ("ema", WEIGHTS, "model")
    return next(name for name in order if name in copies)


def _refuse_other_sizes(held: dict[str, Tensor], network: DiT, path: Path) -> None:
    """Raises ConfigError, naming the settings, if the checkpoint's shapes are those of another configuration."""
    model = network.config
    blocks = {name.split(".")[1] for name in held if name.startswith("blocks.")}
    there, patch = {"depth": len(blocks)}, model.patch
    if (patches := held.get("x_embedder.proj.weight")) is not None and patches.ndim == 4:
        width, channels, patch, _ = patches.shape
        there |= {"width": width, "channels": channels, "patch": patch, "heads": HEADS.get(width, model.heads)}
    if (labels := held.get("y_embedder.embedding_table.weight")) is not None:
        there["classes"] = labels.shape[0] - 1
    if (positions := held.get(POSITIONS)) is not None and positions.ndim == 3:
        there["image_size"] = math.isqrt(positions.shape[1]) * patch
    wrong = {name: value for name, value in there.items() if getattr(model, name) != value}
    if wrong:
        here = ", ".join(f"{name} {getattr(model, name)}" for name in wrong)
        settings = " ".join(f"model.{name}={value}" for name, value in wrong.items())
        raise ConfigError(f"init.from: {path} is of another size than this network ({here}): set {settings}")
    if "t" not in network.time_embed:
        raise ConfigError(
            f"init.from: {path} embeds t, which model.conditioning={model.conditioning} does not: set t,t-r"
        )


@torch.no_grad()
def converted(held: dict[str, Tensor], network: DiT, release: Release, which: str, path: Path) -> Teacher:
    """See the module. Raises AssetError unless names and shapes fit; nothing of `network` is changed."""
    ours = {name: p for name, p in network.named_parameters() if not _is_other_embedder(name)}
    names = {name: dit_name(name) for name in ours}
    missing = [name for name in names.values() if name not in held]
    unknown = [name for name in held if name not in names.values() and name != POSITIONS]
    tensors = {name: held[theirs].float() for name, theirs in names.items() if theirs in held}
    learnt = _cut_variance(tensors, network)
    other = [names[name] for name, tensor in tensors.items() if tensor.shape != ours[name].shape]
    if POSITIONS in held and not _same_positions(held[POSITIONS], network):
        other.append(f"{POSITIONS} (other than the fixed sines and cosines)")
    if wrong := [line for line in map(listed, (missing, unknown, other), WHAT) if line]:
        raise AssetError(f"{path}: is no official DiT or SiT checkpoint of this network: {'; '.join(wrong)}")
    said = [_as_velocity(tensors) if release == "sit" else _as_start(tensors)]
    if learnt:
        said.append(f"the first {network.config.channels} of {2 * network.config.channels} output channels")
    last = [name for name, _ in network.named_parameters() if _is_other_embedder(name) and ".fc2." in name]
    if last:
        said.append("what embeds t − r or r gives zero at first")
    return Teacher(
        tensors, {name: torch.zeros_like(network.get_parameter(name)) for name in last}, which, "; ".join(said)
    )


def _is_other_embedder(name: str) -> bool:
    return name.startswith("time_embed.") and not name.startswith("time_embed.t.")


def _cut_variance(tensors: dict[str, Tensor], network: DiT) -> bool:
    """Keep the output layer's first C of 2C channels at each position of a patch; False if there are only C."""
    positions, channels = network.config.patch**2, network.config.channels
    for leaf in ("weight", "bias"):
        rows = tensors.get(f"final.linear.{leaf}")
        if rows is None or rows.shape[0] != 2 * positions * channels:
            return False
        tensors[f"final.linear.{leaf}"] = rows.unflatten(0, (positions, -1))[:, :channels].flatten(0, 1)
    return True


def _same_positions(there: Tensor, network: DiT) -> bool:
    return there.shape == network.positions.shape and torch.allclose(there.float(), network.positions.cpu(), atol=1e-4)


def _as_velocity(tensors: dict[str, Tensor]) -> str:
    """SiT: v(z, t) = −v_SiT(z, 1 − t), exactly."""
    for leaf in ("weight", "bias"):
        tensors[f"final.linear.{leaf}"] = -tensors[f"final.linear.{leaf}"]
    weight = tensors["time_embed.t.fc1.weight"].double()  # (D, 256)
    f = TimeEmbedder(1).frequencies.double()  # (128,)
    of_cos, of_sin = weight.chunk(2, dim=1)
    # cos((1 − t) f) = cos f cos tf + sin f sin tf, sin((1 − t) f) = sin f cos tf − cos f sin tf
    rotated = [of_cos * f.cos() + of_sin * f.sin(), of_cos * f.sin() - of_sin * f.cos()]
    tensors["time_embed.t.fc1.weight"] = torch.cat(rotated, dim=1).float()
    return (
        "as SiT's velocity x − ε at its time 1 − t, which is not multiplied by 1000: output negated, time reversed, so "
        "u(z, t, t) is its velocity"
    )


def _as_start(tensors: dict[str, Tensor]) -> str:
    """DiT: our t-embedder, refitted to what DiT's gives at its steps. `steps_in_unit_time` says at which t.

    Our frequencies are at most 1 and DiT's times 1000 are not, so the first layer is replaced: its units, SiLUs of
    sin t − sin t_j, bend one after the other along the steps. The second layer is the least-squares fit.
    """
    theirs = {
        name: tensors[f"time_embed.t.{name}"].double() for name in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias")
    }
    hidden = F.silu(F.linear(features(torch.arange(STEPS)), theirs["fc1.weight"], theirs["fc1.bias"]))
    wanted = F.linear(hidden, theirs["fc2.weight"], theirs["fc2.bias"])  # (1000, D)
    t, width = steps_in_unit_time(), len(theirs["fc1.bias"])
    knots = torch.quantile(t, torch.linspace(0, 1, width, dtype=t.dtype))  # (D,)
    slopes = (BEND / torch.gradient(knots)[0]).clamp(max=STEEPEST)
    bends = F.silu((t.sin()[:, None] - knots.sin()) * slopes)  # (1000, D)
    bends = torch.cat([bends, torch.ones_like(t)[:, None]], dim=1)
    fitted = torch.linalg.lstsq(bends, wanted, rcond=CUTOFF, driver="gelsd").solution  # (D + 1, D)
    first = torch.zeros_like(theirs["fc1.weight"])
    first[:, first.shape[1] // 2] = slopes  # the sine of frequency 1
    new = {"fc1.weight": first, "fc1.bias": -slopes * knots.sin(), "fc2.weight": fitted[:-1].T, "fc2.bias": fitted[-1]}
    tensors.update({f"time_embed.t.{name}": value.float().contiguous() for name, value in new.items()})
    error = (bends @ fitted - wanted).norm() / (wanted - wanted.mean(0)).norm()
    return (
        "as DiT's noise prediction, which is only a start: no map of weights makes u(z, t, t) its velocity; its steps "
        f"0 … 999 (time × 1000) are refitted at the t of equal signal-to-noise ratio, with an error of {error:.1%}"
    )


def features(time: Tensor) -> Tensor:
    """What `TimeEmbedder` embeds, in float64: (N,) → (N, 256)."""
    angles = time[:, None] * TimeEmbedder(1).frequencies.double()
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def steps_in_unit_time() -> Tensor:
    """(1000,): the t at which (1 − t)x + tε has the signal-to-noise ratio of DiT's step k, √ᾱ x + √(1 − ᾱ) ε."""
    alpha_bar = (1 - torch.linspace(*BETAS, STEPS, dtype=torch.float64)).cumprod(0)
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    return noise / (signal + noise)
