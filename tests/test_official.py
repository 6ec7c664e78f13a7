"""Official checkpoints: our random weights, written under the release's list of names, come back bit-equal."""

import argparse
from pathlib import Path

import pytest
import torch
from fid_helpers import fid, grey_blobs

from eval import official
from eval.convert import main as convert
from meanflow.errors import AssetError, run_main
from meanflow.training.config import config_to_yaml, load_config
from meanflow.training.model import generate, load_model
from meanflow.training.official import EMAS, official_names, read_official
from unet import UNet

LIST = Path(__file__).parent / "data" / "official_unet.txt"  # names and shapes of the release, buffers last
CPU = torch.device("cpu")


def official_list() -> tuple[dict[str, tuple[int, ...]], dict[str, tuple[int, ...]]]:
    """({parameter: shape}, {buffer: shape})."""
    parameters, buffers = LIST.read_text().split("# buffers (constants)\n")
    return tuple(
        {name: tuple(int(n) for n in shape.strip("[]").split(",")) for name, _, shape in map(split, text.splitlines())}
        for text in (parameters, buffers)
    )


def split(line: str) -> tuple[str, str, str]:
    return line.partition(" ")


def fill(names, tensors, seed: int) -> dict[str, torch.Tensor]:
    """Random tensors by name, at the scale that keeps a forward pass finite."""
    generator = torch.Generator().manual_seed(seed)
    return {name: 0.05 * torch.randn(tensors[name].shape, generator=generator) for name in names}


def write(path: Path, config, seed: int = 0, **changes) -> dict[str, dict[str, torch.Tensor]]:
    """A file in the release's layout with four different random copies; returns them by prefix."""
    with torch.device("meta"):
        tensors = dict(UNet(config.model).named_parameters())
    parameters, buffers = official_list()
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
    copies = {prefix: fill(parameters, tensors, seed + k) for k, prefix in enumerate(("net", *EMAS))}
    model = {"num_updates": torch.tensor(800_000)}
    for prefix, copy in copies.items():
        model |= {f"{prefix}.{name}": value for name, value in copy.items()}
        model |= {f"{prefix}.{name}": torch.outer(taps, taps)[None, None] / 64 for name in buffers}
    for name, value in changes.pop("model", {}).items():
        model.pop(name, None)
        model |= {} if value is None else {name: value}
    content = {"model": model, "optimizer": {"state": {}}, "lr_schedule": {"last": 1}, "epoch": 16_000}
    torch.save({**content, "args": argparse.Namespace(lr=6e-4, dropout=0.2), **changes}, path)
    return copies


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """The CIFAR-10 recipe at an eighth of its width: the same names, small tensors."""
    config = load_config(official.RECIPE, ["model.width=16"])
    recipe = tmp_path / "narrow.yaml"
    recipe.write_text(config_to_yaml(config))
    monkeypatch.setattr(official, "RECIPE", recipe)
    return config


def test_names_and_shapes_are_the_releases():
    with torch.device("meta"):
        network = UNet(load_config(official.RECIPE).model)
    parameters, buffers = official_list()
    names, filters = official_names(network)
    assert sum(p.numel() for p in network.parameters()) == 55_932_419
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert {name: shapes[ours] for name, ours in names.items()} == parameters
    assert set(filters) == set(buffers) and set(buffers.values()) == {(1, 1, 4, 4)}


def test_round_trip(narrow, tmp_path):
    """Each copy of the file, loaded, gives to the bit what a network filled by hand gives."""
    copies = write(tmp_path / "official.pth", narrow)
    for prefix, ema in {"net": "weights", **{prefix: repr(decay) for prefix, decay in EMAS.items()}}.items():
        by_hand = UNet(narrow.model).eval().to(memory_format=torch.channels_last)
        by_hand.load_state_dict(copies[prefix], strict=True)
        model = load_model(tmp_path / "official.pth", ema, CPU)
        z, t, r = torch.randn(2, 3, 32, 32), torch.tensor([1.0, 0.7]), torch.tensor([0.0, 0.7])
        z = z.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.equal(model.network(z, t, r), by_hand(z, t, r)), prefix
    assert load_model(tmp_path / "official.pth", None, CPU).ema == "0.99995"  # the published 2.80
    assert model.meta["step"] == 800_000 and model.meta["origin"]["epoch"] == 16_000


def test_convert_writes_a_run_of_ours(narrow, tmp_path, capsys):
    write(tmp_path / "official.pth", narrow)
    args = [str(tmp_path / "official.pth"), str(tmp_path / "run")]
    assert run_main(convert, args) == 0
    ours, theirs = (load_model(Path(what), "0.9996", CPU) for what in (args[1], args[0]))
    assert torch.equal(*(generate(model, 0, 2, 1, 0) for model in (ours, theirs)))
    assert run_main(convert, args) == 2
    assert "exists already" in capsys.readouterr().err
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    assert run_main(convert, [str(path), str(tmp_path / "again")]) == 3
    assert "a checkpoint of ours already" in capsys.readouterr().err


def test_an_official_file_is_scored_as_it_is(narrow, tmp_path):
    import numpy as np

    write(tmp_path / "official.pth", narrow)
    np.savez(tmp_path / "ref.npz", arr_0=np.repeat(grey_blobs(8, 0, 32), 3, axis=3))
    code = fid(
        *("--ckpt", tmp_path / "official.pth", "--ref", tmp_path / "ref.npz", "--out", tmp_path / "out"),
        *("--extractor", f"{__name__}:means", "--n", 4, "--quantise", "floor", "--device", "cpu"),
        *("--cache", tmp_path / "cache"),
    )
    assert code == 0
    assert [p.name for p in (tmp_path / "out").glob("*.json")] == ["step00800000-ema0.99995-nfe1-n4.json"]


def means(options, metrics):
    from eval.scoring.extractors import Extractor

    return Extractor("means", lambda x: {"m": x.float().mean((2, 3))}, {"fid": "m"}, options.device)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"net.map_layer0.bias": None}, "1 tensor(s) missing, such as net.map_layer0.bias"),
        ({"net_ema1.enc.8x8_down.skip.resample_filter": None}, "1 tensor(s) missing, such as net_ema1.enc.8x8_down"),
        ({"net.extra.weight": torch.zeros(2)}, "1 tensor(s) unknown, such as net.extra.weight"),
        ({"net_ema3.map_layer0.bias": torch.zeros(2)}, "1 tensor(s) unknown, such as net_ema3.map_layer0.bias"),
        ({"net_ema.map_layer0.bias": torch.zeros(2)}, "of another shape, such as net_ema.map_layer0.bias"),
        ({"net.dec.16x16_up.conv0.resample_filter": torch.ones(1, 1, 4, 4)}, "another filter than [1, 3, 3, 1]"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, line, narrow, tmp_path):
    write(tmp_path / "official.pth", narrow, model=changes)
    with pytest.raises(AssetError) as error:
        read_official(tmp_path / "official.pth")
    assert line in str(error.value)


class Spy:
    opened = False

    def __reduce__(self):
        return (setattr, (Spy, "opened", True))


def test_only_the_namespace_is_unpickled(narrow, tmp_path, capsys):
    write(tmp_path / "official.pth", narrow, lr_schedule=Spy())
    assert read_official(tmp_path / "official.pth") is None
    assert fid(tmp_path / "official.pth", "--extractor", "pixels") == 3
    assert not Spy.opened and "official.pth" in capsys.readouterr().err
