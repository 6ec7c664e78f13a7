"""`eval.fid` on runs of ours: what is recorded, seeds, resuming, bad input; and scoring during training."""

import gc
import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from fid_helpers import EMAS, count_pieces, error, fid, grey_blobs, interrupt, result, tiny_run
from running import ROOT, tiny_config, train_run, write_images

from eval.scoring import score
from eval.scoring.extractors import affordable
from eval.scoring.options import FULL_N
from eval.scoring.protocol import table
from eval.scoring.sources import GeneratedSource, Sampling, draw_labels
from eval.scoring.threads import NAME, each, interruptible
from meanflow.errors import AssetError, UserError
from meanflow.sampling import time_grid
from meanflow.training.checkpoint import load_checkpoint, save_checkpoint
from meanflow.training.model import load
from meanflow.training.processes import DistributedContext, assert_same_on_all_ranks
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import to_checkpoint

N, CPU = 40, torch.device("cpu")
ALONE = DistributedContext(0, 1, CPU)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return tiny_run(tmp_path_factory.mktemp("run") / "tiny")[0]


def scored(run, *more) -> int:
    """By the run's own recipe: with pixels, against the digits."""
    out = [] if "--out" in more else ["--out", run.eval]
    return fid(run.path, "--n", N, "--device", "cpu", *out, *more)


def files(folder):
    return sorted(path.name for path in folder.glob("*.json"))


# --- what is scored and recorded ---------------------------------------------------------------------------------


def test_every_ema_step_count_and_grid_at_once(run, tmp_path, capsys):
    assert scored(run, "--ema", "all", "--steps", "1,2", "--grid", "1,0.3,0", "--out", tmp_path) == 0
    grids = {"nfe1": [1, 0], "nfe2": [1, 0.5, 0], "nfe2-grid1-0.3-0": [1, 0.3, 0]}
    expected = {f"step00000007-ema{ema}-{nfe}-n40": grids[nfe] for ema in ("0.9", "0.99") for nfe in grids}
    assert files(tmp_path) == sorted(f"{name}.json" for name in expected)
    shown = capsys.readouterr().out
    values = set()
    for name, grid in expected.items():
        found = result(tmp_path / f"{name}.json")
        protocol = found["protocol"]
        assert found["schema"] == 1 and found["status"] == "complete"
        assert protocol["n"] == N and protocol["seed"] == 0 and protocol["tf32"] is False
        assert protocol["time_grid"] == grid and protocol["nfe"] == len(grid) - 1
        assert protocol["reference"]["n"] == 1797 and protocol["extractor"] == "pixels"  # as the recipe says
        assert found["subject"]["step"] == 7 and found["subject"]["images"] == 7 * 8
        assert {"torch", "torch_fidelity"} <= protocol["versions"].keys() and protocol["device"] == "cpu"
        values.add(found["metrics"]["fd-pixels"])
        line = next(line for line in shown.splitlines() if line.startswith(f"{name} "))
        assert "40" in line and "not comparable" in line
    assert len(values) == 6 and "scoring 40 samples, 6 times: pixels, 64 features an image" in shown
    assert not (tmp_path / "work").exists()


def test_fifty_thousand_of_inception_are_comparable_and_fewer_are_not():
    row = {"name": "a", "metrics": {"fid": 3.0}, "comparable": True, "protocol": {"n": FULL_N}}
    fewer = {**row, "name": "b", "comparable": False, "protocol": {"n": 49_999}}
    full, short = table([row, fewer]).splitlines()[1:]
    assert full.split() == ["a", "3.0000", "50,000"] and "49,999  not comparable" in short


def test_a_sample_depends_on_its_seed_alone(run):
    model = load(run.path, device=CPU)

    def source(seed):
        return GeneratedSource(model, "", time_grid(2), Sampling(20, seed, "random", "floor"))

    whole = source(5).images(0, 20)
    assert whole.dtype == torch.uint8 and whole.shape == (20, 1, 8, 8)
    parts = torch.cat([source(5).images(0, 3), source(5).images(3, 4), source(5).images(4, 20)])
    assert torch.equal(whole, parts) and not torch.equal(whole, source(6).images(0, 20))


def test_labels():
    def draw(n, seed, labels, classes=10):
        return draw_labels(Sampling(n, seed, labels, "round"), classes)

    drawn = draw(1000, 3, "random")
    assert drawn.min() == 0 and drawn.max() == 9 and torch.equal(drawn[:50], draw(50, 3, "random"))
    assert draw(20, 0, "balanced").bincount().tolist() == [2] * 10
    assert draw(3, 0, "7").tolist() == [7, 7, 7] and draw(3, 0, "random", 0) is None
    for wrong, classes in (("10", 10), ("-1", 10), ("cats", 10), ("balanced", 0)):
        with pytest.raises(UserError, match="--labels"):
            draw(3, 0, wrong, classes)


# --- interrupted -------------------------------------------------------------------------------------------------


def test_interrupted_and_resumed(run, tmp_path, capsys, monkeypatch):
    assert scored(run, "--out", tmp_path / "whole", "--batch", 8) == 0
    args = ("--out", tmp_path / "cut", "--batch", 8)
    kept = 1797 // 64 + 1  # batches of the reference
    with monkeypatch.context() as patch:
        count_pieces(patch, kept + 2, interrupt)
        assert scored(run, *args) == 5
    name = "step00000007-ema0.99-nfe1-n40.json"
    assert result(tmp_path / "cut" / name)["status"] == "incomplete"
    assert f"the features of {1797 + 16:,} images are kept" in error(capsys)

    assert scored(run, "--out", tmp_path / "cut", "--batch", 10, "--resume") == 2
    assert "has other settings" in (line := error(capsys)) and "batch: 8 there, 10 here" in line

    with monkeypatch.context() as patch:
        written = count_pieces(patch)
        assert scored(run, *args, "--resume") == 0
        assert len(written) == 3  # only those that are missing
    whole, resumed = result(tmp_path / "whole" / name), result(tmp_path / "cut" / name)
    assert resumed["metrics"] == whole["metrics"] and resumed["protocol"] == whole["protocol"]

    with monkeypatch.context() as patch:
        count_pieces(patch, 2, interrupt)
        assert scored(run, *args) == 5
    written = count_pieces(monkeypatch)
    assert scored(run, *args) == 0 and len(written) == 5  # without --resume it begins anew


def test_ctrl_c_is_answered_in_the_middle_of_arithmetic():
    begun, release = threading.Event(), threading.Event()

    def long(_=None):
        begun.set()
        release.wait(60)  # as deaf to signals as a call of numpy, in a thread

    def press():
        begun.wait(60)
        os.kill(os.getpid(), signal.SIGINT)

    for work in (lambda: interruptible(long, CPU), lambda: list(each(long, [1, 2], CPU))):
        begun.clear()
        threading.Thread(target=press).start()
        with pytest.raises(KeyboardInterrupt):
            work()
        assert any(thread.name == NAME for thread in threading.enumerate())  # left behind
    release.set()


def test_the_process_ends_cleanly_while_a_thread_computes():
    """Unloading numpy's libraries under it would crash, with another exit code."""
    program = """
import atexit, os, signal, sys, threading, time
atexit.register(print, "unloading")
import numpy as np, torch
from eval.scoring.threads import interruptible
from meanflow.errors import run_main
def main(argv):
    threading.Thread(target=lambda: (time.sleep(0.5), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    interruptible(lambda: [np.linalg.eigvals(np.random.rand(400, 400)) for _ in range(10_000)], torch.device("cpu"))
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.exit(run_main(main))
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


# --- bad input ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [
        (["--metrics", "fid,lpips"], 2, "choose from fid, isc, kid, prc"),
        (["--metrics", "isc"], 2, "pixels has no features for isc"),
        (["--steps", "0"], 2, "argument --steps: give a whole number of 1 or more, not '0'"),
        (["--grid", "1,0.2,0.5,0"], 2, "descend from 1 to 0"),
        (["--ema", "0.5"], 2, "has no EMA 0.5; it keeps 0.9, 0.99"),
        (["--labels", "3"], 2, "this network knows no classes"),
        (["--extractor", "vgg"], 2, "unknown extractor 'vgg': use one of"),
        (["--extractor", "nowhere:make"], 2, "cannot be imported"),
        (["--metrics", "kid"], 2, "kid need 1,000 samples or more and there are 40"),
        (["--metrics", "fid,prc", "--n", "3"], 2, "need 4 samples or more and there are 3: raise --n"),
        (["--n", "1"], 2, "fid need 2 samples or more and there are 1"),
        (["--batch", "0"], 2, "argument --batch: give a whole number of 1 or more"),
        (["--samples", "also.zip"], 2, "one of them"),
        (["--weights", "none.pth"], 3, "--weights none.pth: no such file"),  # though pixels need none
        (["--device", "cuda"], 2, "PyTorch sees 0"),
        (["--colour"], 2, "unrecognized arguments: --colour"),
    ],
)
def test_bad_usage(run, more, code, line, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert scored(run, "--out", tmp_path, *more) == code
    assert line in error(capsys)
    assert files(tmp_path) == []


@pytest.mark.parametrize("module", ["eval.fid", "eval.sample", "eval.classifier"])
def test_usage_errors_and_help_do_not_wait_for_pytorch(module):
    program = f"""
import sys
from {module} import main
from meanflow.errors import run_main
assert run_main(main, ["--n", "none"]) == 2
try:
    main(["--help"])
except SystemExit:
    assert "torch" not in sys.modules and "numpy" not in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    if module == "eval.fid":
        assert all(name in done.stdout for name in ("inception-v3-compat", "pixels", "thumbnails", "digits"))


def test_impossible_paths(run, tmp_path, capsys, monkeypatch):
    """One line and exit 3 (or 2 where another kind of file is meant), on every option that takes a path."""
    (tmp_path / "file").write_text("text")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path)
    bad = ["/proc/x", "/proc/x/y", "file/inside", "/dev/null", "/dev/null/x", "x" * 300, ""]
    options = {"--out": ["file"], "--cache": ["file"], "--ref": ["file", "folder"], "--ckpt": ["file", "folder"]}
    options |= {"--samples": ["file", "folder"], "--weights": ["folder"]}
    for option, more in options.items():
        for path in [*bad, *more]:
            rest = [] if option in ("--ckpt", "--samples") else [run.path, "--n", 8]
            rest += ["--ref", "digits"] if option == "--samples" else []
            rest += ["--out", "out"] if option != "--out" else []
            code = fid(*rest, option, path)
            shown = capsys.readouterr().err.strip().splitlines()
            assert code in (2, 3) and shown[-1].startswith("error: ") and "Traceback" not in "".join(shown), (
                option,
                path,
            )
    assert fid("--samples", run.path, "--ref", "cifar10-train", "--data", "file", "--offline") == 3


def test_samples_that_are_not_finite(tmp_path, capsys):
    run, state = tiny_run(tmp_path / "run")
    for averages in state.ema.averages.values():
        next(iter(averages.values())).fill_(float("nan"))
    data = {"images": 1, "classes": [], "sha256": ""}
    save_checkpoint(run.checkpoints, 8, to_checkpoint(state, tiny_config(**EMAS), data))
    assert scored(run) == 4
    assert "not finite" in error(capsys)


@pytest.mark.parametrize(
    ("what", "free", "line"),
    [
        ("shutil.disk_usage", lambda path: type("Usage", (), {"free": 100})(), "make room"),
        ("eval.scoring.evaluate.free_memory", lambda device: 100, "of memory and 0.0 GB are free: lower --n"),
    ],
)
def test_a_full_disk_or_memory(what, free, line, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(what, free)
    assert scored(run, "--out", tmp_path) == 3
    assert line in error(capsys)


def test_processes_with_other_arguments_stop(monkeypatch):
    monkeypatch.setattr("meanflow.training.processes.gather", lambda _, value: [value, {**value, "n": "7"}])
    with pytest.raises(UserError, match=r"process 1 got other arguments than process 0 \(n differ\)"):
        assert_same_on_all_ranks(DistributedContext(0, 2, CPU), {"n": "8", "seed": "0"}, "arguments")


def test_samples_need_a_reference_and_enough_images(tmp_path, capsys):
    grey = tmp_path / "grey.npz"
    np.savez(grey, arr_0=grey_blobs(4, 0))
    assert fid("--samples", grey, "--extractor", "pixels") == 2 and "--samples needs --ref" in error(capsys)
    assert fid("--samples", grey, "--ref", grey, "--n", 9, "--extractor", "pixels") == 2
    assert "holds 4 images and --n asks for 9" in error(capsys)


# --- as the recipe says ------------------------------------------------------------------------------------------


def test_score_run_uses_existing_results(tmp_path):
    config = tiny_config(**EMAS, eval__samples=30, eval__steps=[1, 2], eval__batch=16, sample__uint8="floor")
    run, _ = tiny_run(tmp_path / "run", config)
    first = score.score_run(run, config, ALONE)
    assert [r["protocol"]["nfe"] for r in first] == [1, 2]
    assert all(r["protocol"]["ema"] == "0.99" and r["protocol"]["samples"]["quantise"] == "floor" for r in first)
    stamps = {path: path.stat().st_mtime_ns for path in run.eval.glob("*.json")}
    assert score.score_run(run, config, ALONE) == first
    assert {path: path.stat().st_mtime_ns for path in run.eval.glob("*.json")} == stamps
    for more, rule in ((), "floor"), (("--quantise", "round"), "round"):  # eval.fid goes by the recipe too
        assert scored(run, *more) == 0
        found = result(run.eval / "step00000007-ema0.99-nfe1-n40.json")
        assert found["protocol"]["samples"]["quantise"] == rule
    closing = score.closing_table(config, run, first)
    assert "1-NFE fd-pixels" in closing and "two halves of the real images" in closing and str(run.eval) in closing


def test_before_training(tmp_path, monkeypatch):
    assert score.preflight(tiny_config()) == []
    assert score.real_vs_real(tiny_config()) == pytest.approx(0.28, abs=0.1)
    with pytest.raises(UserError, match="unknown extractor 'vgg'"):
        score.preflight(tiny_config(eval__extractor="vgg"))
    with pytest.raises(AssetError, match=r"none\.npz: no such file"):
        score.preflight(tiny_config(eval__reference="none.npz"))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", lambda *args, **kwargs: (_ for _ in ()).throw(OSError("no")))
    (line,) = score.preflight(tiny_config(eval__extractor="inception-v3-compat"))
    assert line.startswith("this run can be trained but not scored: ") and "--extractor pixels" in line


def test_images_too_large_for_pixels_are_scored_with_thumbnails(tmp_path):
    large = tiny_config(data__path=str(tmp_path), model__image_size=64, model__channels=3, **EMAS)
    (line,) = score.preflight(large)
    assert "64×64 are 12,288 numbers each" in line and "thumbnails" in line
    assert score.cost_line(large).startswith("scoring           128 samples: thumbnails, 192 features an image, about ")
    assert line in score.cost_line(large) and "minute on CPU" in score.cost_line(large)
    assert affordable("pixels", (3, 32, 32)) == ("pixels", ()) and affordable("vgg", (3, 64, 64)) == ("vgg", ())

    write_images(tmp_path, 22, size=64)
    run, _ = tiny_run(tmp_path.with_name("run"), large)
    assert scored(run, "--n", 4) == 0
    found = result(run.eval / "step00000007-ema0.99-nfe1-n4.json")
    assert found["protocol"]["extractor"] == "thumbnails" and found["warnings"] == [line]
    assert list(found["metrics"]) == ["fd-thumbnails"]
    assert scored(run, "--n", 4, "--extractor", "pixels") == 0  # where it is asked for
    assert list(result(run.eval / "step00000007-ema0.99-nfe1-n4.json")["metrics"]) == ["fd-pixels"]


def test_scoring_during_training_changes_nothing_in_it(tmp_path):
    """Weights, averages and random states with and without it are equal; the best checkpoint is kept."""
    how = {"train__steps": 4, "checkpoint__keep": 1, "model__dropout": 0.1}
    config = tiny_config(**EMAS, **how, eval__every=2, eval__every_samples=24, eval__batch=16)
    kept, switches = {}, {}
    for name, hook in (("with", score.ScoreDuring()), ("without", None)):
        run = RunFolder(tmp_path / name)
        torch.manual_seed(0)
        assert train_run(config, run, ALONE, hook) == 0
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
    config = tiny_config(**EMAS, eval__every_samples=24, eval__batch=16)
    run, state = tiny_run(tmp_path / "run", config)
    hook, alive = score.ScoreDuring(), []
    for _ in range(3):
        hook(run, config, state, ALONE)
        gc.collect()
        alive.append(sum(type(item) is torch.Tensor for item in gc.get_objects()))
        for path in run.eval.glob("*.json"):
            path.unlink()  # or it would be taken as it is
    assert alive[1] == alive[0] and alive[2] == alive[0]


def test_only_a_better_checkpoint_replaces_the_best(tmp_path):
    run, _ = tiny_run(tmp_path / "run")
    (path,) = run.checkpoints.glob("*.pt")

    def keep(value, n=100):
        row = {"protocol": {"ema": "0.9", "nfe": 1, "n": n}, "metrics": {"fid": value}}
        return score.keep_best(path, [row], "fid", "0.9", 1)

    assert [keep(3.0), keep(4.0), keep(2.0), keep(2.0), keep(9.0, n=200)] == [True, False, True, False, True]
    assert load_checkpoint(run.checkpoints / "best.pt").meta["step"] == 7
