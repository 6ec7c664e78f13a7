"""`eval.export` and `eval.latency`: exported graphs give the network's images, the page runs, what is refused."""

import base64
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from guided_helpers import GUIDED
from method_helpers import perturbed
from running import ROOT

from eval.export import main as export
from eval.exporting import check, files, page
from eval.exporting.graph import DTYPES, Generator, Velocity, lower_precision
from eval.latency import main as latency
from eval.timing.measure import EAGER, Latency, Plan, measure
from eval.timing.show import ratios, table
from meanflow.errors import AssetError, NumericsError, UserError
from meanflow.training.model import load

CPU = torch.device("cpu")
has_onnx = all(importlib.util.find_spec(name) for name in files.ONNX_PACKAGES)
needs_onnx = pytest.mark.skipif(not has_onnx, reason="needs onnx, onnxscript and onnxruntime: pip install -e .[onnx]")
UNET, DIT = (ROOT / "tests" / "data" / "runs" / name for name in ("unet", "dit"))  # by class; the second makes latents
RUNTIME = os.environ.get("ONNXRUNTIME_WEB")  # a copy of the npm package onnxruntime-web
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def refused(*arguments) -> UserError:
    with pytest.raises(UserError) as caught:
        export([str(argument) for argument in arguments])
    assert "\n" not in str(caught.value)
    return caught.value


# --- files -------------------------------------------------------------------------------------------------------


def test_a_program_of_two_steps_for_any_batch(tmp_path, capsys):
    out = tmp_path / "two.pt2"
    assert export([str(DIT), "--to", "pt2", "--steps", "2", "--decode", "--out", str(out)]) == 0
    assert "differ from the network's in float32 by" in capsys.readouterr().out
    model, program = load(DIT, device=CPU), files.open_program("pt2", out, CPU)
    for n in (1, 4):
        found = program(*check.inputs_of(model, n, seed=7).values())
        assert found.shape == (n, 1, 8, 8)
        torch.testing.assert_close(found, model.sample(n, 2, seed=7), atol=1e-5, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["two.pt2"]
    error = refused(DIT, "--to", "pt2", "--out", out)
    assert isinstance(error, AssetError) and "--overwrite replaces it" in str(error)


def test_guidance_and_the_sampler_of_the_objective_are_in_the_graph(tmp_path, train_tiny, capsys, monkeypatch):
    graphs = []  # in place of files, which take long to write
    monkeypatch.setattr(files, "write", lambda _, module, *rest: (graphs.append(module), rest[-1].touch()))
    monkeypatch.setattr(files, "open_program", lambda *ignored: graphs[-1])
    guided = train_tiny("guided", **GUIDED, train__steps=1)
    chosen = ["--guidance", "3", "--interval", "0.2,1", "--steps", "2"]
    assert export([str(guided.path), "--to", "pt2", *chosen, "--out", str(tmp_path / "guided.pt2")]) == 0
    assert "2 evaluations, ω 3 in [0.2, 1]" in capsys.readouterr().out
    model, graph = load(guided.path, device=CPU), graphs[-1]
    model.network.load_state_dict(perturbed(graph.u.network).state_dict())  # after one step ω does not matter
    found = graph(*check.inputs_of(model, 4, seed=7).values())
    expected, without = (model.sample(4, 2, seed=7, guidance=w, interval=(0.2, 1.0)) for w in (3.0, 1.0))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert not torch.allclose(found, without, atol=1e-3)
    assert latency([str(guided.path), "--steps", "1", "--batch", "1", "--repeats", "1", "--no-onnx"]) == 0

    renoised = train_tiny("renoised", objective={"kind": "consistency"}, train__steps=1).path
    assert export([str(renoised), "--to", "pt2", "--out", str(tmp_path / "one.pt2")]) == 0
    assert graphs[-1].sampler == "renoise"
    error = refused(renoised, "--to", "pt2", "--steps", "2", "--out", tmp_path / "x.pt2")
    assert "adds new noise after each step" in str(error)


@needs_onnx
def test_an_onnx_file_and_the_page_of_it(tmp_path, capsys):
    out = tmp_path / "digits.onnx"
    assert export([str(DIT), "--to", "onnx", "--decode", "--out", str(out)]) == 0
    assert "5 samples of ONNX Runtime differ" in capsys.readouterr().out
    model, program = load(DIT, device=CPU), files.open_program("onnx", out, CPU)
    for n in (1, 4):
        found = program(*check.inputs_of(model, n, seed=7).values())
        torch.testing.assert_close(found, model.sample(n, seed=7), atol=1e-5, rtol=0)
    assert str(ROOT).encode() not in out.read_bytes()  # no traces of where it was made

    known = check.expected(model, 1, None, model.codec.decoder())
    text = page.page(model, 1, out.read_bytes(), known, ("1.0", {"ort.wasm.bundle.min.mjs": b"library"}))
    assert base64.b64encode(out.read_bytes()).decode() in text and base64.b64encode(b"library").decode() in text
    assert "@@" not in text and "1.30.0" not in text.partition("cdn.jsdelivr.net")[0]


@pytest.mark.parametrize("run", [UNET, DIT], ids=["unet", "dit"])
def test_lower_precision_is_that_of_the_blocks(run):
    model = load(run, device=CPU)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.network.parameters():  # after four steps of training u is nearly zero
            parameter += 0.1 * torch.randn_like(parameter)
    known = check.expected(model, 2, None, None)
    lower_precision(model.network, DTYPES["bf16"], model.config.z_shape)
    kinds = {name: p.dtype for name, p in model.network.named_parameters()}
    assert torch.bfloat16 in kinds.values()
    assert all(kinds[name] == torch.float32 for name in (next(iter(kinds)), *list(kinds)[-1:]))
    found = check.difference(Generator(Velocity(model.network), 2, "flow_map"), known, "bf16", "it")
    assert 0 < found < 0.1
    with pytest.raises(NumericsError, match="more than the 1e-04 that fp32 may"):
        check.difference(Generator(Velocity(model.network), 2, "flow_map"), known, "fp32", "it")


def test_what_is_refused(trained, tmp_path, monkeypatch):
    out = tmp_path / "x.pt2"
    assert "ends in .onnx" in str(refused(trained.path, "--to", "onnx", "--out", out))
    assert "--out FILE" in str(refused(trained.path, "--to", "pt2"))
    assert "makes images itself" in str(refused(trained.path, "--to", "pt2", "--decode", "--out", out))
    assert "--runtime goes with" in str(refused(trained.path, "--to", "pt2", "--runtime", tmp_path, "--out", out))
    with pytest.raises(AssetError, match="is no copy of the npm package"):
        page.read_runtime(tmp_path)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert (
        "ONNX needs onnxruntime" in str(refused(trained.path, "--to", "onnx", "--out", tmp_path / "x.onnx"))
        or not has_onnx
    )
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "needs a C++ compiler" in str(refused(trained.path, "--to", "aoti", "--out", out))
    assert "no such convolutions" in str(
        refused(trained.path, "--to", "onnx", "--precision", "bf16", "--out", tmp_path / "x.onnx")
    )
    monkeypatch.setattr(files, "write", lambda kind, module, inputs, output, path: path.touch())
    monkeypatch.setattr(files, "open_program", lambda *ignored: lambda z: z)
    error = refused(trained.path, "--to", "pt2", "--out", out)
    assert isinstance(error, NumericsError) and "nothing was written" in str(error)
    assert not list(tmp_path.iterdir())


# --- the page ----------------------------------------------------------------------------------------------------


def test_the_pages_noise_is_normal_and_a_function_of_seed_and_sample():
    if (node := shutil.which("node")) is None:
        pytest.skip("needs node, which runs the page's JavaScript")
    text = page.TEMPLATE.read_text(encoding="utf-8").partition('<script id="noise">')[2].partition("</script>")[0]
    code = (
        f"{text}\nconst found = [[5, 0], [5, 1], [5, 2], [6, 0]].map(([seed, k]) => Array.from(normal(seed, k, 3001)));"
    )
    code += "console.log(JSON.stringify(found));"
    done = subprocess.run([node, "-e", code], capture_output=True, text=True, check=True)
    samples = torch.tensor(json.loads(done.stdout))  # (4, 3001)
    assert samples.isfinite().all()
    assert samples.mean(1).abs().max() < 0.06 and (samples.std(1) - 1).abs().max() < 0.05
    assert (samples.abs() > 2).float().mean(1).sub(0.0455).abs().max() < 0.015
    assert torch.corrcoef(samples).fill_diagonal_(0).abs().max() < 0.06
    assert subprocess.run([node, "-e", code], capture_output=True, text=True).stdout == done.stdout


@needs_onnx
@pytest.mark.skipif(not (RUNTIME and CHROMIUM), reason="needs Chromium, and ONNXRUNTIME_WEB=a copy of onnxruntime-web")
def test_the_page_in_a_browser_without_network(tmp_path):
    out = tmp_path / "digits.html"
    assert export([str(DIT), "--to", "html", "--decode", "--runtime", RUNTIME, "--out", str(out)]) == 0
    how = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        f"--user-data-dir={tmp_path}/c",
    ]
    how += ["--virtual-time-budget=20000", "--dump-dom", f"{out.as_uri()}#class=7&count=16"]
    shown = subprocess.run([CHROMIUM, *how], capture_output=True, text=True, timeout=120).stdout
    assert 'data-state="ready"' in shown and "16 images in" in shown and shown.count("<canvas") == 16
    assert float(shown.partition('data-difference="')[2].partition('"')[0]) < 1e-4


# --- latency -----------------------------------------------------------------------------------------------------


def test_latency(tmp_path, capsys):
    out = tmp_path / "times.json"
    arguments = [
        str(DIT),
        str(UNET),
        "--steps",
        "1,4",
        "--batch",
        "1,2",
        "--repeats",
        "2",
        "--no-onnx",
        "--out",
        str(out),
    ]
    assert latency([*arguments, "--device", "cpu"]) == 0
    shown, found = capsys.readouterr().out, json.loads(out.read_text())
    assert [run["run"] for run in found["runs"]] == [str(DIT), str(UNET)] and found["machine"]["threads"] >= 1
    rows = found["runs"][0]["latencies"]
    assert [(row["mode"], row["steps"], row["batch"]) for row in rows] == [
        (EAGER, 1, 1), (EAGER, 4, 1), (EAGER, 1, 2), (EAGER, 4, 2)
    ]  # fmt: skip
    assert all(row["images_per_s"] == pytest.approx(row["batch"] / row["seconds"]["median"]) for row in rows)
    assert all(row["seconds"]["high"] >= row["seconds"]["median"] >= row["seconds"]["low"] > 0 for row in rows)
    assert "4 evaluations take" in shown and shown.count("images/s") == 2
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(AssetError, match="--overwrite replaces it"):
        latency(arguments)


def test_as_many_evaluations_are_timed_as_are_stated():
    model, calls = load(DIT, device=CPU), []
    model.network.register_forward_hook(lambda network, inputs, output: calls.append(len(output)))
    measure(model, Plan((EAGER,), (1, 4), (2,), 3, 1e9))
    assert calls.count(2) == (1 + 3) * (1 + 4)  # one round to warm up


def test_what_would_take_too_long_is_left_out():
    rows = measure(load(DIT, device=CPU), Plan((EAGER,), (1, 2), (1,), 1, 0.0))
    assert rows == [Latency(EAGER, 1, 1, None), Latency(EAGER, 2, 1, None)] and ratios(rows) == ""
    assert table("run", rows).count("left out") == 2
