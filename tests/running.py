"""Tiny runs for the tests, and the real entry points in processes of their own.

Those processes are forked from one that has imported PyTorch and scikit-learn already: each starts in milliseconds
instead of seconds, and can be killed like any other.
"""

import copy
import importlib
import json
import multiprocessing
import os
import re
import resource
import signal
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image

from meanflow.data import load_dataset
from meanflow.errors import run_main
from meanflow.logs import log_to_console
from meanflow.training import settings
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import PARTS, Checkpoint, list_checkpoints, load_checkpoint
from meanflow.training.config import RunConfig
from meanflow.training.loop import Evaluate, train
from meanflow.training.metrics import StepSums
from meanflow.training.processes import DistributedContext, GradientSum, leaving_distributed, start_distributed
from meanflow.training.records import read_metrics
from meanflow.training.run_folder import RunFolder
from meanflow.training.setup import set_up
from meanflow.training.state import fresh_state
from meanflow.training.step import accumulate, make_loss

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CLOCK = ("images_per_s", "seconds", "memory_mb")  # of a metrics line: what two equal runs may differ in

TINY = """
description: tiny
seed: 3
model: {kind: unet, image_size: 8, channels: 1, width: 8, multipliers: [1], blocks: 1, attention: []}
data: {kind: images, source: digits}
objective: {kind: meanflow, p: 0.75, c: 1.0e-3, times: {ratio: 0.75}}
optim: {lr: 1.0e-3, betas: [0.9, 0.99], warmup_steps: 5}
ema: {decays: [0.9]}
train: {batch: 8, steps: 6, check_every: 1}
checkpoint: {every: 2}
sample: {count: 9, columns: 3}
eval: {extractor: pixels, samples: 128, batch: 64, every_samples: 64}
"""
TREE = settings.to_tree(settings.build(RunConfig, yaml.safe_load(TINY), "", "the tests"))  # with every setting
# Everything that could break the equality of two runs is on: dropout, augmentation, labels, accumulation in uneven
# parts (3 + 3 + 3 + 1), epochs of 22 images that batches of 10 cross, averages every third step, clipping.
RICH = {
    **{"model__channels": 3, "model__multipliers": [1, 2], "model__attention": [4], "model__dropout": 0.2},
    **{"model__augment_labels": 6, "model__classes": 2, "data__augment_p": 0.5, "data__anisotropy": "official"},
    **{"data__flip": True, "data__flip_unlabelled": True, "optim__weight_decay": 0.01, "optim__clip": 1.0},
    **{"ema__decays": [0.9, 0.5], "ema__every": 3, "train__batch": 10, "train__microbatch": 3, "checkpoint__every": 4},
}


def tiny_tree(**changes: Any) -> dict[str, Any]:
    """The tiny run's settings with `group__key=value` changed."""
    tree = copy.deepcopy(TREE)
    for path, value in changes.items():
        *groups, key = path.split("__")
        branch = tree
        for group in groups:
            branch = branch[group]
        assert key in branch, path
        branch[key] = value
    return tree


def guided_latent_changes(latents: Path | str = "latents") -> dict[str, Any]:
    """The tiny run as a DiT with (trivial) guidance on the latents of digits, for `tiny_tree`."""
    model = {"kind": "dit", "image_size": 4, "channels": 4, "patch": 2, "width": 16, "depth": 2, "heads": 2}
    data = {"kind": "latents", "source": "digits", "images": None, "latents": str(latents), "split": "train"}
    data |= {"vae": "space-to-depth", "image_size": 8, "flip": True, "decode_precision": "fp32", "decode_batch": 64}
    guidance = {"omega_prime": 1.0, "kappa": 0.0, "t_start": 0.0, "t_end": 1.0, "label_drop": 0.1}
    return {
        "model": {**model, "conditioning": "t,t-r", "classes": 10},
        "data": data,
        "guidance": {**guidance, "unconditional_rows": "r_eq_t_first"},
    }


def tiny_config(**changes: Any) -> RunConfig:
    return settings.build(RunConfig, tiny_tree(**changes), "", "the test")


def write_recipe(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(tiny_tree(**changes), sort_keys=False), encoding="utf-8")
    return path


def write_images(folder: Path, count: int = 22, classes: int = 2, size: int = 8) -> Path:
    """An image folder of smooth random RGB images, in `classes` class folders."""
    numbers = np.random.default_rng(0)
    for k in range(count):
        coarse = numbers.integers(0, 256, (2, 2, 3), dtype=np.uint8)
        (folder / f"class{k % classes}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(coarse).resize((size, size), Image.BILINEAR).save(folder / f"class{k % classes}" / f"{k}.png")
    return folder


def newest(run: Path) -> Checkpoint:
    return load_checkpoint(list_checkpoints(run / "checkpoints")[-1])


def differences(a: Any, b: Any, path: str = "") -> list[str]:
    """Where two trees of dicts with the same keys differ, tensors by one bit."""
    if isinstance(a, dict):
        assert a.keys() == b.keys(), path
        return [line for key in a for line in differences(a[key], b[key], f"{path}.{key}")]
    return [] if (torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b) else [path]


def assert_equal_runs(a: Path, b: Path) -> None:
    """To the bit: weights, averages, moments, and metrics but for what a clock measured."""
    one, two = newest(a), newest(b)
    assert one.meta["step"] == two.meta["step"] and one.meta["images"] == two.meta["images"]
    assert [line for part in PARTS for line in differences(getattr(one, part), getattr(two, part), part)] == []
    assert comparable_metrics(a) == comparable_metrics(b)


def train_run(
    config: RunConfig,
    run: RunFolder,
    ctx: DistributedContext,
    evaluate: Evaluate | None = None,
    requested: Collection[str] = (),
) -> int:
    """The training part of the job, in this process; the exit code."""
    run.path.mkdir(parents=True, exist_ok=True)
    changed = run.check(config, requested)
    training = set_up(config, run, ctx, requested)
    if ctx.is_main:
        run.write_config(config)
        run.note_start(processes=ctx.world, step=training.state.step, changed=changed)
    return train(training, evaluate)


def gradients_of_step(config: RunConfig, ctx: DistributedContext, step: int, times: int = 1) -> dict[str, torch.Tensor]:
    """The gradient of a step of a fresh network; with `times` computed so often in a row, the last one."""
    state = fresh_state(config, ctx.device)
    total, loss = GradientSum(state.network, ctx), make_loss(state.network, config, ctx.device, state.ema)
    stream = BatchStream(load_dataset(config.data, 8, config.model.channels), config, ctx)
    for _ in range(times):
        accumulate(loss, stream.micro_batches(step), stream.micro_steps, config.train.batch, total, StepSums())
    return {name: p.grad.clone() for name, p in state.network.named_parameters()}


# --- processes -------------------------------------------------------------------------------------------------

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["torch", "sklearn.datasets", "eval.scoring.score", "running"])


class Started:
    """One `python -m MODULE ARGUMENTS` under way."""

    def __init__(self, module: str, arguments: list[str], logs: Path, **how: Any):
        logs.mkdir(parents=True, exist_ok=True)
        number = len(list(logs.glob("*.out")))
        self.files = logs / f"{number}.out", logs / f"{number}.err"
        for file in self.files:
            file.touch()
        arguments = [str(argument) for argument in arguments]
        self.process = context.Process(target=_entry, args=(module, arguments, self.files, how), daemon=True)
        self.process.start()

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, seconds: float = 60) -> "Started":
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {seconds} s:\n{self.out}\n{self.err}")
        return self

    @property
    def code(self) -> int | None:
        return self.process.exitcode

    @property
    def out(self) -> str:
        return self.files[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self.files[1].read_text(encoding="utf-8")

    @property
    def error(self) -> str:
        return one_line(self.err)


def one_line(err: str) -> str:
    """The single line of a user's error, progress bars aside; fails if there is more, such as a traceback."""
    bars = re.compile(r"step/s|s/step|^$")
    lines = [line for line in err.replace("\r", "\n").splitlines() if not bars.search(line)]
    assert len(lines) == 1 and lines[0].startswith("error: "), err
    return lines[0]


def redirect(files: tuple[Path, Path]) -> None:
    """Send this process's stdout and stderr, and its children's, to files."""
    for descriptor, file in zip((1, 2), files, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT), descriptor)


def _entry(module: str, arguments: list[str], files: tuple[Path, Path], how: dict[str, Any]) -> None:
    redirect(files)
    os.environ.update(how.get("environment", {}))
    if limit := how.get("largest_file"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if prepare := how.get("prepare"):
        prepare()
    code = run_main(importlib.import_module(module).main, arguments)
    sys.stdout.flush()
    sys.exit(code)


def start(module: str, *arguments: Any, logs: Path, **how: Any) -> Started:
    return Started(module, list(arguments), logs, **how)


def in_processes(world: int, member: Callable[[DistributedContext, Path], Any], folder: Path) -> list[Any]:
    """What `member(ctx, folder)` returns in each of `world` gloo processes, by rank."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    members = [context.Process(target=_member, args=(rank, world, port, member, folder)) for rank in range(world)]
    for process in members:
        process.start()
    for process in members:
        process.join(300)
    codes = [process.exitcode for process in members]
    for process in members:
        process.kill()
    assert codes == [0] * world, f"exit codes {codes}: {(folder / 'log').read_text()[-2000:]}"
    return [torch.load(folder / f"{world}-{rank}.result", weights_only=False) for rank in range(world)]


def _member(rank: int, world: int, port: int, member: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    redirect((folder / "log", folder / "log"))
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    log_to_console(rank)
    with leaving_distributed():
        result = member(start_distributed("cpu"), folder)
    torch.save(result, folder / f"{world}-{rank}.result")


def until(condition, seconds: float = 60) -> None:
    """Wait for `condition()`; fails after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def steps_of(run: Path) -> list[int]:
    return [line["step"] for line in read_metrics(run / "metrics.jsonl")]


def last_step(run: Path) -> int:
    return max(steps_of(run), default=0)


def comparable_metrics(run: Path) -> list[dict[str, Any]]:
    """The metrics file without what a clock measured. Fails on a line that is not whole."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in CLOCK} for line in lines]
