"""Codecs: pixels rearranged exactly, and diffusers' AutoencoderKL with everything that can be wrong with its files."""

import json
import shutil
import sys

import pytest
import torch
from latent_helpers import save_tiny_vae

from meanflow.data.codec import SD_SCALE, open_codec
from meanflow.errors import AssetError, ConfigError
from meanflow.files import sha256_file

SPACE_TO_DEPTH = ("space-to-depth", "cpu", "fp32", 4)


def some_images(n: int = 3, channels: int = 3, size: int = 16) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


# Space to depth


@pytest.mark.parametrize("channels", [1, 3])
def test_space_to_depth_round_trip_is_exact(channels):
    codec = open_codec(*SPACE_TO_DEPTH)
    every = torch.arange(256, dtype=torch.uint8).repeat(channels).view(1, channels, 16, 16)
    mean, std = codec.encode(every)
    assert mean.shape == (1, *codec.latent_shape(channels, 16)) == (1, 4 * channels, 8, 8)
    assert (std == 0).all() and mean.min() == -1 and mean.max() == 1 and codec.scale == 1
    stored = mean.half().float()  # as it is kept on disk
    back = codec.decode(stored * codec.scale)
    assert torch.equal((127.5 * back + 128).to(torch.uint8), every)  # the evaluator's truncation


def test_space_to_depth_turns_2x2_blocks_into_channels():
    image = some_images(1, 1, 8)
    mean, _ = open_codec(*SPACE_TO_DEPTH).encode(image)
    block = mean[0, :, 1, 2] * 127.5 + 127.5
    assert block.round().tolist() == image[0, 0, 2:4, 4:6].flatten().tolist()


def test_space_to_depth_needs_an_even_size():
    with pytest.raises(ConfigError, match=r"even data\.image_size, not 7"):
        open_codec(*SPACE_TO_DEPTH).latent_shape(1, 7)


# AutoencoderKL


@pytest.fixture(scope="module")
def vae(tmp_path_factory):
    pytest.importorskip("diffusers")
    return save_tiny_vae(tmp_path_factory.mktemp("vae"))


def opened(vae, precision="fp32", batch=2):
    return open_codec(str(vae), "cpu", precision, batch)


def test_the_vae_is_diffusers_own(vae):
    from diffusers import AutoencoderKL

    codec, plain, images = opened(vae), AutoencoderKL.from_pretrained(vae), some_images()
    assert codec.scale == SD_SCALE == 0.18215
    assert codec.record == {"name": str(vae), "sha256": sha256_file(vae / "diffusion_pytorch_model.safetensors")}
    assert codec.latent_shape(3, 16) == (4, 8, 8)
    mean, std = codec.encode(images)
    with torch.no_grad():
        latent = plain.encode(images.float() / 127.5 - 1).latent_dist
        decoded = plain.decode(latent.mean).sample
    assert mean.shape == (3, 4, 8, 8) and mean.dtype == std.dtype == torch.float32
    torch.testing.assert_close(mean, latent.mean)
    torch.testing.assert_close(std, latent.std)
    torch.testing.assert_close(codec.decode(mean * SD_SCALE), decoded, atol=1e-5, rtol=1e-5)


def test_decoding_in_parts_and_in_bf16(vae):
    z = torch.randn(5, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    whole, parts, half = opened(vae, batch=5).decode(z), opened(vae, batch=2).decode(z), opened(vae, "bf16").decode(z)
    torch.testing.assert_close(parts, whole, atol=1e-5, rtol=1e-5)
    assert half.dtype == torch.float32 and not whole.requires_grad
    difference = (half - whole).abs().max()
    assert 0 < difference < 0.05 * whole.abs().max()


def test_the_decoder_as_a_module_is_decode(vae):
    codec, z = open_codec(str(vae), "cpu", "fp32", 2), torch.randn(3, 4, 4, 4)
    torch.testing.assert_close(codec.decoder()(z), codec.decode(z))


def test_the_vae_computes_in_exact_float32_despite_training_settings(vae, monkeypatch):
    codec, found = opened(vae), []
    for part in (codec.vae.encoder, codec.vae.decoder):
        part.register_forward_pre_hook(lambda *_: found.append(torch.backends.cudnn.allow_tf32))
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    codec.encode(some_images())
    codec.decode(torch.zeros(1, 4, 8, 8))
    assert found == [False, False] and torch.backends.cudnn.allow_tf32


def test_images_that_the_vae_does_not_take(vae):
    with pytest.raises(ConfigError, match="images of 3 channels, not 1"):
        opened(vae).latent_shape(1, 16)
    with pytest.raises(ConfigError, match="15 is not a multiple of 2"):
        opened(vae).latent_shape(3, 15)


def refused(vae, *texts):
    with pytest.raises(AssetError) as caught:
        opened(vae)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"data.vae {vae}") and all(text in line for text in texts), line


@pytest.fixture
def copy(vae, tmp_path):
    """Files of the same VAE, to be damaged."""
    return shutil.copytree(vae, tmp_path / "vae")


def edit_config(folder, remove: str = "", **changes):
    tree = json.loads((folder / "config.json").read_text()) | changes
    tree.pop(remove, None)
    (folder / "config.json").write_text(json.dumps(tree))


@pytest.mark.parametrize(
    "change, text",
    [
        ({"scaling_factor": 0.13025}, "has scaling_factor 0.13025"),
        ({"scaling_factor": 0.18125}, "has scaling_factor 0.18125"),  # the typo that travelled
        ({"shift_factor": 0.1159}, "has shift_factor"),
        ({"latents_mean": [0.0] * 4}, "has latents_mean"),
        ({"_class_name": "AutoencoderTiny"}, "of the kind AutoencoderTiny"),
        ({"latent_channels": 8}, "cannot be loaded"),
        ({"layers_per_block": 2}, "does not fit its config.json (missing"),
        ({"layers_per_block": 0}, "does not fit its config.json (unexpected"),
    ],
)
def test_another_vae_than_its_files_should_be(copy, change, text):
    edit_config(copy, **change)
    refused(copy, text)


def test_a_config_that_states_no_scale_has_stable_diffusions(copy):
    edit_config(copy, remove="scaling_factor")
    assert opened(copy).scale == SD_SCALE


def test_files_that_are_missing_or_damaged(copy):
    weights = copy / "diffusion_pytorch_model.safetensors"
    whole = weights.read_bytes()
    for damage in (b"", b"junk", whole[:-9], whole[:100], b"\xff" * 8 + whole[8:]):
        weights.write_bytes(damage)
        refused(copy, "cannot be loaded")
    weights.write_bytes(whole)
    (copy / "config.json").write_text("{")
    refused(copy, "config.json is missing or not")
    weights.unlink()
    (copy / "diffusion_pytorch_model.bin").write_bytes(b"a pickle, perhaps")
    refused(copy, "there is no diffusion_pytorch_model.safetensors", "can run code")


@pytest.fixture
def offline_hub(monkeypatch, tmp_path):
    """The hub's cache, without a network."""
    hub = pytest.importorskip("huggingface_hub")
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


@pytest.mark.parametrize("name", ["stabilityai/sd-vae-ft-mse", "no/such/name", "long" * 99])
def test_a_hub_name_without_network(offline_hub, name):
    refused(name, "cannot be downloaded", f"hf download {name} config.json")


def test_a_hub_name_that_is_cached(vae, offline_hub):
    repository = offline_hub / "models--some--vae"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc")
    shutil.copytree(vae, repository / "snapshots" / "0123abc")
    assert opened("some/vae").record == {"name": "some/vae", "sha256": opened(vae).record["sha256"]}


def test_the_home_folder_is_expanded(copy, monkeypatch):
    monkeypatch.setenv("HOME", str(copy.parent))
    assert opened("~/vae").record["sha256"] == opened(copy).record["sha256"]


def test_without_diffusers(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    refused("stabilityai/sd-vae-ft-mse", "-m pip install diffusers safetensors huggingface-hub")
    (tmp_path / "diffusion_pytorch_model.safetensors").touch()
    refused(tmp_path, "-m pip install diffusers safetensors huggingface-hub")
