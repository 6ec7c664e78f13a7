"""Between images and latents: the Stable Diffusion VAE, or a rearrangement of pixels that needs no weights.

A codec gives the mean and the standard deviation of an image's latent as the VAE has them ("unscaled"). What the
network sees is (mean + std·noise)·scale, and that is also what `decode` takes.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from meanflow.errors import AssetError, ConfigError
from meanflow.files import sha256_file
from meanflow.precision import exact_float32

SD_SCALE = 0.18215  # of Stable Diffusion's VAEs, which brings their latents to about unit variance
SPACE_TO_DEPTH = "space-to-depth"
WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"


class Codec(Protocol):
    """Encodes images and decodes latents; on one device, without gradients."""

    scale: float
    record: dict[str, str | None]  # {"name", "sha256" of the weights}, which latents are checked against

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        """(C, h, w) of the latent of an image with `channels` and `image_size` squared pixels.

        Raises ConfigError if such images cannot be encoded.
        """

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """uint8 (n, channels, S, S) on any device → mean and std, float32 (n, C, h, w), unscaled, on the codec's."""

    def decode(self, z: Tensor) -> Tensor:
        """Latents in the network's range (n, C, h, w) → float32 (n, channels, S, S), about [−1, 1], not clamped."""

    def decoder(self) -> nn.Module:
        """What `decode` computes, in float32 and all at once: a module that can be traced into a graph."""


class SpaceToDepth:
    """2×2 pixels become four channels, in [−1, 1], without spread: a latent path that needs no weights."""

    scale = 1.0
    record = {"name": SPACE_TO_DEPTH, "sha256": None}  # noqa: RUF012 - a constant

    def __init__(self, device: torch.device | str):
        self.device = torch.device(device)

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        if image_size % 2:
            raise ConfigError(f"data.vae {SPACE_TO_DEPTH} needs an even data.image_size, not {image_size}")
        return 4 * channels, image_size // 2, image_size // 2

    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        mean = F.pixel_unshuffle(to_network_range(images.to(self.device)), 2)
        return mean, torch.zeros_like(mean)

    def decode(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z.to(self.device).float(), 2)

    def decoder(self) -> nn.Module:
        return nn.PixelShuffle(2)


class AutoencoderCodec:
    """diffusers' AutoencoderKL with weights from a local folder."""

    scale = SD_SCALE

    def __init__(self, name: str, folder: Path, device: torch.device | str, decode_precision: str, decode_batch: int):
        """Raises AssetError: no diffusers, or weights that are missing, damaged or of another kind or scale."""
        self.device, self.decode_batch = torch.device(device), decode_batch
        self.autocast = {
            "device_type": self.device.type,
            "dtype": torch.bfloat16,
            "enabled": decode_precision == "bf16",
        }
        self.vae = load_autoencoder(name, folder).to(self.device)
        self.record = {"name": name, "sha256": sha256_file(folder / WEIGHTS)}

    def latent_shape(self, channels: int, image_size: int) -> tuple[int, int, int]:
        config = self.vae.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if channels != config.in_channels:
            raise ConfigError(
                f"data.vae {self.record['name']} encodes images of {config.in_channels} channels, not {channels}"
            )
        if image_size % factor:
            raise ConfigError(
                f"data.image_size {image_size} is not a multiple of {factor}, which data.vae "
                f"{self.record['name']} needs"
            )
        return config.latent_channels, image_size // factor, image_size // factor

    @torch.no_grad()
    def encode(self, images: Tensor) -> tuple[Tensor, Tensor]:
        with exact_float32():
            latent = self.vae.encode(to_network_range(images.to(self.device))).latent_dist
        return latent.mean, latent.std

    @torch.no_grad()
    def decode(self, z: Tensor) -> Tensor:
        images = []
        for part in z.split(self.decode_batch):
            with exact_float32(), torch.autocast(**self.autocast):
                images.append(self.vae.decode(part.to(self.device).float() / self.scale).sample.float())
        return torch.cat(images)

    def decoder(self) -> nn.Module:
        return ScaledDecoder(self.vae, self.scale)


class ScaledDecoder(nn.Module):
    """z (n, C, h, w), in the network's range → the VAE's images of z / scale."""

    largest_batch = 63  # that can be traced: from 64 on diffusers' upsampling makes a copy first

    def __init__(self, vae: nn.Module, scale: float):
        super().__init__()
        self.vae, self.scale = vae, scale

    def forward(self, z: Tensor) -> Tensor:
        return self.vae.decode(z / self.scale, return_dict=False)[0]


def to_network_range(images: Tensor) -> Tensor:
    """uint8 → float32 in [−1, 1]."""
    return images.float().div_(127.5).sub_(1)


def open_codec(vae: str, device: torch.device | str, decode_precision: str, decode_batch: int) -> Codec:
    """The codec that `data.vae` names: "space-to-depth", a folder in diffusers' layout, or a name on the HF hub.

    decode_precision: "fp32" or "bf16" (autocast) of the decoder; encoding is always float32. Raises AssetError where
    diffusers or the weights are missing, or the weights are damaged or of another kind or scale.
    """
    if vae == SPACE_TO_DEPTH:
        return SpaceToDepth(device)
    return AutoencoderCodec(vae, _locate(vae), device, decode_precision, decode_batch)


def scale_of(vae: str) -> float:
    """The one number that `data.vae`'s latents are multiplied by for the network."""
    return SpaceToDepth.scale if vae == SPACE_TO_DEPTH else SD_SCALE


def local_weights(vae: str) -> Path | None:
    """The weights of a VAE in a local folder; None if `vae` is not one."""
    path = Path(os.path.expanduser(vae)) / WEIGHTS
    return path if os.path.exists(path) else None


def load_autoencoder(name: str, folder: Path) -> Any:
    """An AutoencoderKL in evaluation mode, from `folder`'s config.json and safetensors. Never runs code from it."""
    try:
        from diffusers import AutoencoderKL  # here: it is needed for VAEs alone, and takes seconds to import
        from diffusers.utils import logging
    except ImportError as error:
        raise _no_diffusers(name) from error
    _refuse_other_kinds(name, folder)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it recommends packages that make no difference here
    try:
        vae, report = AutoencoderKL.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, low_cpu_mem_usage=False, output_loading_info=True
        )
    except Exception as error:  # what a damaged file raises in its readers is not documented
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise AssetError(f"data.vae {name}: {folder / WEIGHTS} cannot be loaded ({reason})") from error
    finally:
        logging.set_verbosity(before)
    for what in ("missing_keys", "unexpected_keys"):
        if report[what]:
            key = sorted(report[what])[0]
            raise AssetError(f"data.vae {name}: {folder / WEIGHTS} does not fit its {CONFIG} ({what[:-5]} {key})")
    return vae.eval().requires_grad_(False)


def _no_diffusers(name: str) -> AssetError:
    needed = "diffusers safetensors huggingface-hub"  # requirements-imagenet.txt
    return AssetError(f"data.vae {name} needs diffusers: {sys.executable} -m pip install {needed}")


def _refuse_other_kinds(name: str, folder: Path) -> None:
    """Raises AssetError unless this is an AutoencoderKL with Stable Diffusion's scale."""
    file = folder / CONFIG
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
        kind = config["_class_name"]
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise AssetError(f"data.vae {name}: {file} is missing or not a VAE's in diffusers' layout") from error
    if kind != "AutoencoderKL":
        raise AssetError(f"data.vae {name} is of the kind {kind}, not AutoencoderKL")
    scale = config.get("scaling_factor", SD_SCALE)  # the first files of Stable Diffusion do not state it
    shift = next((key for key in ("shift_factor", "latents_mean", "latents_std") if config.get(key) is not None), None)
    if scale != SD_SCALE or shift:
        found = f"has {shift}" if shift else f"has scaling_factor {scale}"
        raise AssetError(f"data.vae {name} {found}, but latents here are scaled by {SD_SCALE} alone: use sd-vae-ft-mse")


def _locate(vae: str) -> Path:
    """The folder of a VAE's files: `vae` itself, or where the hub's files are cached, downloaded first if need be."""
    folder = Path(os.path.expanduser(vae))
    if os.path.isdir(folder):
        if local_weights(vae) is None:
            raise AssetError(f"data.vae {vae}: there is no {WEIGHTS} (other formats can run code, so are not loaded)")
        return folder
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.utils import logging
    except ImportError as error:
        raise _no_diffusers(vae) from error
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # it reports each of its attempts; one line at the end says more
    try:
        for file in (CONFIG, WEIGHTS):
            path = _cached(hf_hub_download, vae, file) or hf_hub_download(vae, file)
    except Exception as error:  # the hub's client has a dozen kinds, some of its HTTP library's
        reason = " ".join(str(error).split()).partition(". ")[0][:160] or type(error).__name__
        raise AssetError(
            f"data.vae {vae} is no folder, not in the Hugging Face cache, and cannot be downloaded ({reason}): where "
            f"there is a network run `hf download {vae} {CONFIG} {WEIGHTS} --local-dir vae`, and set data.vae to it"
        ) from error
    finally:
        logging.set_verbosity(before)
    return Path(path).parent


def _cached(download: Any, vae: str, file: str) -> str | None:
    """Asked first, so that a cached VAE neither waits for the network nor changes under a run."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        return download(vae, file, local_files_only=True)
    except LocalEntryNotFoundError:
        return None
