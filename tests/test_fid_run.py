"""`eval.fid` on runs of ours: what is recorded, seeds, resuming, bad input, and scoring during training."""

import gc

import numpy as np
import pytest
import torch
from fid_helpers import fid, grey_blobs, result, tiny_config, tiny_run

import eval.scoring.features
from eval import score
from eval.scoring.protocol import FULL_N, table
from eval.scoring.subjects import GeneratedSource, Sampling, draw_labels
from meanflow.errors import AssetError, UserError
from meanflow.training.checkpoint import load_checkpoint, save_checkpoint
from meanflow.training.loop import train
from meanflow.training.model import load_model
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import to_checkpoint

N = 40
ALONE = DistributedContext(0, 1, torch.device("cpu"))


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny")[0]


def pixels(run, *more) -> int:
    out = [] if "--out" in more else ["--out", run.eval]
    return fid(run.path, "--extractor", "pixels", "--n", N, "--device", "cpu", *out, *more)


def files(folder):
    return sorted(path.name for path in folder.glob("*.json"))


def test_every_ema_and_step_count_at_once(run, tmp_path, capsys):
    assert pixels(run, "--ema", "all", "--steps", "1,2", "--out", tmp_path) == 0
    names = [f"step00000007-ema{ema}-nfe{nfe}-n40" for ema in ("0.9", "0.99") for nfe in (1, 2)]
    assert files(tmp_path) == [f"{name}.json" for name in names]
    shown = capsys.readouterr().out
    values = set()
    for name in names:
        found = result(tmp_path / f"{name}.json")
        protocol = found["protocol"]
        assert found["schema"] == 1 and found["status"] == "complete"
        assert protocol["n"] == N and protocol["seed"] == 0 and protocol["tf32"] is False
        assert protocol["time_grid"] == [1 - k / protocol["nfe"] for k in range(protocol["nfe"] + 1)]
        assert protocol["samples"]["quantise"] == "round" and protocol["reference"]["n"] == 1797
        assert found["subject"]["step"] == 7 and found["subject"]["images"] == 7 * 64
        assert {"torch", "torch_fidelity"} <= protocol["versions"].keys() and protocol["device"] == "cpu"
        values.add(found["metrics"]["fd-pixels"])
        line = next(line for line in shown.splitlines() if line.startswith(name))
        assert "40" in line and "not comparable" in line
    assert len(values) == 4
    assert not (tmp_path / "work").exists()


def test_fifty_thousand_of_inception_are_comparable_and_fewer_are_not():
    row = {"name": "a", "metrics": {"fid": 3.0}, "comparable": True, "protocol": {"n": FULL_N}}
    fewer = {**row, "name": "b", "comparable": False, "protocol": {"n": 49_999}}
    full, short = table([row, fewer]).splitlines()[1:]
    assert full.split() == ["a", "3.0000", "50,000"] and "49,999  not comparable" in short


def test_a_sample_depends_on_its_seed_alone(run):
    model = load_model(run.path, None, torch.device("cpu"))
    source = GeneratedSource(model, "", 2, Sampling(20, 5, "random", "floor"))
    whole = source.images(0, 20)
    assert whole.dtype == torch.uint8 and whole.shape == (20, 1, 8, 8)
    parts = torch.cat([source.images(0, 3), source.images(3, 4), source.images(4, 20)])
    assert torch.equal(whole, parts)
    other = GeneratedSource(model, "", 2, Sampling(20, 6, "random", "floor"))
    assert not torch.equal(whole, other.images(0, 20))


def test_labels():
    drawn = draw_labels(Sampling(1000, 3, "random", "round"), 10)
    assert drawn.min() == 0 and drawn.max() == 9
    assert torch.equal(drawn[:50], draw_labels(Sampling(50, 3, "random", "round"), 10))
    assert draw_labels(Sampling(20, 0, "balanced", "round"), 10).bincount().tolist() == [2] * 10
    assert draw_labels(Sampling(3, 0, "7", "round"), 10).tolist() == [7, 7, 7]
    assert draw_labels(Sampling(3, 0, "random", "round"), 0) is None
    for wrong, classes in (("10", 10), ("-1", 10), ("cats", 10), ("balanced", 0)):
        with pytest.raises(UserError, match="--labels"):
            draw_labels(Sampling(3, 0, wrong, "round"), classes)


def interrupt_after(batches: int, patch) -> None:
    """Ctrl-C once `batches` more batches of features are written."""
    left, write = batches, eval.scoring.features.write_npz

    def counted(path, arrays):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(path, arrays)

    patch.setattr(eval.scoring.features, "write_npz", counted)


def test_interrupted_and_resumed(run, tmp_path, capsys):
    assert pixels(run, "--out", tmp_path / "whole", "--batch", 8) == 0
    args = ("--out", tmp_path / "cut", "--batch", 8)
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert pixels(run, *args) == 5
    name = "step00000007-ema0.99-nfe1-n40.json"
    assert result(tmp_path / "cut" / name)["status"] == "incomplete"
    assert "the features of 16 images are kept" in capsys.readouterr().err

    assert pixels(run, "--out", tmp_path / "cut", "--batch", 10, "--resume") == 2
    assert "has other settings" in (line := capsys.readouterr().err) and "batch: 8 there, 10 here" in line

    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(3, patch)  # only the three that are missing
        assert pixels(run, *args, "--resume") == 0
    whole, resumed = result(tmp_path / "whole" / name), result(tmp_path / "cut" / name)
    assert resumed["metrics"] == whole["metrics"] and resumed["protocol"] == whole["protocol"]


def test_without_resume_it_begins_anew(run, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(2, patch)
        assert pixels(run, "--out", tmp_path, "--batch", 8) == 5
    with pytest.MonkeyPatch.context() as patch:
        interrupt_after(5, patch)
        assert pixels(run, "--out", tmp_path, "--batch", 8) == 0


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [
        (["--metrics", "fid,lpips"], 2, "choose from fid, isc, kid, prc"),
        (["--metrics", "isc"], 2, "pixels has no features for isc"),
        (["--steps", "0"], 2, "--steps '0'"),
        (["--ema", "0.5"], 2, "has no EMA 0.5; it keeps 0.9, 0.99"),
        (["--labels", "3"], 2, "this network knows no classes"),
        (["--extractor", "vgg"], 2, "unknown extractor 'vgg'"),
        (["--extractor", "nowhere:make"], 2, "cannot be imported"),
        (["--metrics", "kid"], 2, "kid need 1,000 samples or more and there are 40"),
        (["--metrics", "fid,prc", "--n", "3"], 2, "need 4 samples or more and there are 3: raise --n"),
        (["--n", "1"], 2, "fid need 2 samples or more and there are 1"),
        (["--batch", "0"], 2, "--batch and --n must be 1 or more"),
        (["--samples", "also.zip"], 2, "one of them"),
        (["--extractor", "inception-v3-compat", "--weights", "none.pth"], 3, "--weights none.pth: no such file"),
    ],
)
def test_bad_usage(run, more, code, line, tmp_path, capsys):
    assert pixels(run, "--out", tmp_path, *more) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and line in error
    assert files(tmp_path) == []


def test_a_device_that_is_not_here(run, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert pixels(run, "--device", "cuda") == 2
    assert "PyTorch sees no GPU" in capsys.readouterr().err


def test_samples_that_are_not_finite(tmp_path, capsys):
    run, state = tiny_run(tmp_path / "run")
    for averages in state.ema.averages.values():
        next(iter(averages.values())).fill_(float("nan"))
    save_checkpoint(run.checkpoints, 8, to_checkpoint(state, tiny_config(), {"images": 1, "classes": [], "sha256": ""}))
    assert pixels(run) == 4
    assert "not finite" in capsys.readouterr().err


def test_bad_checkpoints(tmp_path, capsys):
    run, _ = tiny_run(tmp_path / "run")
    (path,) = run.checkpoints.glob("*.pt")
    content = torch.load(path, weights_only=True)
    content["ema"]["0.99"].pop(next(iter(content["ema"]["0.99"])))
    torch.save(content, tmp_path / "other.pt")
    path.write_bytes(path.read_bytes()[:-10])
    (tmp_path / "empty").mkdir()
    for what, line in (
        (path, "damaged"),
        (tmp_path / "other.pt", "do not fit the network"),
        (tmp_path / "empty", "has no checkpoint yet"),
        (tmp_path / "none.pt", "no such checkpoint"),
    ):
        assert fid(what, "--extractor", "pixels", "--n", N, "--out", tmp_path / "out") == 3
        assert line in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_full_disk(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})())
    assert pixels(run, "--out", tmp_path) == 3
    assert "make room" in capsys.readouterr().err


def test_processes_with_other_arguments_stop(monkeypatch):
    monkeypatch.setattr(ctx, "gather", lambda _, value: [value, {**value, "n": "7"}])
    with pytest.raises(UserError, match=r"process 1 got other arguments than process 0 \(n differ\)"):
        ctx.assert_same_on_all_ranks(
            DistributedContext(0, 2, torch.device("cpu")), {"n": "8", "seed": "0"}, "arguments"
        )


def test_samples_need_a_reference_and_the_network_their_channels(tmp_path, capsys):
    np.savez(tmp_path / "grey.npz", arr_0=grey_blobs(4, 0))
    assert fid("--samples", tmp_path / "grey.npz", "--extractor", "pixels") == 2
    assert "--samples needs --ref" in capsys.readouterr().err
    assert (
        fid("--samples", tmp_path / "grey.npz", "--ref", tmp_path / "grey.npz", "--n", 9, "--extractor", "pixels") == 2
    )
    assert "holds 4 images and --n asks for 9" in capsys.readouterr().err


# --- as the recipe says ---------------------------------------------------------------------------


def test_score_run_uses_what_is_there(tmp_path):
    config = tiny_config("eval.samples=30", "eval.steps=[1, 2]", "eval.batch=16")
    run, _ = tiny_run(tmp_path / "run", config)
    said = []
    first = score.score_run(run, config, ALONE, said.append)
    assert [r["protocol"]["nfe"] for r in first] == [1, 2] and "not comparable" in said[0]
    assert all(r["protocol"]["ema"] == "0.99" for r in first)
    stamps = {path: path.stat().st_mtime_ns for path in run.eval.glob("*.json")}
    assert score.score_run(run, config, ALONE, said.append) == first
    assert {path: path.stat().st_mtime_ns for path in run.eval.glob("*.json")} == stamps


def test_preflight_and_floor():
    assert score.preflight(tiny_config()) == []
    assert score.floor(tiny_config()) == pytest.approx(0.28, abs=0.1)
    with pytest.raises(UserError, match="unknown extractor 'vgg'"):
        score.preflight(tiny_config("eval.extractor=vgg"))
    with pytest.raises(AssetError, match=r"none\.npz: no such file"):
        score.preflight(tiny_config("eval.reference=none.npz"))


def test_preflight_warns_where_the_weights_cannot_be_had(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no")))
    (line,) = score.preflight(tiny_config("eval.extractor=inception-v3-compat"))
    assert line.startswith("this run can be trained but not scored: ")


def test_scoring_during_training_changes_nothing_in_it(tmp_path):
    """Weights, averages and random states with and without it are equal; the best checkpoint is kept."""
    config = tiny_config(
        *("train.steps=4", "train.batch=8", "checkpoint.every=2", "checkpoint.keep=1"),
        *("model.dropout=0.1", "eval.every=2", "eval.every_samples=24", "eval.steps=[1]", "eval.batch=16"),
    )
    kept, switches = {}, {}
    for name, hook in (("with", score.ScoreDuring(lambda line: None)), ("without", None)):
        run = RunFolder(tmp_path / name)
        run.path.mkdir()
        torch.manual_seed(0)
        assert train(config, run, ALONE, lambda line: None, evaluate=hook) == 0
        kept[name] = load_checkpoint(run.checkpoints / "00000004.pt"), torch.get_rng_state()
        switches[name] = (torch.get_num_threads(), torch.backends.cudnn.benchmark, torch.is_grad_enabled())
    (one, rng_one), (two, rng_two) = kept["with"], kept["without"]
    assert switches["with"] == switches["without"] and torch.equal(rng_one, rng_two)
    for a, b in [(one.model, two.model), *((one.ema[k], two.ema[k]) for k in two.ema)]:
        assert all(torch.equal(a[key], b[key]) for key in b)

    run = RunFolder(tmp_path / "with")
    assert len(files(run.eval)) == 2 * 2  # two EMAs at two steps
    best = result(run.checkpoints / "best.json")["best"]
    scores = {step: result(run.eval / f"step{step:08d}-ema0.99-nfe1-n24.json") for step in (2, 4)}
    lowest = min(scores, key=lambda step: scores[step]["metrics"]["fd-pixels"])
    assert best["value"] == scores[lowest]["metrics"]["fd-pixels"]
    assert load_checkpoint(run.checkpoints / "best.pt").meta["step"] == lowest


def test_scoring_during_training_leaks_no_tensor(tmp_path):
    config = tiny_config("eval.every_samples=24", "eval.steps=[1]", "eval.batch=16")
    run, state = tiny_run(tmp_path / "run", config)
    hook, alive = score.ScoreDuring(lambda line: None), []
    for _ in range(3):
        hook(run, config, state, ALONE)
        gc.collect()
        alive.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
        for path in run.eval.glob("*.json"):
            path.unlink()  # or it would be taken as it stands
    assert alive[1] == alive[0] and alive[2] == alive[0]


def test_only_a_better_checkpoint_replaces_the_best(tmp_path):
    run, _ = tiny_run(tmp_path / "run")
    (path,) = run.checkpoints.glob("*.pt")

    def keep(value, n=100):
        row = {"protocol": {"ema": "0.9", "nfe": 1, "n": n}, "metrics": {"fid": value}}
        return score.keep_best(path, [row], "fid", "0.9", 1)

    assert [keep(3.0), keep(4.0), keep(2.0), keep(2.0), keep(9.0, n=200)] == [True, False, True, False, True]
    assert load_checkpoint(run.checkpoints / "best.pt").meta["step"] == 7
