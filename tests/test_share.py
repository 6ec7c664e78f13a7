"""`eval.share`, and what loads a shared folder: round trips to the bit, the card, the hub, and what is refused."""

import hashlib
import importlib
import json
import shutil
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
import yaml
from running import tiny_config

from eval import fid
from eval import sample as sample_command
from eval.convert import main as convert
from eval.share import main as share
from meanflow import load
from meanflow.errors import AssetError, UserError, run_main
from meanflow.training import shared
from meanflow.training.config import InitConfig
from meanflow.training.state import fresh_state, initialise, refuse_missing_source

pytest.importorskip("safetensors", reason="weights are shared as safetensors: pip install -e .[hub]")
CPU = torch.device("cpu")
ANSWER = {"license": "mit", "library_name": "meanflow-kit", "pipeline_tag": "unconditional-image-generation"}


def one_line(capsys, code: int, *arguments, command=share) -> str:
    """What a refused call prints to stderr."""
    assert run_main(command, [str(argument) for argument in arguments]) == code
    *warnings, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: ") and all(line.startswith("warning: ") for line in warnings), (warnings, error)
    return error


@pytest.fixture(scope="module")
def folder(trained_with_classes, tmp_path_factory) -> Path:
    """A shared run with two classes, to be read only."""
    out = tmp_path_factory.mktemp("shared") / "birds"
    assert share([str(trained_with_classes.path), str(out), "--license", "mit", "--device", "cpu"]) == 0
    return out


@pytest.fixture
def changed(folder, tmp_path):
    """`changed(key=value, …)`: a copy of the shared folder with another config.json; functions change a value."""

    def changed(**changes) -> Path:
        copy = shutil.copytree(folder, tmp_path / f"changed{len(list(tmp_path.iterdir()))}")
        content = json.loads((copy / "config.json").read_text())
        for key, value in changes.items():
            content[key] = value(content[key]) if callable(value) else value
        (copy / "config.json").write_text(json.dumps(content))
        return copy

    return changed


# --- the round trip --------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_the_run_to_the_bit(folder, trained_with_classes):
    ours, theirs = load(trained_with_classes.path, device=CPU), load(folder, device=CPU)
    assert theirs.config == ours.config and theirs.ema == ours.ema and theirs.meta["step"] == 20
    assert theirs.network.state_dict().keys() == ours.network.state_dict().keys()
    for steps in (1, 2):
        assert torch.equal(theirs.sample(5, steps, seed=3), ours.sample(5, steps, seed=3))
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "config.json",
        "model.safetensors",
        "samples.png",
    ]
    content = json.loads((folder / "config.json").read_text())
    assert content["config"]["objective"]["kind"] == "meanflow" and "optimizer" not in content


def test_several_averages_and_the_weights(trained, tmp_path, capsys):
    assert run_main(share, [str(trained.path), str(tmp_path / "all"), "--ema", "0.5,weights,0.9"]) == 0
    assert (tmp_path / "all" / "model-ema0.9.safetensors").is_file()
    assert (tmp_path / "all" / "model-weights.safetensors").is_file()
    for ema in ("0.5", "0.9", "weights"):
        ours, theirs = load(trained.path, ema, CPU), load(tmp_path / "all", ema, CPU)
        assert torch.equal(ours.sample(3), theirs.sample(3)), ema
    assert load(tmp_path / "all", device=CPU).ema == "0.5"  # the first one, though the recipe's is 0.9
    assert share([str(tmp_path / "all"), str(tmp_path / "one"), "--ema", "weights"]) == 0  # a part of it once more
    assert load(tmp_path / "one").ema == "weights"
    with pytest.raises(UserError, match=r"has no EMA 0\.9; it keeps weights"):
        load(tmp_path / "one", "0.9")
    assert "keeps 0.9, 0.5, weights" in one_line(capsys, 2, trained.path, tmp_path / "x", "--ema", "0.7")


def test_commands_take_it_as_a_run(folder, trained_with_classes, tmp_path, capsys):
    for what, out in ((trained_with_classes.path, "a.png"), (folder, "b.png")):
        assert sample_command.main([str(what), "--n", "4", "--out", str(tmp_path / out), "--device", "cpu"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    how = ["--extractor", "pixels", "--n", "70", "--device", "cpu"]
    assert fid.main([str(folder), *how, "--out", str(tmp_path / "scores")]) == 0
    assert "fd-pixels" in capsys.readouterr().out
    with pytest.raises(AssetError, match="is a run of ours already"):
        convert([str(folder), str(tmp_path / "run")])


def test_a_run_may_start_from_it(folder, tmp_path):
    refuse_missing_source(InitConfig("someone/digits"))  # the hub is asked later
    with pytest.raises(AssetError, match="no such file or folder"):
        refuse_missing_source(InitConfig(str(tmp_path / "missing")))
    config = tiny_config(model__channels=3, model__classes=2)
    state = fresh_state(config, CPU)
    taken = initialise(state, InitConfig(from_=str(folder)))
    assert taken.weights == "0.9" and not taken.fresh and not taken.unused
    expected = load(folder, device=CPU).network.state_dict()
    assert all(torch.equal(p, expected[name]) for name, p in state.network.named_parameters())


# --- the card --------------------------------------------------------------------------------------------------------


def test_the_card(folder):
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    found = yaml.safe_load(front)
    assert {key: found[key] for key in ANSWER} == ANSWER and {"meanflow", "class-conditional"} <= set(found["tags"])
    for part in ("# birds", "![samples](samples.png)", "20 of 20 steps of 8 images", "EMA 0.9: `model.safetensors`"):
        assert part in text, part
    assert "2 classes: class0, class1" in text and "images, 22 images" in text and str(folder.parent) not in text
    assert "`meanflow`: Algorithm 1 |" in text and "None were measured" in text and "geng2025meanflow" in text


def test_the_two_lines_of_the_card_load_it(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    code = (folder / "README.md").read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    assert len(code.splitlines()) == 2
    names: dict = {}
    exec(code, names)
    assert names["images"].shape == (16, 3, 8, 8)


def test_scores_are_those_of_the_step_and_average_with_their_protocol(trained, tmp_path):
    run = shutil.copytree(trained.path, tmp_path / "run")
    for ema in ("0.9", "0.5"):
        arguments = [str(run), "--extractor", "pixels", "--n", "70", "--ema", ema, "--device", "cpu", "--steps", "1,2"]
        assert fid.main(arguments) == 0
    (stale,) = [path for path in (run / "eval").glob("*.json") if "ema0.9-nfe2" in path.name]
    stale.write_text(stale.read_text().replace('"step": 6', '"step": 4'))
    assert share([str(run), str(tmp_path / "out"), "--device", "cpu"]) == 0
    rows = [
        line for line in (tmp_path / "out" / "README.md").read_text().splitlines() if line.startswith("| fd-pixels")
    ]
    assert str(tmp_path) not in (tmp_path / "out" / "README.md").read_text()  # of the commands
    assert len(rows) == 1 and "| 1 | EMA 0.9 | 70 | pixels |" in rows[0] and "fewer than 50,000" in rows[0]


# --- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten_and_nothing_half_made_is_left(trained, tmp_path, capsys, monkeypatch):
    (tmp_path / "there").mkdir()
    assert "exists already" in one_line(capsys, 2, trained.path, tmp_path / "there")
    assert "give OWNER/NAME" in one_line(capsys, 2, trained.path, tmp_path / "x", "--push", "name")
    assert "go with --push" in one_line(capsys, 2, trained.path, tmp_path / "x", "--private")
    assert "give one of the hub's names" in one_line(
        capsys, 2, trained.path, tmp_path / "x", "--license", "MIT License"
    )
    assert "cannot be written" in one_line(capsys, 3, trained.path, "/proc/x")
    monkeypatch.setattr("eval.sharing.card.Card.text", lambda card: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        share([str(trained.path), str(tmp_path / "x")])
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("disk full"))
    )
    assert "model.safetensors: cannot be written (disk full)" in one_line(capsys, 3, trained.path, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"format": 2}, "has format 2, this version reads 1"),
        ({"ema": "0.8"}, "is not of a shared run"),
        (
            {"weights": {"../../x": {"file": "model.safetensors", "sha256": ""}}, "ema": "../../x"},
            "is not of a shared run",
        ),
        ({"weights": {"0.9": {"file": "/etc/passwd", "sha256": ""}}}, "is not of a shared run"),
        ({"weights": {"0.9": {"file": "model.safetensors", "sha256": "0"}}}, "is damaged"),
        ({"weights": lambda w: w | {"0.5": w["0.9"] | {"file": "model-ema0.5.safetensors"}}}, "is missing, though"),
        ({"meta": {}}, "is not of a shared run"),
        ({"config": lambda c: c | {"model": c["model"] | {"width": 2**20}}}, "do not fit the network"),
        ({"config": lambda c: c | {"model": c["model"] | {"width": 2**40}}}, "no network is as large"),
        ({"config": lambda c: c | {"model": c["model"] | {"wdith": 8}}}, "wdith"),
    ],
)
def test_another_config_is_refused(changed, changes, line):
    with pytest.raises(UserError) as error:
        load(changed(**changes))
    assert line in str(error.value) and "\n" not in str(error.value)


def test_damaged_weights_and_pickles_are_refused(changed):
    damaged = changed()
    content = bytearray((damaged / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(content)
    with pytest.raises(AssetError, match="its checksum differs"):
        load(damaged)
    for content in (b"\x80\x02cos\nsystem\n", b"", b"\xff" * 64):
        digest = hashlib.sha256(content).hexdigest()
        fake = changed(weights=lambda w, digest=digest: {"0.9": w["0.9"] | {"sha256": digest}})
        (fake / "model.safetensors").write_bytes(content)
        with pytest.raises(AssetError, match="cannot be read as safetensors"):
            load(fake)


def test_a_shared_run_cannot_name_code_to_run(changed, capsys):
    named = changed(config=lambda c: c | {"eval": c["eval"] | {"extractor": "os:abort"}})
    assert "name it as --extractor if you trust it" in one_line(capsys, 2, named, "--n", 70, command=fid.main)


def test_without_safetensors_one_line(folder, trained, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert "-m pip install safetensors" in one_line(capsys, 3, trained.path, tmp_path / "out")
    with pytest.raises(AssetError, match="-m pip install safetensors"):
        load(folder)


# --- the hub ---------------------------------------------------------------------------------------------------------


def test_which_names_are_the_hubs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    named = [text for text in ("a/b", "a/b-1.5", "runs/b", "a/b.pt", "a", "a/b/c", "/a/b", "../b", "a/-b") if
             shared.is_hub_name(Path(text))]  # fmt: skip
    assert named == ["a/b", "a/b-1.5"]


def test_a_local_path_wins_and_a_name_needs_the_hub(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AssetError, match=r"as a name on the hub it needs huggingface_hub: .* pip install hugg"):
        load("owner/birds")
    assert "-m pip install huggingface-hub" in one_line(capsys, 3, folder, "out", "--push", "owner/birds")
    assert load("out").ema == "0.9"  # all but the upload was done
    shutil.copytree(folder, tmp_path / "owner" / "birds")
    assert load("owner/birds").ema == "0.9"


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as a download needs: one model, owner/birds, at one commit."""

    folder: Path

    def do_GET(self) -> None:
        commit = "0" * 40
        names = [file.name for file in self.folder.iterdir()]
        if self.path.startswith("/api/models/owner/birds/revision/"):  # in one list, and for newer clients in another
            siblings = [{"rfilename": name} for name in names]
            self.answer(json.dumps({"id": "owner/birds", "sha": commit, "siblings": siblings}).encode())
        elif self.path.startswith(f"/api/models/owner/birds/tree/{commit}"):
            files = [{"type": "file", "path": name, "size": 1, "oid": name} for name in names]
            self.answer(json.dumps(files).encode())
        elif self.path.startswith(f"/owner/birds/resolve/{commit}/"):
            content = (self.folder / self.path.rpartition("/")[2]).read_bytes()
            self.answer(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(200)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *ignored) -> None:
        """pytest's output is enough."""


@pytest.fixture
def hub(folder, tmp_path, monkeypatch):
    """huggingface_hub with an empty cache, and in place of the hub one that has the shared folder as owner/birds."""
    found = pytest.importorskip("huggingface_hub", reason="pip install -e .[hub]")
    constants = importlib.import_module("huggingface_hub.constants")
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("OneModel", (Hub,), {"folder": folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        found.constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.chdir(tmp_path)
    yield found
    server.shutdown()


def test_download_and_offline(hub, folder, tmp_path, capsys, monkeypatch):
    expected = load(folder, device=CPU).sample(3)
    assert torch.equal(load("owner/birds", device="cpu").sample(3), expected)
    names = sorted(file.name for file in shared.download("owner/birds").iterdir())
    assert names == ["config.json", "model.safetensors"]  # neither the card nor the picture
    assert sample_command.main(["owner/birds", "--n", "2", "--device", "cpu"]) == 0
    assert (tmp_path / "birds" / "step00000020-nfe1-ema0.9-seed0.png").is_file()
    capsys.readouterr()  # the bar of the download
    assert "there is no such run, checkpoint or shared folder here" in one_line(
        capsys, 3, "owner/other", command=sample_command.main
    )
    monkeypatch.setattr(importlib.import_module("huggingface_hub.constants"), "HF_HUB_OFFLINE", True)
    assert torch.equal(load("owner/birds", device="cpu").sample(3), expected)
    assert "neither in the cache nor" in one_line(capsys, 3, "owner/other", command=sample_command.main)


def test_push(hub, folder, tmp_path, capsys, monkeypatch):
    calls = []

    class Api:
        def repo_exists(self, name, **ignored):
            return name == "owner/there"

        def create_repo(self, name, **how):
            calls.append((name, how["private"], how["exist_ok"]))

        def upload_folder(self, repo_id, folder_path, allow_patterns, **ignored):
            if repo_id == "owner/refused":
                raise OSError("401 Client Error. More lines\nof it")
            calls.append((repo_id, sorted(allow_patterns)))

    monkeypatch.setattr(hub, "HfApi", Api)
    assert run_main(share, [str(folder), str(tmp_path / "a"), "--push", "owner/new", "--private"]) == 0
    assert "uploaded to https://huggingface.co/owner/new" in capsys.readouterr().out
    files = ["README.md", "config.json", "model.safetensors", "samples.png"]
    assert calls == [("owner/new", True, False), ("owner/new", files)]
    assert "# owner/new" in (tmp_path / "a" / "README.md").read_text()
    err = one_line(capsys, 2, folder, tmp_path / "b", "--push", "owner/there")
    assert "is there already; --update replaces its files" in err and (tmp_path / "b" / "config.json").is_file()
    assert run_main(share, [str(folder), str(tmp_path / "c"), "--push", "owner/there", "--update"]) == 0
    capsys.readouterr()
    err = one_line(capsys, 3, folder, tmp_path / "d", "--push", "owner/refused")
    assert "cannot be uploaded (401 Client Error); " in err and "hf upload owner/refused" in err
