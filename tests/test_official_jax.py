"""The JAX release's checkpoints: random weights, written in its layouts, come back bit-equal; others are refused."""

import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from fid_helpers import fid

from dit import DiT
from eval.convert import main as convert
from meanflow.errors import AssetError, run_main
from meanflow.training.config import config_to_yaml, load_config
from meanflow.training.model import load
from meanflow.training.official import jax as official
from meanflow.training.official.jax import AVERAGE, SIZES, WEIGHTS, read_official
from meanflow.training.official.names import jax_name

needs_tensorstore, needs_msgpack = (
    pytest.mark.skipif(find_spec(name) is None, reason=f"needs {name} (requirements-dev.txt)")
    for name in ("tensorstore", "msgpack")
)
NARROW = {"imagenet_b4": (4, 16, 2), "imagenet_b2": (2, 16, 2), "imagenet_m2": (2, 32, 2)}  # patch, width, depth
NARROW |= {"imagenet_l2": (2, 32, 3), "imagenet_xl2": (2, 48, 3)}


@pytest.fixture(scope="module")
def recipes(tmp_path_factory) -> Path:
    """The ImageNet recipes with narrow networks on small latents, decoded without a VAE."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, (patch, width, depth) in NARROW.items():
        changes = [f"model.patch={patch}", f"model.width={width}", f"model.depth={depth}", "model.heads=4"]
        changes += [
            "model.image_size=8",
            "model.classes=10",
            "data.vae=space-to-depth",
            "data.image_size=16",
            "data.source=digits",
        ]
        config = load_config(official.RECIPES / f"{name}.yaml", changes)
        (folder / f"{name}.yaml").write_text(config_to_yaml(config))
    return folder


@pytest.fixture(autouse=True)
def narrow(recipes, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(official, "RECIPES", recipes)


def network_of(recipe: str, seed: int) -> DiT:
    torch.manual_seed(seed)
    network = DiT(load_config(official.RECIPES / f"{recipe}.yaml").model)
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.1 * torch.randn_like(p))
    return network.eval()


def tree_of(network: DiT) -> dict[tuple[str, ...], np.ndarray]:
    """{path: array} in the release's layout, written from its description."""

    def linear(layer):
        return {("_flax_linear", "kernel"): layer.weight.T, ("_flax_linear", "bias"): layer.bias}

    found = {
        ("x_embedder", "proj"): {
            ("kernel",): network.patch_embed.weight.permute(2, 3, 1, 0),  # rows, columns, in, out
            ("bias",): network.patch_embed.bias,
        },
        ("y_embedder", "embedding_table"): {("_flax_embedding", "embedding"): network.label_embed.weight},
        ("final_layer", "adaLN_modulation", "layers_1"): linear(network.final.modulation),
        ("final_layer", "linear"): linear(network.final.linear),
    }
    for name, ours in (("t_embedder", "t"), ("h_embedder", "t-r")):
        found[name, "mlp", "layers_0"] = linear(network.time_embed[ours].fc1)
        found[name, "mlp", "layers_2"] = linear(network.time_embed[ours].fc2)
    for k, block in enumerate(network.blocks):
        for part, name in (("attn", "qkv"), ("attn", "proj"), ("mlp", "fc1"), ("mlp", "fc2")):
            found["blocks", f"layers_{k}", part, name] = linear(getattr(block, name))
        found["blocks", f"layers_{k}", "adaLN_modulation", "layers_1"] = linear(block.modulation)
    return {
        ("net", *path, *leaf): np.ascontiguousarray(x.detach().numpy())
        for path, leaves in found.items()
        for leaf, x in leaves.items()
    }


def state_of(recipe: str = "imagenet_b4", **changes) -> dict[tuple[str, ...], np.ndarray]:
    """A training state: two copies of the network, the step and something of the optimiser."""
    state = {(WEIGHTS, *path): x for path, x in tree_of(network_of(recipe, 0)).items()}
    state |= {(AVERAGE, *path): x for path, x in tree_of(network_of(recipe, 1)).items()}
    state |= {("step",): np.int32(1234), ("opt_state", "0", "mu", "net", "x_embedder", "proj", "bias"): np.ones(3)}
    return state | changes


def write_orbax(folder: Path, state, database: bool = True, driver: str = "zarr", dtype: str | None = None) -> Path:
    import tensorstore

    context = tensorstore.Context({"file_io_sync": False})
    transaction, opened = tensorstore.Transaction(atomic=database), []
    for path, x in state.items():
        files = {"driver": "file", "path": f"{folder}/"}
        name = f"{'.'.join(path)}/"
        where = {"driver": "ocdbt", "base": files, "path": name} if database else files | {"path": f"{folder}/{name}"}
        kind = dtype if dtype and x.dtype == np.float32 else x.dtype.name
        how = {
            "create": True,
            "context": context,
            "dtype": kind,
            "shape": x.shape,
            "transaction": transaction if database else None,
        }
        opened.append((tensorstore.open({"driver": driver, "kvstore": where}, **how), x))
    written = [store.result().write(x.astype(store.result().dtype.numpy_dtype)) for store, x in opened]
    _ = transaction.commit_async().result() if database else [one.result() for one in written]
    (folder / "_METADATA").write_text("{}")
    return folder


def write_msgpack(path: Path, state, dtype: str = "float32", chunk: int | None = None) -> Path:
    """As flax's to_bytes does; arrays of more than `chunk` elements are divided, as it does with those above 1 GB."""
    import msgpack

    def array(x, code=1):
        x = np.asarray(x)
        data = x.tobytes()
        if dtype == "bfloat16" and x.dtype == np.float32:
            data = torch.from_numpy(x.copy()).bfloat16().view(torch.int16).numpy().tobytes()
        name = dtype if x.dtype == np.float32 else x.dtype.name
        return msgpack.ExtType(code, msgpack.packb((x.shape, name, data)))

    tree: dict = {}
    for keys, x in state.items():
        node = tree
        for key in keys[:-1]:
            node = node.setdefault(key, {})
        if chunk and x.size > chunk:
            parts = [x.reshape(-1)[k : k + chunk] for k in range(0, x.size, chunk)]
            divided = {str(k): array(part) for k, part in enumerate(parts)}
            shape = {str(k): n for k, n in enumerate(x.shape)}
            node[keys[-1]] = {"__msgpack_chunked_array__": True, "shape": shape, "chunks": divided}
        else:
            node[keys[-1]] = array(x, 3 if x.ndim == 0 else 1)
    path.write_bytes(msgpack.packb(tree))
    return path


WRITERS = {
    "OCDBT": lambda path, state: write_orbax(path / "checkpoint_1234", state),
    "item": lambda path, state: write_orbax(path / "checkpoint_1234" / "default", state).parent,
    "zarr3": lambda path, state: write_orbax(path / "checkpoint_1234", state, driver="zarr3"),
    "files": lambda path, state: write_orbax(path / "checkpoint_1234", state, database=False),
    "msgpack": lambda path, state: write_msgpack(path / "checkpoint_1234", state),
    "chunks": lambda path, state: write_msgpack(path / "checkpoint_1234", state, chunk=100),
}
forms = pytest.mark.parametrize(
    "form",
    [
        pytest.param(name, marks=needs_msgpack if name in ("msgpack", "chunks") else needs_tensorstore)
        for name in WRITERS
    ],
)


def same(tensors, network: DiT) -> bool:
    expected = dict(network.named_parameters())
    return tensors.keys() == expected.keys() and all(torch.equal(tensors[name], p) for name, p in expected.items())


# --- read ----------------------------------------------------------------------------------------------------------


def test_names_of_the_full_size_network():
    with torch.device("meta"):
        network = DiT(load_config(Path(__file__).parents[1] / "recipes" / "imagenet_b4.yaml").model)
    paths = ["/".join(jax_name(name)) for name, _ in network.named_parameters()]
    assert len(set(paths)) == len(paths) == 2 + 8 + 1 + 12 * 10 + 4
    assert "blocks/layers_11/adaLN_modulation/layers_1/_flax_linear/kernel" in paths
    assert "y_embedder/embedding_table/_flax_embedding/embedding" in paths and "x_embedder/proj/kernel" in paths
    assert {"h_embedder/mlp/layers_2/_flax_linear/bias", "final_layer/linear/_flax_linear/kernel"} <= set(paths)


@forms
def test_round_trip(form, tmp_path):
    checkpoint = read_official(WRITERS[form](tmp_path, state_of()))
    assert same(checkpoint.model, network_of("imagenet_b4", 0)) and list(checkpoint.ema) == ["0.9999"]
    assert same(checkpoint.ema["0.9999"], network_of("imagenet_b4", 1))
    assert checkpoint.meta["step"] == 1234 and checkpoint.meta["origin"]["notes"] == []
    assert not checkpoint.optimizer and checkpoint.meta["origin"]["file"] == "checkpoint_1234"


@needs_msgpack
@pytest.mark.parametrize("recipe", SIZES)
def test_the_recipe_is_told_by_the_shapes(recipe, tmp_path):
    checkpoint = read_official(write_msgpack(tmp_path / "file", state_of(recipe)))
    assert checkpoint.meta["origin"]["recipe"] == recipe and same(checkpoint.model, network_of(recipe, 0))


@needs_tensorstore
@needs_msgpack
def test_bfloat16(tmp_path):
    for path in (
        write_orbax(tmp_path / "checkpoint_1", state_of(), dtype="bfloat16"),
        write_msgpack(tmp_path / "file", state_of(), "bfloat16"),
    ):
        weight = read_official(path).model["blocks.1.fc1.weight"]
        expected = network_of("imagenet_b4", 0).blocks[1].fc1.weight
        assert weight.dtype == torch.float32 and torch.equal(weight, expected.bfloat16().float())


@needs_msgpack
@pytest.mark.parametrize(
    "prefix", [("net",), ("params", "net"), ("params", "params", "net"), ("state", "params", "net")]
)
def test_where_the_names_may_begin(prefix, tmp_path):
    tree = {(*prefix, *path[1:]): x for path, x in tree_of(network_of("imagenet_b4", 0)).items()}
    checkpoint = read_official(write_msgpack(tmp_path / "checkpoint_77", tree))
    assert same(checkpoint.model, network_of("imagenet_b4", 0)) and not checkpoint.ema
    assert checkpoint.meta["step"] == 77 and "no ema_params" in checkpoint.meta["origin"]["notes"][0]


@needs_msgpack
def test_averages_alone(tmp_path):
    state = {path: x for path, x in state_of().items() if path[0] == AVERAGE}
    checkpoint = read_official(write_msgpack(tmp_path / "file", state))
    assert same(checkpoint.model, network_of("imagenet_b4", 1)) and "no params" in checkpoint.meta["origin"]["notes"][0]


# --- refused -----------------------------------------------------------------------------------------------------


def refused(path: Path, *parts: str) -> None:
    with pytest.raises(AssetError) as error:
        read_official(path)
    assert [part for part in parts if part not in str(error.value)] == [] and "\n" not in str(error.value)


@needs_msgpack
def test_everything_or_nothing(tmp_path):
    bias, file = ("h_embedder", "mlp", "layers_0", "_flax_linear", "bias"), tmp_path / "file"
    fewer = {path: x for path, x in state_of().items() if path[2:] != bias}
    where = "net/h_embedder/mlp/layers_0/_flax_linear/bias"
    refused(
        write_msgpack(file, fewer), f"imagenet_b4: 1 tensor missing: params/{where}; ", f"missing: ema_params/{where}"
    )
    more = state_of() | {(WEIGHTS, "net", "blocks", f"layers_{k}", "scale"): np.ones(2) for k in range(5)}
    refused(write_msgpack(file, more), "5 tensors unknown: params/net/blocks/layers_0/scale, ", " and 2 more")
    other = state_of() | {(AVERAGE, "net", *bias): np.ones(3, np.float32)}
    refused(write_msgpack(file, other), f"1 tensor of another shape: ema_params/{where}")
    whole = state_of() | {(AVERAGE, "net", *bias): np.ones(16, np.int32)}
    refused(write_msgpack(file, whole), f"1 tensor not of floating point: ema_params/{where}")
    deeper = state_of() | {(WEIGHTS, *path): x for path, x in tree_of(network_of("imagenet_l2", 0)).items()}
    refused(write_msgpack(file, deeper), "is no MeanFlow checkpoint of the official JAX release")
    refused(write_msgpack(file, {("model", "w"): np.ones(2)}), "no params, but model")


@needs_tensorstore
@pytest.mark.parametrize("fault", ["manifest", "torn", "no data", "none", "several"])
def test_damaged_folders(fault, tmp_path):
    folder = write_orbax(tmp_path / "all" / "checkpoint_1", state_of())
    data = max((folder / "d").iterdir(), key=lambda file: file.stat().st_size)
    if fault == "manifest":
        (folder / "manifest.ocdbt").write_bytes(bytes(100))
    elif fault == "torn":
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 3])
    elif fault == "no data":
        shutil.rmtree(folder / "d")
    elif fault == "none":
        (folder / "manifest.ocdbt").unlink()
    else:
        shutil.copytree(folder, folder.with_name("checkpoint_2"))
        return refused(folder.parent, "holds 2 checkpoints; name one of them, such as", "checkpoint_2")
    return refused(folder, str(folder), "without its arrays" if fault == "none" else "cannot be read")


@needs_tensorstore
def test_a_lost_file_is_not_read_as_zeros(tmp_path):
    folder = write_orbax(tmp_path / "checkpoint_1", state_of(), database=False)
    (folder / "params.net.x_embedder.proj.bias" / "0").unlink()
    refused(folder, "params.net.x_embedder.proj.bias cannot be read (1 of its 1 files are missing)")


@needs_msgpack
def test_damaged_files(tmp_path):
    whole = write_msgpack(tmp_path / "file", state_of()).read_bytes()
    for broken in (whole[:-50], whole[:40], whole + b"more", whole.replace(b"float32", b"float16")):
        (tmp_path / "file").write_bytes(broken)
        refused(tmp_path / "file", "cannot be read as a msgpack file of flax")


@pytest.mark.parametrize(("package", "make"), [("tensorstore", "folder"), ("msgpack", "file")])
def test_a_missing_package_is_named(package, make, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)  # its import fails
    path = tmp_path / "checkpoint_1"
    if make == "folder":
        path.mkdir()
        (path / "manifest.ocdbt").write_bytes(b"")
    else:
        path.write_bytes(b"\x82\xa6params\x80\xaaema_params\x80")
    refused(path, f"is read with the package {package}, which is missing: pip install {package}")


# --- commands ----------------------------------------------------------------------------------------------------


@needs_tensorstore
def test_convert_makes_a_run_that_is_sampled_and_scored(tmp_path, capsys):
    write_orbax(tmp_path / "checkpoint_1234", state_of())
    assert run_main(convert, ["~/checkpoint_1234", "~/run"]) == 0
    out = capsys.readouterr().out
    assert "with EMAs 0.9999" in out and "those of the recipe imagenet_b4, whose network it is" in out
    run = load(tmp_path / "run", device="cpu")
    assert run.ema == "0.9999" and run.config.model == network_of("imagenet_b4", 1).config
    z, r, t = torch.randn(2, 4, 8, 8), torch.tensor([0.0, 0.7]), torch.tensor([1.0, 0.7])
    by_hand = network_of("imagenet_b4", 1).to(memory_format=torch.channels_last)
    with torch.no_grad():
        assert torch.equal(run.network(z, r, t, torch.tensor([3, 10])), by_hand(z, r, t, torch.tensor([3, 10])))
    assert torch.equal(run.sample(3), load(tmp_path / "checkpoint_1234", device="cpu").sample(3))  # without a run too
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "ref.npz", arr_0=rng.integers(0, 256, (8, 16, 16, 1), dtype=np.uint8))
    arguments = ("--ref", tmp_path / "ref.npz", "--extractor", "pixels", "--n", 4, "--device", "cpu")
    assert fid(tmp_path / "run", *arguments) == 0


@needs_msgpack
def test_convert_says_what_is_missing(tmp_path, capsys):
    write_msgpack(tmp_path / "file", {path: x for path, x in state_of().items() if path[0] == WEIGHTS})
    (tmp_path / "empty").mkdir()
    assert run_main(convert, [str(tmp_path / "file"), str(tmp_path / "run")]) == 0
    assert "with no EMA\n" in (out := capsys.readouterr().out) and "it has no ema_params" in out
    assert load(tmp_path / "run", "weights", "cpu").ema == "weights"
    for path, line in (("empty", "no folder of the official JAX release"), ("run", "a run of ours already")):
        assert run_main(convert, [str(tmp_path / path), str(tmp_path / "again")]) == 3
        assert line in capsys.readouterr().err
