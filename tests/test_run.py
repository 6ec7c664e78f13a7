"""`run.sh` and `run.py` as people use them: in processes of their own, stopped, killed, and run again."""

import json
import os
import platform
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
    assert_equal_runs,
    context,
    last_step,
    newest,
    one_line,
    redirect,
    steps_of,
    tiny_config,
    tiny_tree,
    train_run,
    until,
    write_images,
    write_recipe,
)

import run as module
from meanflow.errors import run_main
from meanflow.training import launch as launch_module
from meanflow.training.checkpoint import list_checkpoints
from meanflow.training.config import load_config
from meanflow.training.run_folder import RunFolder, starts
from meanflow.training.signals import warned_by_usr1
from meanflow.training.state import build_network, count_parameters


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def refused(capsys, recipe, tmp_path):
    """`refused("--set", …, code=2)`: the one line that `run` ends with."""

    def refused(*arguments, code: int = 2, path: Path | None = None) -> str:
        arguments = [str(argument) for argument in (path or recipe(), *arguments, "--device", "cpu")]
        if "--out" not in arguments and path != "resume":
            arguments += ["--out", str(tmp_path / "refused")]
        assert run_main(module.main, arguments) == code
        return one_line(capsys.readouterr().err)

    return refused


@pytest.fixture
def run_of(trained, tmp_path):
    """A copy of a finished run of the tiny recipe with two EMAs, and that recipe."""
    file = write_recipe(tmp_path / "same.yaml", ema__decays=[0.9, 0.5])
    return Path(shutil.copytree(trained.path, tmp_path / "run")), file


def files_of(run: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".lock"}


# --- the whole job ---------------------------------------------------------------------------------------------


def test_the_whole_job_leaves_what_the_readme_promises_and_resumes(recipe, launch, tmp_path):
    run = tmp_path / "runs" / "new"
    done = launch("run", recipe(train__steps=30), "--out", run).wait()
    assert done.code == 0, done.err
    assert len(re.split("[\r\n]", done.err)) < 20, f"a log is flooded:\n{done.err}"
    assert "1-NFE fd-pixels" in done.out and "two halves of the real images" in done.out
    for name in ("samples.png", "curves.png", "eval", "metrics.jsonl", "checkpoints"):
        assert str(run / name) in done.out and (run / name).exists(), name
    assert load_config(run / "config.yaml") == tiny_config(train__steps=30, train__microbatch=8)
    assert steps_of(run) == list(range(1, 31))
    with Image.open(run / "samples.png") as picture:
        assert picture.size == (3 * 66 + 2, 3 * 66 + 2)
    (result,) = [json.loads(path.read_text()) for path in (run / "eval").glob("*.json")]
    assert result["status"] == "complete" and result["protocol"]["n"] == 128 and result["metrics"]["fd-pixels"] > 0

    before = files_of(run / "checkpoints")
    again = launch("run", "resume", run, "--set", "sample.count=4", "optim.lr=0.01").wait()
    assert again.code == 0 and "continuing from step 30" in again.out and "1-NFE fd-pixels" in again.out
    assert files_of(run / "checkpoints") == before and steps_of(run) == list(range(1, 31))
    first, second = starts(RunFolder(run))
    assert first["processes"] == 1 and first["torch"] == torch.__version__ and first["changed"] == {}
    head = subprocess.run(("git", "-C", ROOT, "rev-parse", "HEAD"), capture_output=True, text=True).stdout.strip()
    assert first["commit"] is None if not head else head.startswith(first["commit"].removesuffix("+"))
    assert second["step"] == 30 and second["changed"] == {"sample.count": [9, 4], "optim.lr": [1e-3, 0.01]}


def test_own_images_with_classes_and_scores_on_the_way(recipe, launch, tmp_path):
    changes = {"model__channels": 3, "model__classes": 2, "model__augment_labels": 6, "data__flip": True}
    changes |= {"data__path": str(write_images(tmp_path / "images", count=30)), "eval__every": 3, "eval__steps": [1, 2]}
    done = launch("run", recipe(**changes), "--out", tmp_path / "run").wait()
    assert done.code == 0, done.err
    assert "2-NFE fd-pixels" in done.out
    results = [json.loads(path.read_text()) for path in (tmp_path / "run" / "eval").glob("*.json")]
    assert {result["subject"]["step"] for result in results} == {3, 6}
    assert steps_of(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


# --- stopped ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, 143)], ids=lambda x: str(x)
)
def test_a_signal_saves_says_how_to_continue_and_ends_with_its_code(recipe, launch, tmp_path, alone, number, code):
    run, file = tmp_path / "run", recipe(train__steps=100_000, checkpoint__every=1000)
    first = launch("run", file, "--out", run)
    until(lambda: last_step(run) >= 3)
    if number == signal.SIGINT:
        second = launch("run", file, "--out", run).wait()
        assert second.code == 3 and second.error.endswith("another process is training here; wait for it or stop it")
    first.send(number)
    assert first.wait().code == code and "Traceback" not in first.err
    step = last_step(run)
    assert first.out == f"stopped and saved at step {step:,} of 100,000; the same command continues\n"
    assert newest(run).meta["step"] == step and not list(run.rglob("*.tmp"))
    assert not (run / "samples.png").exists() and not (run / "eval").exists()
    assert train_run(tiny_config(train__steps=step + 2), RunFolder(run), alone) == 0
    assert steps_of(run) == list(range(1, step + 3))


def test_slurms_warning_where_there_is_nothing_to_save():
    with pytest.raises(SystemExit) as caught, warned_by_usr1():
        signal.raise_signal(signal.SIGUSR1)
    assert caught.value.code == 143 and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL


def test_a_full_disk_while_saving_loses_nothing(launch, tmp_path, alone):
    """A real limit on file sizes cuts the write of the checkpoint off in its middle."""
    run, whole = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "whole")
    rich = {"model__dropout": 0.2, "train__microbatch": 3, "ema__decays": [0.9, 0.5], "checkpoint__every": 3}
    file = write_recipe(tmp_path / "rich.yaml", **rich, train__steps=9)
    train_run(tiny_config(**rich, train__steps=3), run, alone)
    (kept,) = list_checkpoints(run.checkpoints)
    content, size = kept.read_bytes(), kept.stat().st_size

    full = launch("run", file, "--out", run.path, largest_file=size // 2).wait()
    assert full.code == 3
    path = run.checkpoints / "00000006.pt"
    assert full.error.startswith(f"error: {path}: the checkpoint of step 6 could not be saved (File too large)")
    assert full.error.endswith("run the same command again")
    assert list_checkpoints(run.checkpoints) == [kept] and kept.read_bytes() == content
    assert not list(run.path.rglob("*.tmp"))

    for folder in (run, whole):
        train_run(tiny_config(**rich, train__steps=9), folder, alone)
    assert_equal_runs(run.path, whole.path)


@pytest.mark.parametrize(
    "name", ["config.yaml.PID.tmp", "starts.jsonl", "metrics.jsonl", "checkpoints/00000002.pt.tmp"]
)
def test_a_full_disk_at_any_file_is_one_line(refused, tmp_path, name):
    """/dev/full in the place of one file: its writes end as on a full disk."""
    full = tmp_path / "run" / name.replace("PID", f"{platform.node()}-{os.getpid()}")
    full.parent.mkdir(parents=True)
    full.symlink_to("/dev/full")
    error = refused("--out", tmp_path / "run", code=3)
    assert "No space left on device" in error and "run the same command again" in error


def test_a_folder_that_cannot_be_written(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run", "/proc/run"):  # /proc is read-only whoever asks
        assert "choose another --out" in refused("--out", out, code=3)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser writes everywhere")
def test_a_run_folder_that_became_read_only(refused, run_of):
    run, file = run_of
    run.chmod(0o555)
    try:
        assert "cannot be written (Permission denied)" in refused("--out", run, path=file, code=3)
    finally:
        run.chmod(0o755)


def test_a_torn_line_of_starts_is_replaced(run_of, alone):
    run = RunFolder(run_of[0])
    with open(run.starts_file, "a") as file:
        file.write('{"time": "20')
    run.note_start(step=6, processes=1, changed={})
    assert [start["step"] for start in starts(run)] == [0, 6]


def test_numbers_that_explode_end_with_4(recipe, launch, tmp_path):
    file = recipe(optim__lr=1e25, optim__warmup_steps=0, checkpoint__every=1, train__steps=20)
    done = launch("run", file, "--out", tmp_path / "run").wait()
    bad = re.match(r"error: step (\d+): .*not finite.*last good checkpoint is .*optim\.lr", done.error)
    assert done.code == 4 and bad, done.error
    run, kept = tmp_path / "run", newest(tmp_path / "run")
    assert kept.meta["step"] == int(bad[1]) - 1 == steps_of(run)[-1] and not (run / "samples.png").exists()
    for part in (kept.model, *kept.ema.values(), *kept.optimizer.values()):
        assert all(torch.isfinite(value).all() for value in part.values())
    for line in (run / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


# --- a folder that holds a run ---------------------------------------------------------------------------------


def spoil_checkpoints(run: Path) -> None:
    for path in list_checkpoints(run / "checkpoints"):
        path.write_bytes(b"")


@pytest.mark.parametrize(
    ("change", "before", "parts", "code"),
    [
        ("model.width=16 optim.lr=0.5", None, ["model.width is 8 there, 16 now", "--out"], 2),
        ("seed=4", None, ["seed is 3 there, 4 now", "bash run.sh resume", "--set init.from="], 2),
        ("optim.betas=[0.9,0.95]", lambda run: (run / "config.yaml").unlink(), ["optim.betas is [0.9, 0.99]"], 2),
        ("train.steps=9", spoil_checkpoints, ["no intact checkpoint"], 3),
        ("train.steps=9", lambda run: (run / "config.yaml").write_text("a: ["), ["config.yaml: not valid YAML"], 2),
        ("data.path=nowhere model.channels=3", None, ["model.channels is 1 there, 3 now"], 2),
        ("data.path=nowhere", None, ["data.path nowhere: no such file or folder"], 3),
        ("init.from=runs/other", None, ["init.from is null there"], 2),
    ],
)
def test_a_start_that_is_refused_changes_nothing(refused, run_of, change, before, parts, code):
    run, file = run_of
    if before:
        before(run)
    files = files_of(run)
    error = refused("--set", *change.split(), "--out", run, path=file, code=code)
    assert [part for part in parts if part not in error] == [], error
    assert files_of(run) == files


def test_other_images_are_refused_before_anything_is_written(refused, tmp_path, alone):
    images, others = write_images(tmp_path / "a"), write_images(tmp_path / "b", count=24)
    run, changes = tmp_path / "run", {"model__channels": 3, "data__path": str(images)}
    train_run(tiny_config(**changes), RunFolder(run), alone)
    files = files_of(run)
    assert "other images" in refused(run, "--set", f"data.path={others}", path="resume")
    shutil.rmtree(images)
    assert "no such file or folder" in refused(run, path="resume", code=3)
    assert files_of(run) == files


def test_settings_may_change_until_the_first_checkpoint(refused, tmp_path, alone):
    """A first start that failed, for its settings or otherwise, must not block the folder."""
    run = RunFolder(tmp_path / "run")
    assert "model.classes is 7" in refused("--set", "model.classes=7", "--out", run.path)
    assert [path.name for path in run.path.iterdir()] == [".lock"]
    run.write_config(tiny_config(seed=5))
    train_run(tiny_config(model__classes=10), run, alone)
    assert "model.classes is 10 there, 0 now" in refused("--out", run.path)


def test_a_new_run_may_start_from_the_weights_of_another(run_of, alone, tmp_path, logged):
    run, _ = run_of
    for ema in ("weights", 0.5, None):
        config = tiny_config(init__from=str(run), init__ema=ema, seed=4, optim__lr=1e-30, train__steps=1)
        train_run(config, RunFolder(tmp_path / f"from {ema}"), alone)
        source, new = newest(run), newest(tmp_path / f"from {ema}").model
        expected = source.model if ema == "weights" else source.ema[str(ema or 0.9)]
        assert all(torch.equal(new[name], expected[name]) for name in new)
        assert f"(step 6, {'weights' if ema == 'weights' else f'EMA {ema or 0.9}'}): took" in logged.messages[-1]


# --- bad input -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.stepz=3", ["train.stepz", "did you mean train.steps?"]),
        ("optim.learning_rate=3", ["optim.learning_rate", "did you mean optim.lr?"]),
        ("objective.times.ratio=1.2", ["times.ratio", "[0, 1]"]),
        ("train.batch=0", ["train.", "batch"]),
        ("model=3", ["model is a group"]),
        ("train.steps", ["expected key.path=value"]),
        ("data.flip=true", ["set model.augment_labels=6"]),
        ("data.source=cifar10", ["cifar10 is 32x32"]),
        ("model.classes=7", ["model.classes is 7", "10 classes"]),
        ("data.split=test", ["data.split"]),
        ("eval.extractor=inception-v9", ["inception-v9"]),
    ],
)
def test_settings_that_cannot_be(refused, tmp_path, override, parts):
    error = refused("--set", "seed=1", override)
    assert [part for part in parts if part not in error] == []
    assert not (tmp_path / "refused" / "checkpoints").exists()


def test_impossible_recipes_and_images(refused, tmp_path):
    tree = tiny_tree()
    del tree["optim"]["lr"]
    (tmp_path / "hole.yaml").write_text(yaml.safe_dump(tree))
    assert f"{tmp_path / 'hole.yaml'}: optim.lr is missing" in refused(path=tmp_path / "hole.yaml")
    assert "no such file or folder" in refused("--set", f"data.path={tmp_path / 'none'}", code=3)


USAGE = {
    "cifra10": "there is no recipe, recipe file or command 'cifra10'; did you mean cifar10",
    "imagenet": "did you mean imagenet_",
    "recipes/dmeo.yaml": "did you mean demo",
    "plto": "did you mean plot",
    "resume": "resume takes a run folder",
    "resume nowhere": "nowhere: is no run folder",
    "resume RUN --out x": "resume takes a run folder, such as runs/demo, and no --out",
    "RUN": "is a run folder: continue it with bash run.sh resume",
    "demo train.steps=3": "did you mean --set train.steps=3?",
    "demo --set train.steps=3 seed": "--set seed: expected key.path=value",
}


@pytest.mark.parametrize("words", USAGE)
def test_a_usage_error_is_one_line_without_waiting_for_pytorch(trained, words):
    arguments = [word.replace("RUN", str(trained.path)) for word in words.split()]
    code = (
        "import sys, run; code = run.run_main(run.main, sys.argv[1:]); sys.exit(99 if 'torch' in sys.modules else code)"
    )
    done = subprocess.run((sys.executable, "-c", code, *arguments), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and USAGE[words] in one_line(done.stderr)


def test_a_dry_run_prints_what_a_run_needs_and_leaves_nothing(recipe, capsys, tmp_path, refused):
    def dry_run(*arguments) -> str:
        arguments = [str(recipe()), *arguments, "--dry-run", "--device", "cpu", "--out", str(tmp_path / "run")]
        assert module.main(arguments) == 0
        return capsys.readouterr().out

    shown = dry_run()
    network = count_parameters(build_network(tiny_config(), torch.device("meta")))
    expected = [
        f"parameters        {network:,} (",
        "data              digits\n",
        "memory (counted)",
        "images/s",
        " seconds at",
    ]
    assert [part for part in [*expected, "memory free", "whole run"] if part not in shown] == []
    (tmp_path / "shown.yaml").write_text(shown[: shown.index("\ndata   ")])
    assert load_config(tmp_path / "shown.yaml") == tiny_config()
    assert not (tmp_path / "run").exists()
    images = write_images(tmp_path / "images")
    own = ["--set", "model.channels=3", f"data.path={images}"]
    assert f"22 images of 2 classes in {images}\n" in dry_run(*own)
    assert "set model.classes=2" in refused(*own, "model.classes=3", "--dry-run")
    assert "no such file" in refused("--set", "data.path=none", "--dry-run", code=3)


# --- run.sh ----------------------------------------------------------------------------------------------------

SMALL = ["--set", "model.width=8", "model.multipliers=[1]", "model.attention=[]", "eval.samples=200"]


def bash_options(*arguments, **environment) -> tuple[list[str], dict[str, str]]:
    command = ["bash", str(ROOT / "run.sh"), *map(str, arguments)]
    return command, {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}


def bash(*arguments, cwd: Path = ROOT, **environment) -> subprocess.CompletedProcess:
    command, environment = bash_options(*arguments, **environment)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=120)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_run_sh_lists_the_recipes_with_a_line_each(arguments, tmp_path):
    shown = bash(*arguments, cwd=tmp_path)
    assert shown.returncode == 0 and shown.stderr == ""
    for path in RECIPES:
        (line,) = [line for line in shown.stdout.splitlines() if line.startswith(f"  {path.stem} ")]
        assert load_config(path).description in line
    assert "--set" in shown.stdout and "--dry-run" in shown.stdout and "\n  settings " in shown.stdout


def test_run_sh_without_a_python():
    shown = bash("demo", PYTHON="/nowhere/python")
    assert shown.returncode == 3 and shown.stderr.startswith("error: /nowhere/python not found")


def test_run_sh_demo_in_a_few_steps(tmp_path):
    """The path of a new user, from another working directory, with a small network."""
    shown = bash("demo", *SMALL, "train.steps=3", "eval.steps=[1,2]", cwd=tmp_path, XDG_CACHE_HOME=str(tmp_path))
    assert shown.returncode == 0, shown.stderr
    for nfe in (1, 2):
        assert re.search(rf"{nfe}-NFE fd-pixels +\d+\.\d+ +200", shown.stdout), shown.stdout
    assert re.search(r"two halves of the real images +0\.2", shown.stdout)
    run = tmp_path / "runs" / "demo"
    assert steps_of(run) == [1, 2, 3] and (run / "samples.png").exists() and (run / "curves.png").exists()
    assert "Traceback" not in shown.stderr and "Warning" not in shown.stderr, shown.stderr


def test_a_recipe_is_a_name_or_a_file_also_with_a_base_of_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes", tmp_path / "recipes")
    (tmp_path / "mine.yaml").write_text("description: mine\nbase: demo\nseed: 5\n")
    for name in ("demo", "recipes/demo.yaml", "mine.yaml", str(ROOT / "recipes" / "demo.yaml")):
        args = module.parse([name, "--set", "train.steps=7", "seed=8", "--set", "train.batch=16"])
        config = load_config(args.file, args.set)
        assert (config.train.steps, config.seed, config.train.batch, config.model.width) == (7, 8, 16, 24)
        assert args.out == Path("runs") / Path(name).stem
    table = ROOT / "recipes" / "tables" / "table1a.yaml"
    assert module.table_files("table1a") == module.table_files(str(table)) == [table]
    assert module.table_files("demo") == module.table_files("recipes/demo.yaml") == []


def test_run_sh_with_two_processes(tmp_path):
    """Ctrl-C in the terminal, and the same command to the end."""
    run, log = tmp_path / "run", tmp_path / "log"
    command, environment = bash_options("demo", *SMALL, "--out", run, NPROC="2")
    with open(log, "w") as file:
        first = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
    try:
        until(lambda: last_step(run) >= 3 or first.poll() is not None, 120)
        os.killpg(first.pid, signal.SIGINT)  # as a terminal does: to the agent and to both workers
        assert first.wait(60) == 130
    finally:
        if first.poll() is None:
            os.killpg(first.pid, signal.SIGKILL)
    step, written = last_step(run), log.read_text()
    assert f"stopped and saved at step {step:,} of 2,000; the same command continues" in written
    assert "Traceback" not in written and "death signal" not in written
    assert newest(run).meta["step"] == step

    last = bash("resume", run, "--set", f"train.steps={step + 2}", NPROC="2", XDG_CACHE_HOME=str(tmp_path))
    assert last.returncode == 0, last.stderr
    assert steps_of(run) == list(range(1, step + 3)) and "1-NFE fd-pixels" in last.stdout


@pytest.mark.parametrize(
    ("count", "override", "part"),
    [
        ("2", "train.stepz=3", "did you mean train.steps?"),
        ("3", "seed=1", "train.batch 8 does not divide by 3 processes"),
        ("many", "seed=1", "NPROC=many"),
        ("0", "seed=1", "NPROC=0"),
    ],
)
def test_a_launch_that_cannot_be_is_one_line_not_one_a_process(refused, monkeypatch, count, override, part):
    monkeypatch.setenv("NPROC", count)
    assert part in refused("--set", override)


def _launch(program: str, files: tuple[Path, Path]) -> None:
    os.setsid()
    redirect(files)
    sys.exit(launch_module.run_in_processes(2, ["-c", program]))


@pytest.mark.parametrize(
    ("main", "other", "code", "shown"),
    [
        ("pass", "pass", 0, ""),
        ("show('error: full'); sys.exit(3)", "time.sleep(0.3); show('peer is gone'); sys.exit(1)", 3, "error: full\n"),
        ("show('error: nan'); sys.exit(4)", "show('error: nan'); sys.exit(4)", 4, "error: nan\n"),
        ("time.sleep(60)", "show('error: no file'); sys.exit(3)", 3, "error: no file\n"),
        ("sys.exit(130)", "sys.exit(143)", 130, ""),
        ("signal.signal(15, lambda *a: sys.exit(143)); time.sleep(60)", "show('a bug'); sys.exit(1)", 1, "a bug\n"),
        ("os.kill(os.getpid(), 9)", "time.sleep(60)", 137, ""),
    ],
)
def test_the_launcher_ends_as_one_process_would(tmp_path, main, other, code, shown):
    """Programs without PyTorch stand in for the two processes."""
    show = "show = lambda text: print(text, file=sys.stderr)"
    body = f"import os, signal, sys, time; {show}\nif os.environ['RANK'] == '0': {main}\nelse: {other}"
    files = tmp_path / "out", tmp_path / "err"
    process = context.Process(target=_launch, args=(body, files))
    process.start()
    process.join(60)
    assert process.exitcode == code
    assert files[1].read_text() == shown


@pytest.mark.parametrize("killed", ["launcher", "group", "worker"])
def test_no_process_outlives_its_launcher(tmp_path, killed):
    """torchrun's processes have sessions of their own: a SIGKILL of the launcher or its group does not reach them."""
    body = f"""
import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
from meanflow.training.signals import end_with_launcher
end_with_launcher()
open({str(tmp_path)!r} + "/pid-" + os.environ["RANK"] + "-" + str(os.getpid()), "w").close()
time.sleep(60)
"""
    launcher = context.Process(target=_launch, args=(body, (tmp_path / "out", tmp_path / "err")))
    launcher.start()
    until(lambda: len(list(tmp_path.glob("pid-*"))) == 2)
    workers = [int(path.name.split("-")[2]) for path in sorted(tmp_path.glob("pid-*"))]
    assert len({os.getsid(pid) for pid in (*workers, launcher.pid)}) == 3
    if killed == "group":
        os.killpg(launcher.pid, signal.SIGKILL)
    else:
        os.kill(launcher.pid if killed == "launcher" else workers[1], signal.SIGKILL)
    until(lambda: not any(map(is_running, workers)), 10)
    launcher.join(10)
    assert launcher.exitcode == (137 if killed == "worker" else -signal.SIGKILL)


def is_running(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def test_a_second_start_is_refused_by_all_processes(launch, recipe, tmp_path):
    """With the code of one process: torchrun would report whichever ended first."""
    run = tmp_path / "run"
    with RunFolder(run).lock():
        refused = launch("run", recipe(), "--out", run, "--device", "cpu", environment={"NPROC": "2"}).wait()
    assert refused.code == 3 and "another process is training here" in refused.error
