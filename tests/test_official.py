"""Official checkpoints: our random weights, written under the release's list of names, come back bit-equal."""

from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_helpers import fid, grey_blobs

from eval.convert import main as convert
from meanflow.errors import AssetError, run_main
from meanflow.training.config import config_to_yaml, load_config
from meanflow.training.model import generate, load
from meanflow.training.official import cifar10 as official
from meanflow.training.official.cifar10 import EMAS, official_names, read_official
from unet import UNet

LIST = Path(__file__).parent / "data" / "official_unet.txt"  # names and shapes of the release, buffers last
CPU = torch.device("cpu")


def official_list() -> list[dict[str, tuple[int, ...]]]:
    """[{parameter: shape}, {buffer: shape}]."""
    found = []
    for part in LIST.read_text().split("# buffers (constants)\n"):
        pairs = (line.partition(" ")[::2] for line in part.splitlines())
        found.append({name: tuple(map(int, shape.strip("[]").split(","))) for name, shape in pairs})
    return found


def write(path: Path, config, **changes) -> dict[str, dict[str, torch.Tensor]]:
    """A file in the release's layout with four different random copies; returns them by prefix.

    changes: of its entries; in `model`, None removes one.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in UNet(config.model).named_parameters()}
    parameters, buffers = official_list()
    generator, taps = torch.Generator().manual_seed(0), torch.tensor([1.0, 3.0, 3.0, 1.0])
    copies, model = {}, {"num_updates": torch.tensor(768_000)}
    for prefix in ("net", *EMAS):
        copies[prefix] = {name: 0.05 * torch.randn(shapes[name], generator=generator) for name in parameters}
        model |= {f"{prefix}.{name}": value for name, value in copies[prefix].items()}
        model |= {f"{prefix}.{name}": torch.outer(taps, taps)[None, None] / 64 for name in buffers}
    model |= changes.pop("model", {})
    content = {"model": {name: value for name, value in model.items() if value is not None}}
    content |= {"optimizer": {"state": {}}, "lr_schedule": {"last": 1}, "epoch": 16_000, "args": Namespace(lr=6e-4)}
    torch.save(content | changes, path)
    return copies


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """The CIFAR-10 recipes at an eighth of their width: the same names, small tensors."""
    for name in ("cifar10", "cifar10_v1"):
        config = load_config(official.RECIPES / f"{name}.yaml", ["model.width=16"])
        (tmp_path / f"{name}.yaml").write_text(config_to_yaml(config))
    monkeypatch.setattr(official, "RECIPES", tmp_path)
    return load_config(tmp_path / "cifar10.yaml")


# --- weights -----------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_releases():
    with torch.device("meta"):
        network = UNet(load_config(official.RECIPES / "cifar10.yaml").model)
    parameters, buffers = official_list()
    names, filters = official_names(network)
    assert sum(p.numel() for p in network.parameters()) == 55_932_419
    shapes = {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert {name: shapes[ours] for name, ours in names.items()} == parameters
    assert set(filters) == set(buffers) and set(buffers.values()) == {(1, 1, 4, 4)}


def test_round_trip(narrow, tmp_path):
    """Each copy of the file, loaded, gives to the bit what a network filled by hand gives."""
    copies = write(tmp_path / "official.pth", narrow)
    for prefix, ema in {"net": "weights", **EMAS}.items():
        by_hand = UNet(narrow.model).eval().to(memory_format=torch.channels_last)
        by_hand.load_state_dict(copies[prefix], strict=True)
        model = load(tmp_path / "official.pth", ema, CPU)
        z, r, t = torch.randn(2, 3, 32, 32), torch.tensor([0.0, 0.7]), torch.tensor([1.0, 0.7])
        z = z.contiguous(memory_format=torch.channels_last)
        with torch.no_grad():
            assert torch.equal(model.network(z, r, t), by_hand(z, r, t)), prefix
    assert load(tmp_path / "official.pth", device=CPU).ema == "0.99995"  # the published 2.80
    assert model.meta["step"] == 768_000 and model.meta["origin"]["epoch"] == 16_000


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


# --- how it was trained ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "recipe", "read"),
    [
        (  # as the published 2.80 was trained
            Namespace(sampler="v1", ratio=0.75, epochs=16_000, warmup_epochs=200, lr=6e-4, dropout=0.2, device="cuda"),
            "cifar10_v1",
            {"sampler": "v1", "ratio": 0.75, "steps": 768_000, "warmup": 9_600, "lr": 6e-4, "dropout": 0.2},
        ),
        (Namespace(time="v0", num_epochs=8_000), "cifar10", {"sampler": "v0", "steps": 384_000}),
        (Namespace(warm_up_iters=9_600, ratio=0.25), "cifar10", {"warmup": 9_600, "ratio": 0.75}),
        (Namespace(kind="v1", lr=3e-4), "cifar10_v1", {"sampler": "v1", "lr": 3e-4}),
        # What could mean two things, is of another type or out of range, is not taken.
        (Namespace(first="v0", second="v1", epochs=8, save_epochs=9, warmup=200, ratio=0.5), "cifar10", {}),
        (
            Namespace(epochs="many", lr=-1.0, dropout=1.5, warmup_epochs=0.5, ratio=torch.ones(2)),
            "cifar10",
            {},
        ),
        (Namespace(epochs=0, lr=float("nan"), sampler=["v1"], batch_size=128), "cifar10", {}),
        (Namespace(), "cifar10", {}),
        ({"sampler": "v1"}, "cifar10", {}),
        (None, "cifar10", {}),
    ],
)
def test_the_sampler_and_length_are_read_from_args(args, recipe, read):
    keys = {
        "sampler": "objective.times.sampler",
        "ratio": "objective.times.ratio",
        "steps": "train.steps",
        "warmup": "optim.warmup_steps",
        "lr": "optim.lr",
        "dropout": "model.dropout",
    }
    read = {keys[name]: value for name, value in read.items()}
    config, origin = official.config_of(args)
    assert origin == {"recipe": recipe, "args": read, "assumed": [key for key in keys.values() if key not in read]}
    changes = [f"{key}={value}" for key, value in read.items()]
    assert config == load_config(official.RECIPES / f"{recipe}.yaml", changes)


def test_a_file_says_what_its_settings_are_taken_from(narrow, tmp_path):
    write(tmp_path / "official.pth", narrow, args=Namespace(tr="v1", epochs=100))
    meta = read_official(tmp_path / "official.pth").meta
    assert meta["origin"]["args"] == {"objective.times.sampler": "v1", "train.steps": 4_800}
    assert meta["config"]["objective"]["times"]["mu_r"] == -4.0 and meta["config"]["train"]["steps"] == 4_800
    assert meta["origin"]["recipe"] == "cifar10_v1" and "optim.warmup_steps" in meta["origin"]["assumed"]


# --- commands ----------------------------------------------------------------------------------------------------


def test_convert_writes_a_run_of_ours(narrow, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "official.pth", narrow, args=Namespace(kind="v1", epochs=100))
    assert run_main(convert, ["~/official.pth", "~/run"]) == 0
    out = capsys.readouterr().out
    assert "read from its args: objective.times.sampler=v1, train.steps=4800\n" in out
    assert "as in the recipe cifar10_v1: objective.times.ratio, optim.warmup_steps" in out
    ours, theirs = (load(tmp_path / name, "0.9996", CPU) for name in ("run", "official.pth"))
    assert torch.equal(*(generate(model, 0, 2, 1, 0) for model in (ours, theirs)))
    assert load_config(tmp_path / "run" / "config.yaml") == ours.config
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    for arguments, code, line in (
        (["~/official.pth", "~/run"], 2, "exists already"),
        ([str(path), "~/again"], 3, "a checkpoint of ours already"),
        (["~/none.pth", "~/again"], 3, "no such checkpoint"),
        (["~/official.pth", "/proc/run"], 3, "could not be saved"),
        (["~/official.pth", "/dev/null/run"], 3, "could not be saved"),
    ):
        assert run_main(convert, arguments) == code
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1


def test_an_official_file_can_be_scored(narrow, tmp_path):
    write(tmp_path / "official.pth", narrow)
    np.savez(tmp_path / "ref.npz", arr_0=np.repeat(grey_blobs(8, 0, 32), 3, axis=3))
    code = fid(
        *("--ckpt", tmp_path / "official.pth", "--ref", tmp_path / "ref.npz", "--out", tmp_path / "out"),
        *("--extractor", f"{__name__}:means", "--n", 4, "--quantise", "floor", "--device", "cpu"),
        *("--cache", tmp_path / "cache"),
    )
    assert code == 0
    assert [p.name for p in (tmp_path / "out").glob("*.json")] == ["step00768000-ema0.99995-nfe1-n4.json"]


def means(options, metrics):
    from eval.scoring.extractors import Extractor

    return Extractor("means", lambda x: {"m": x.float().mean((2, 3))}, {"fid": "m"}, options.device)
