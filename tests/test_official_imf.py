"""Official iMF files: random ones in the release's layout, read strictly, sampled, and written back bit-equal."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from running import ROOT, newest, write_recipe

from dit import IMF, IMFConfig
from eval.convert import main as convert
from meanflow.errors import AssetError, run_main
from meanflow.training.config import load_config
from meanflow.training.model import generate, load
from meanflow.training.official import imf as official
from meanflow.training.official import read_official

LIST = Path(__file__).parent / "data" / "official_imf_b2.txt"  # names and shapes of the release's B/2
CPU = torch.device("cpu")
# The four sizes in small: width and depth tell them apart.
WIDTHS = {"imf_b2": (16, 3), "imf_m2": (16, 4), "imf_l2": (32, 4), "imf_xl2": (32, 5)}


def official_list() -> dict[str, tuple[int, ...]]:
    """{name: shape}."""
    pairs = (line.partition(" ")[::2] for line in LIST.read_text().splitlines())
    return {name: tuple(int(n) for n in shape.strip("()").split(",") if n) for name, shape in pairs}


@pytest.fixture
def narrow(tmp_path, monkeypatch):
    """A folder of recipes with the release's four networks in small, and where it looks for them."""
    folder = tmp_path / "recipes"
    folder.mkdir()
    for name, (width, depth) in WIDTHS.items():
        model = {"kind": "imf", "image_size": 8, "channels": 1, "patch": 2, "width": width, "depth": depth}
        model |= {"heads": 2, "head_depth": 2, "classes": 10}
        objective = {"kind": "imeanflow", "times": {"ratio": 0.5}}
        write_recipe(folder / f"{name}.yaml", model=model, objective=objective, ema__decays=[0.9, 0.5])
    monkeypatch.setattr(official, "RECIPES", folder)
    return folder


def write(path: Path, recipes: Path, name: str = "imf_b2", v: bool = True, **changes) -> dict[str, torch.Tensor]:
    """A random file in the release's layout. changes: of its entries; None removes one."""
    with torch.device("meta"):
        network = IMF(load_config(recipes / f"{name}.yaml").model)
    shapes, generator = dict(network.named_parameters()), torch.Generator().manual_seed(0)
    content = {
        name: 0.3 * torch.randn(shapes[ours].shape, generator=generator)
        for name, ours in official.official_names(network).items()
        if v or not ours.startswith(("v_heads", "v_final"))
    }
    content = {name: value for name, value in (content | changes).items() if value is not None}
    torch.save(content, path)
    return content


# --- names --------------------------------------------------------------------------------------------------------


def test_names_and_shapes_are_the_releases():
    with torch.device("meta"):
        network = IMF(IMFConfig("imf", 32, 4, 2, 768, 12, 12, classes=1000))
    names, shapes = official.official_names(network), {name: tuple(p.shape) for name, p in network.named_parameters()}
    assert [(name, shapes[ours]) for name, ours in names.items()] == list(official_list().items())
    assert sorted(names.values()) == sorted(shapes) and set(network.state_dict()) == set(shapes)
    assert names["shared_blocks.0.attn.q_proj._flax_linear.weight"] == "shared_blocks.0.attn.q_proj.weight"


# --- reading ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [True, False], ids=["with v", "without v"])
@pytest.mark.parametrize("name", WIDTHS)
def test_a_file_gives_what_a_network_filled_by_hand_gives(name, v, narrow, tmp_path):
    content = write(tmp_path / "iMF.pth", narrow, name, v)
    by_hand = IMF(replace(load_config(narrow / f"{name}.yaml").model, v_head=v)).to(memory_format=torch.channels_last)
    by_hand.load_state_dict({re.sub(r"_flax_\w+\.", "", key): value for key, value in content.items()}, strict=True)
    model = load(tmp_path / "iMF.pth", device=CPU)
    assert model.meta["origin"]["recipe"] == name and model.ema == "0.9" and model.config.model.v_head == v
    z, time, cond = torch.randn(2, 1, 8, 8), torch.ones(2), {"class_labels": torch.tensor([3, 10])}
    cond |= {"omega": torch.tensor([7.5, 1.0]), "t_min": torch.tensor([0.4, 0.0]), "t_max": torch.tensor([0.65, 1.0])}
    with torch.no_grad():
        expected = by_hand(z, 0 * time, time, **cond)
        assert torch.equal(model.network(z, 0 * time, time, **cond), expected) and expected.any()
    assert not any(key.startswith("v_") for key, _ in model.network.named_parameters())  # sampling needs none of it
    assert torch.isfinite(model.sample(3)).all()
    assert load(tmp_path / "iMF.pth", "weights", CPU).sample(1).equal(model.sample(1))


def test_settings_are_the_recipes(narrow, tmp_path):
    write(tmp_path / "iMF.pth", narrow, "imf_l2")
    checkpoint = read_official(tmp_path / "iMF.pth")
    assert checkpoint.meta["step"] == load_config(narrow / "imf_l2.yaml").train.steps
    assert list(checkpoint.ema) == ["0.9", "0.5"] and not checkpoint.optimizer
    write(tmp_path / "u.pth", narrow, "imf_l2", v=False)
    meta = read_official(tmp_path / "u.pth").meta
    assert meta["config"]["objective"]["velocity"] == "boundary" and not meta["config"]["model"]["v_head"]
    assert "no branch for v" in meta["origin"]["notes"][1] and len(checkpoint.meta["origin"]["notes"]) == 1


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"u_heads.1.mlp.w2._flax_linear.weight": None}, "1 tensor missing: u_heads.1.mlp.w2._flax_linear.weight"),
        ({"v_heads.0.attn_scale": None}, "1 tensor missing: v_heads.0.attn_scale"),
        (
            {"omega_tokens": None, "pos_embed": torch.zeros(2)},
            "1 tensor missing: omega_tokens; 1 tensor unknown: ",
        ),
        ({"shared_blocks.0.attn.q_proj.weight": torch.zeros(16, 16)}, "unknown: shared_blocks.0.attn.q_proj.weight"),
        ({"class_tokens": torch.zeros(1, 8, 16)}, "1 tensor of another shape: class_tokens"),
        ({"y_embedder.embedding_table._flax_embedding.weight": torch.zeros(10, 16)}, "another shape: y_embedder"),
        ({"t_min_tokens": torch.zeros(2, 16, dtype=torch.int64)}, "1 tensor not of floating point: t_min_tokens"),
        ({"t_min_tokens": "two"}, "1 tensor not of floating point: t_min_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(changes, line, narrow, tmp_path):
    write(tmp_path / "iMF.pth", narrow, **changes)
    with pytest.raises(AssetError) as error:
        read_official(tmp_path / "iMF.pth")
    assert "compared with imf_b2: " in str(error.value) and line in str(error.value)


class Spy:
    opened = False

    def __reduce__(self):
        return (setattr, (Spy, "opened", True))


def test_damaged_and_foreign_files_are_refused_in_one_line(narrow, tmp_path, capsys):
    good, bad, folder = tmp_path / "iMF.pth", tmp_path / "bad.pth", tmp_path / "run"
    write(good, narrow)
    data = bytearray(good.read_bytes())
    flipped = data.copy()
    flipped[len(data) // 2] ^= 1  # in a tensor
    for content, line in (
        (bytes(data[: len(data) // 2]), "cannot be read as a checkpoint"),
        (bytes(flipped), "is damaged: "),
        (b"", "cannot be read as a checkpoint"),
    ):
        bad.write_bytes(content)
        assert run_main(convert, [str(bad), str(folder)]) == 3
        assert line in (err := capsys.readouterr().err) and err.count("\n") == 1
    for content in ({"model": {}}, {"weight": torch.zeros(2)}, torch.zeros(2), []):
        torch.save(content, bad)
        assert run_main(convert, [str(bad), str(folder)]) == 3
        assert "is not a checkpoint of this project" in capsys.readouterr().err
    write(bad, narrow, extra=Spy())
    assert run_main(convert, [str(bad), str(folder)]) == 3
    assert not Spy.opened and not folder.exists() and "not a file of tensors alone" in capsys.readouterr().err


# --- there and back -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v", [True, False], ids=["with v", "without v"])
def test_round_trip(v, narrow, tmp_path, capsys):
    """File → run → file: the same names in the same order, the same bits, the same samples of one step."""
    content = write(tmp_path / "iMF.pth", narrow, "imf_m2", v)
    assert run_main(convert, [str(tmp_path / "iMF.pth"), str(tmp_path / "run")]) == 0
    out = capsys.readouterr().out
    assert "with EMAs 0.9, 0.5" in out and "those of the recipe imf_m2" in out
    assert run_main(convert, [str(tmp_path / "run"), "--to", "official", str(tmp_path / "again.pth")]) == 0
    assert f"EMA 0.9 → {tmp_path / 'again.pth'}: {len(content)} tensors" in capsys.readouterr().out
    again = torch.load(tmp_path / "again.pth", weights_only=True)
    assert list(again) == list(content) and all(torch.equal(again[name], content[name]) for name in content)
    models = [load(tmp_path / name, device=CPU) for name in ("iMF.pth", "run", "again.pth")]
    first, *others = (generate(model, 0, 4, 1, 0, torch.arange(4)) for model in models)
    assert all(torch.equal(first, other) for other in others)
    assert load_config(tmp_path / "run" / "config.yaml") == models[0].config


def test_the_average_that_is_asked_for_is_written(narrow, tmp_path):
    write(tmp_path / "iMF.pth", narrow)
    run_main(convert, [str(tmp_path / "iMF.pth"), str(tmp_path / "run")])
    (path,) = (tmp_path / "run" / "checkpoints").glob("*.pt")
    content = torch.load(path, weights_only=True)
    content["model"] = {name: x + 1 for name, x in content["model"].items()}
    torch.save(content, tmp_path / "changed.pt")
    for ema, shift in (("0.5", 0), ("weights", 1)):
        arguments = [str(tmp_path / "changed.pt"), "--to", "official", str(tmp_path / f"{ema}.pth"), "--ema", ema]
        assert run_main(convert, arguments) == 0
        written = torch.load(tmp_path / f"{ema}.pth", weights_only=True)
        assert torch.equal(written["t_min_tokens"], newest(tmp_path / "run").model["t_min_tokens"] + shift)


def test_what_cannot_be_written_is_one_line(narrow, tmp_path, capsys, train_tiny):
    write(tmp_path / "iMF.pth", narrow)
    run_main(convert, [str(tmp_path / "iMF.pth"), str(tmp_path / "run")])
    run, unet = str(tmp_path / "run"), str(train_tiny)
    for arguments, code, line in (
        ([run, "--to", "official", str(tmp_path / "iMF.pth")], 2, "exists already: name a new file"),
        ([run, "--to", "official", "/dev/null/x.pth"], 3, "/dev/null/x.pth: cannot be written"),
        (
            [unet, "--to", "official", str(tmp_path / "x.pth")],
            2,
            "has model.kind=unet, and official files are",
        ),
        ([run, "--to", "official", str(tmp_path / "x.pth"), "--ema", "0.7"], 2, "has no EMA 0.7; it keeps 0.9, 0.5"),
        ([run, str(tmp_path / "x"), "--ema", "0.5"], 2, "--ema says what to write"),
        ([str(tmp_path / "none"), "--to", "official", str(tmp_path / "x.pth")], 3, "none"),
    ):
        capsys.readouterr()
        assert run_main(convert, arguments) == code
        err = capsys.readouterr().err
        assert line in err and err.count("\n") == 1
    assert not list(tmp_path.glob("x*"))


@pytest.fixture
def train_tiny(tmp_path):
    """A run of the tiny U-net with one checkpoint."""
    from running import tiny_config, train_run

    from meanflow.training.processes import DistributedContext
    from meanflow.training.run_folder import RunFolder

    run = RunFolder(tmp_path / "unet")
    train_run(tiny_config(train__steps=1), run, DistributedContext(0, 1, CPU))
    return run.path


def test_the_recipes_have_the_releases_sizes():
    sizes = {}
    for name in official.SIZES:
        model = load_config(ROOT / "recipes" / f"{name}.yaml").model
        sizes[name] = model.width, model.depth, model.heads, model.head_depth, model.patch, model.classes
    assert sizes == {
        "imf_b2": (768, 12, 12, 8, 2, 1000),
        "imf_m2": (768, 24, 12, 8, 2, 1000),
        "imf_l2": (1024, 32, 16, 8, 2, 1000),
        "imf_xl2": (1024, 48, 16, 8, 2, 1000),
    }
