"""`run.sh` and `python -m run` as people use them: in processes of their own, stopped, killed, and run again."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from running import (
    RECIPES,
    ROOT,
    comparable_metrics,
    context,
    last_step,
    one_line,
    redirect,
    steps_of,
    tiny_config,
    tiny_tree,
    until,
    write_images,
    write_recipe,
)

from eval import launch as launch_module
from eval import run as module
from meanflow.errors import run_main
from meanflow.training import settings
from meanflow.training.checkpoint import list_checkpoints, load_checkpoint
from meanflow.training.config import load_config
from meanflow.training.loop import train
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from meanflow.training.signals import warned_by_usr1

RICH = {
    "model__dropout": 0.2,
    "train__microbatch": 3,
    "ema__decays": [0.9, 0.5],
    "ema__every": 3,
    "checkpoint__every": 3,
    "train__steps": 30,
}


def newest(run: Path):
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def assert_equal_runs(a: Path, b: Path) -> None:
    one, two = newest(a), newest(b)
    assert one.meta["step"] == two.meta["step"]
    for part in ("model", "ema", "optimizer"):
        ours, theirs = (settings.flatten(getattr(checkpoint, part)) for checkpoint in (one, two))
        assert ours.keys() == theirs.keys()
        assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    assert comparable_metrics(a) == comparable_metrics(b)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    run = tmp_path_factory.mktemp("unbroken")
    train_in(run, DistributedContext(0, 1, torch.device("cpu")), **RICH)
    return run


def train_in(run: Path, ctx: DistributedContext, **changes) -> None:
    """The training part of `run`, in this process."""
    folder, config = RunFolder(run), tiny_config(**changes)
    with folder.lock():
        folder.open_for(config)
        assert train(config, folder, ctx, say=lambda line: None) == 0


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def refused(capsys, recipe, tmp_path):
    """`refused("--set", …, code=2)`: the one line that `run` ends with."""

    def refused(*arguments, code: int = 2, path: Path | None = None) -> str:
        arguments = [str(argument) for argument in (path or recipe(), *arguments, "--device", "cpu")]
        if "--out" not in arguments:
            arguments += ["--out", str(tmp_path / "refused")]
        assert run_main(module.main, arguments) == code
        return one_line(capsys.readouterr().err)

    return refused


# --- the whole job ---------------------------------------------------------------------------------------------


def test_the_whole_job_leaves_what_the_readme_promises(recipe, launch, tmp_path):
    run = tmp_path / "runs" / "new"
    done = launch("run", recipe(train__steps=30), "--out", run).wait()
    assert done.code == 0, done.err
    assert len(re.split("[\r\n]", done.err)) < 20, f"a log is flooded:\n{done.err}"
    assert "1-NFE fd-pixels" in done.out and "floor: two halves of the real images" in done.out
    for name in ("samples.png", "curves.png", "eval", "metrics.jsonl", "checkpoints"):
        assert str(run / name) in done.out and (run / name).exists(), name
    assert load_config(run / "config.yaml") == tiny_config(train__steps=30)
    assert steps_of(run) == list(range(1, 31))
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 3 * 66 + 2)
    (result,) = [json.loads(path.read_text()) for path in (run / "eval").glob("*.json")]
    assert result["status"] == "complete" and result["protocol"]["n"] == 128 and result["metrics"]["fd-pixels"] > 0
    (start,) = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert start["processes"] == 1 and start["torch"] == torch.__version__ and start["changed"] == {}

    before = {path: path.read_bytes() for path in (run / "checkpoints").iterdir()}
    again = launch("run", recipe(train__steps=30), "--out", run, "--set", "sample.count=4").wait()
    assert again.code == 0 and "continuing from step 30" in again.out and "1-NFE fd-pixels" in again.out
    assert {path: path.read_bytes() for path in (run / "checkpoints").iterdir()} == before
    assert steps_of(run) == list(range(1, 31))
    starts = [json.loads(line) for line in (run / "starts.jsonl").read_text().splitlines()]
    assert len(starts) == 2 and starts[1]["changed"] == {"sample.count": [9, 4]}


def test_own_images_with_classes_and_scores_on_the_way(recipe, launch, tmp_path):
    images = write_images(tmp_path / "images", count=30)
    file = recipe(
        data__path=str(images),
        model__channels=3,
        model__classes=2,
        model__augment_labels=6,
        data__flip=True,
        eval__every=3,
        eval__steps=[1, 2],
    )
    done = launch("run", file, "--out", tmp_path / "run").wait()
    assert done.code == 0, done.err
    assert "2-NFE fd-pixels" in done.out
    results = [json.loads(path.read_text()) for path in (tmp_path / "run" / "eval").glob("*.json")]
    assert {result["subject"]["step"] for result in results} == {3, 6}
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# --- stopped ---------------------------------------------------------------------------------------------------


def test_ctrl_c_saves_says_how_to_continue_and_ends_with_130(recipe, launch, tmp_path, alone):
    run = tmp_path / "run"
    first = launch("run", recipe(train__steps=100_000, checkpoint__every=1000), "--out", run)
    until(lambda: last_step(run) >= 3)

    second = launch("run", recipe(train__steps=100_000, checkpoint__every=1000), "--out", run).wait()
    assert (
        second.code == 3 and second.error == f"error: {run}: another process is training here; wait for it or stop it"
    )

    first.send(signal.SIGINT)
    first.wait()
    assert first.code == 130 and "Traceback" not in first.err
    (line,) = first.out.splitlines()
    step = last_step(run)
    assert line == f"stopped and saved at step {step:,} of 100,000; the same command continues"
    assert newest(run).meta["step"] == step and not list(run.rglob("*.tmp"))
    assert not (run / "samples.png").exists() and not (run / "eval").exists()

    said = []
    assert train(tiny_config(train__steps=step + 2), RunFolder(run), alone, said.append) == 0
    assert said == [f"continuing from step {step:,} ({run}/checkpoints/{step:08d}.pt)"]
    assert steps_of(run) == list(range(1, step + 3))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_warning_saves_and_ends_with_143(recipe, launch, tmp_path, number):
    run = tmp_path / "run"
    first = launch("run", recipe(train__steps=100_000, checkpoint__every=1000), "--out", run)
    until(lambda: last_step(run) >= 2)
    first.send(number)
    assert first.wait().code == 143 and "stopped and saved at step" in first.out
    assert newest(run).meta["step"] == last_step(run)


def test_a_full_disk_while_saving_loses_nothing(launch, tmp_path, unbroken, alone):
    """A real limit on file sizes cuts the write of the checkpoint off in its middle."""
    run, file = tmp_path / "run", write_recipe(tmp_path / "rich.yaml", **RICH)
    train_in(run, alone, **{**RICH, "train__steps": 3})
    (kept,) = list_checkpoints(run / "checkpoints")
    content, size = kept.read_bytes(), kept.stat().st_size

    full = launch("run", file, "--out", run, largest_file=size // 2).wait()
    assert full.code == 3
    assert full.error.startswith(f"error: {run}/checkpoints/00000006.pt: the checkpoint of step 6 could not be saved")
    assert "File too large" in full.error and "run the same command again" in full.error
    assert list_checkpoints(run / "checkpoints") == [kept] and kept.read_bytes() == content
    assert not list(run.rglob("*.tmp"))

    train_in(run, alone, **RICH)
    assert steps_of(run) == list(range(1, 31))
    assert_equal_runs(run, unbroken)


def test_slurms_warning_where_there_is_nothing_to_save():
    with pytest.raises(SystemExit) as caught, warned_by_usr1():
        signal.raise_signal(signal.SIGUSR1)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


@pytest.mark.parametrize("name", ["config.tmp", "starts.jsonl", "metrics.tmp", "checkpoints/00000002.pt.tmp"])
def test_a_full_disk_at_any_file_is_one_line(refused, tmp_path, name):
    """/dev/full in the place of one file: its writes end as on a full disk."""
    full = tmp_path / "run" / name
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    error = refused("--out", tmp_path / "run", code=3)
    assert "No space left on device" in error and "run the same command again" in error


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    assert "choose another --out" in refused("--out", tmp_path / "file" / "run", code=3)
    assert "choose another --out" in refused("--out", "/proc/run", code=3)  # read-only whoever asks


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_run_folder_that_became_read_only(refused, run_of):
    run, file = run_of
    run.chmod(0o555)
    try:
        assert "cannot be written (Permission denied)" in refused("--out", run, path=file, code=3)
    finally:
        run.chmod(0o755)


def test_numbers_that_explode_end_with_4(recipe, launch, tmp_path):
    file = recipe(optim__lr=1e25, optim__warmup_steps=0, checkpoint__every=1, train__steps=20)
    done = launch("run", file, "--out", tmp_path / "run").wait()
    assert done.code == 4 and re.search(r"error: step \d+: .*last good checkpoint is .*optim\.lr", done.error)
    assert not (tmp_path / "run" / "samples.png").exists()


# --- a folder that holds a run ---------------------------------------------------------------------------------


@pytest.fixture
def run_of(trained, tmp_path):
    """A copy of a finished run of the tiny recipe with two EMAs, and that recipe."""
    file = write_recipe(tmp_path / "same.yaml", ema__decays=[0.9, 0.5])
    return Path(shutil.copytree(trained.path, tmp_path / "run")), file


def test_other_settings_are_refused_with_what_differs(refused, run_of):
    run, file = run_of
    before = (run / "config.yaml").read_bytes()
    error = refused("--set", "model.width=16", "--set", "optim.lr=0.5", "--out", run, path=file)
    assert "model.width is 8 there, 16 now" in error and "optim.lr is 0.001 there, 0.5 now" in error
    assert "--out" in error and (run / "config.yaml").read_bytes() == before


def test_all_checkpoints_damaged_is_one_line_and_no_fresh_start(refused, run_of):
    run, file = run_of
    for path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(b"")
    metrics = (run / "metrics.jsonl").read_bytes()
    assert "no intact checkpoint" in refused("--out", run, path=file, code=3)
    assert (run / "metrics.jsonl").read_bytes() == metrics


def test_other_images_are_refused(refused, tmp_path, alone):
    images, others = write_images(tmp_path / "a"), write_images(tmp_path / "b", count=24)
    run, changes = tmp_path / "run", {"model__channels": 3, "data__path": str(images)}
    file = write_recipe(tmp_path / "a.yaml", **changes)
    train_in(run, alone, **changes)
    assert "other images" in refused("--set", f"data.path={others}", "--out", run, path=file)


def test_a_config_that_was_lost_does_not_let_another_run_in(refused, run_of):
    """Without config.yaml the checkpoint still knows what it is."""
    run, file = run_of
    (run / "config.yaml").unlink()
    error = refused("--set", "optim.lr=0.5", "--out", run, path=file)
    assert "optim.lr is 0.001 there, 0.5 now" in error
    assert newest(run).meta["step"] == 6


def test_settings_may_change_until_the_first_checkpoint(refused, recipe, tmp_path, alone):
    """A first start that failed, for its settings or otherwise, must not block the folder."""
    run = tmp_path / "run"
    assert "model.classes is 7" in refused("--set", "model.classes=7", "--out", run)
    assert (run / "config.yaml").exists() and not (run / "checkpoints").exists()
    train_in(run, alone, model__classes=10)
    assert steps_of(run) == [1, 2, 3, 4, 5, 6]
    assert "model.classes is 10 there, 0 now" in refused("--out", run)


def test_a_config_that_was_damaged_is_named(refused, run_of):
    run, file = run_of
    (run / "config.yaml").write_text("description: [")
    assert f"{run / 'config.yaml'}: not valid YAML" in refused("--out", run, path=file)


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("objective.times.ratio=1.2", ["times.ratio", "[0, 1]"]),
        ("objective.p=-1", ["loss.p"]),
        ("train.batch=0", ["train.", "batch"]),
        ("model=3", ["model is a group"]),
        ("train.steps", ["expected key.path=value"]),
        ("data.flip=true", ["model.augment_labels"]),
        ("data.source=cifar10", ["cifar10 is 32x32"]),
        ("model.classes=7", ["model.classes is 7", "10 classes"]),
        ("data.split=test", ["data.split"]),
        ("eval.extractor=inception-v9", ["inception-v9"]),
    ],
)
def test_settings_that_cannot_be(refused, tmp_path, override, parts):
    error = refused("--set", override)
    for part in parts:
        assert part in error
    assert not (tmp_path / "refused" / "checkpoints").exists()


def test_recipes_that_cannot_be(refused, tmp_path):
    assert "cannot be read" in refused(path=tmp_path / "none.yaml")
    tree = tiny_tree()
    del tree["loss"]["p"]
    (tmp_path / "hole.yaml").write_text(yaml.safe_dump(tree))
    assert f"{tmp_path / 'hole.yaml'}: loss.p is missing" in refused(path=tmp_path / "hole.yaml")


def test_images_that_are_not_there(refused, tmp_path):
    assert "no such file or folder" in refused("--set", f"data.path={tmp_path / 'none'}", code=3)


def test_a_dry_run_prints_the_size_and_leaves_nothing(recipe, capsys, tmp_path):
    assert module.main([str(recipe()), "--dry-run", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    shown = capsys.readouterr().out
    network = sum(value.numel() for value in _parameters())
    assert f"parameters        {network:,}" in shown
    for part in ("memory (estimate)", "images/s", "whole run", "steps: 6"):
        assert part in shown
    (tmp_path / "shown.yaml").write_text(shown[: shown.index("\nparameters ")])
    assert load_config(tmp_path / "shown.yaml") == tiny_config()
    assert not (tmp_path / "run").exists()


def _parameters():
    from unet import UNet

    return UNet(tiny_config().model).parameters()


# --- run.sh ----------------------------------------------------------------------------------------------------

SMALL = ["model.width=8", "model.multipliers=[1]", "model.attention=[]", "eval.samples=200"]


def bash_options(*arguments, **environment) -> tuple[list[str], dict[str, str]]:
    command = ["bash", str(ROOT / "run.sh"), *map(str, arguments)]
    return command, {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}


def bash(*arguments, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    command, environment = bash_options(*arguments, **environment)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


def settings_of(*texts: str) -> list[str]:
    return [part for text in texts for part in ("--set", text)]


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_run_sh_lists_the_recipes_with_a_line_each(arguments, tmp_path):
    shown = bash(*arguments, cwd=tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for path in RECIPES:
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"  {path.stem} ")]
        assert load_config(path).description in line
    assert "--set" in shown.stdout and "--dry-run" in shown.stdout


def test_run_sh_knows_no_such_recipe():
    shown = bash("cifra10")
    assert shown.returncode == 2 and shown.stdout == ""
    assert shown.stderr.splitlines()[-1] == "error: there is no recipe named 'cifra10'"
    for path in RECIPES:
        assert f"  {path.stem} " in shown.stderr


def test_run_sh_without_a_python():
    shown = bash("demo", PYTHON="/nowhere/python")
    assert shown.returncode == 3 and shown.stderr.startswith("error: /nowhere/python not found")


def test_run_sh_demo_in_a_few_steps(tmp_path):
    """The path of a new user, from another working directory, with a small network."""
    run = tmp_path / "run"
    options = settings_of(*SMALL, "train.steps=3")
    shown = bash("demo", *options, "--out", run, cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    for nfe in (1, 2, 8):
        assert re.search(rf"{nfe}-NFE fd-pixels +\d+\.\d+ +200", shown.stdout), shown.stdout
    assert re.search(r"floor: two halves of the real images +0\.2", shown.stdout)
    assert steps_of(run) == [1, 2, 3] and (run / "samples.png").exists() and (run / "curves.png").exists()
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr, shown.stderr


def test_run_sh_with_two_processes(tmp_path):
    """Ctrl-C in the terminal, and the same command to the end."""
    run, log = tmp_path / "run", tmp_path / "log"
    command, environment = bash_options("demo", *settings_of(*SMALL), "--out", run, NPROC="2")
    with open(log, "w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        until(lambda: last_step(run) >= 3 or first.poll() is not None, 120)
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the agent and to both workers
        assert first.wait(60) == 130
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    step, said = last_step(run), log.read_text()
    total = load_config(run / "config.yaml").train.steps
    assert f"stopped and saved at step {step:,} of {total:,}; the same command continues" in said
    assert "Traceback" not in said and "death signal" not in said
    assert newest(run).meta["step"] == step

    options = settings_of(*SMALL, f"train.steps={step + 2}")
    last = bash("demo", *options, "--out", run, NPROC="2", XDG_CACHE_HOME=str(tmp_path))
    assert last.returncode == 0, last.stderr
    assert steps_of(run) == list(range(1, step + 3)) and "1-NFE fd-pixels" in last.stdout


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["2", "--set", "train.stepz=3"], "did you mean train.steps?"),
        (["3"], "train.batch 8 does not divide by 3 processes"),
        (["many"], "NPROC=many"),
        (["0"], "NPROC=0"),
    ],
    ids=str,
)
def test_a_launch_that_cannot_be_is_one_line_not_one_a_process(recipe, capsys, arguments, part):
    count, *options = arguments
    assert run_main(launch_module.main, [count, "run", str(recipe()), *options]) == 2
    assert part in one_line(capsys.readouterr().err)


def _launch(program: str, files: tuple[Path, Path], logs: Path) -> None:
    redirect(files)
    sys.exit(launch_module.launch(2, ["-c", program], logs))


@pytest.mark.parametrize(
    ("main", "other", "code", "shown"),
    [
        ("pass", "pass", 0, ""),
        ("say('error: full'); sys.exit(3)", "time.sleep(0.3); say('peer is gone'); sys.exit(1)", 3, "error: full\n"),
        ("say('error: nan'); sys.exit(4)", "say('error: nan'); sys.exit(4)", 4, "error: nan\n"),
        ("time.sleep(60)", "say('error: no file'); sys.exit(3)", 3, "error: no file\n"),
        ("sys.exit(130)", "sys.exit(143)", 130, ""),
        ("signal.signal(15, lambda *a: sys.exit(143)); time.sleep(60)", "say('a bug'); sys.exit(1)", 1, "a bug\n"),
        ("os.kill(os.getpid(), 9)", "time.sleep(60)", 137, ""),
    ],
)
def test_the_launcher_ends_as_one_process_would(tmp_path, main, other, code, shown):
    """Programs without PyTorch stand in for the two processes."""
    say = "say = lambda text: print(text, file=sys.stderr)"
    body = f"import os, signal, sys, time; {say}\nif os.environ['RANK'] == '0': {main}\nelse: {other}"
    files = tmp_path / "out", tmp_path / "err"
    process = context.Process(target=_launch, args=(body, files, tmp_path / "logs"))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert files[1].read_text() == shown
