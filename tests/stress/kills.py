"""SIGKILL at random moments, and before each file operation in turn; then the same command again."""

import functools
import os
import random
import signal
import sys
import time
from pathlib import Path

from running import guided_latent_changes, last_step, start, steps_of, write_recipe

from stress.compare import assert_equal_jobs, sha256_of

WRITES = os.O_WRONLY | os.O_RDWR
RICH = {
    "model__dropout": 0.2,
    "ema__decays": [0.9, 0.5],
    "ema__every": 3,
    "checkpoint__every": 3,
    "eval__every": 12,
    "eval__samples": 64,
    "eval__batch": 16,
}


def die_before(folder: str, number: int) -> None:
    """From now on: SIGKILL to this process before its `number`-th change to a file in `folder`."""
    left = number

    def hook(event: str, args: tuple) -> None:
        nonlocal left
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & WRITES
        else:
            changes = event in ("os.rename", "os.remove", "os.link", "os.mkdir", "os.truncate")
        if changes and str(args[0]).startswith(folder):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


class Job:
    """One `run.py` command, started as often as it takes."""

    def __init__(self, folder: Path, name: str, **changes):
        self.run, self.logs = folder / name, folder / f"{name} logs"
        self.recipe = write_recipe(folder / f"{name}.yaml", **changes)
        self.environment = {"XDG_CACHE_HOME": str(folder / f"{name} cache")}
        self.kills = 0

    def start(self, **how):
        return start("run", self.recipe, "--out", self.run, logs=self.logs, environment=self.environment, **how)

    def finish(self) -> None:
        done = self.start().wait(600)
        assert done.code == 0, done.err

    def killed_before(self, number: int, folder: Path | None = None) -> bool:
        """Kill before the `number`-th change of a file; False if the job was done before."""
        how = functools.partial(die_before, str(folder or self.run), number)
        return self._count(self.start(prepare=how).wait(600))

    def killed_when(self, moment, delay: float) -> bool:
        """Kill `delay` seconds after `moment()` holds; False if the job was done before."""
        started = self.start()
        while not moment() and started.code is None:
            time.sleep(0.0005)
        time.sleep(delay)
        started.send(signal.SIGKILL)
        return self._count(started.wait(60))

    def _count(self, ended) -> bool:
        assert ended.code in (0, -signal.SIGKILL), f"ended with {ended.code}:\n{ended.err}"
        self.kills += ended.code != 0
        return ended.code != 0


def anywhere(folder: Path, kills: int, steps_each: int = 12) -> str:
    """Kills in steps, checkpoint writes, evaluations and before file operations, in turns; bit-equal at the end."""
    changes = {**RICH, "train__steps": kills * steps_each}
    whole, job = Job(folder, "whole", **changes), Job(folder, "killed", **changes)
    whole.finish()
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    counts = dict.fromkeys(("step", "checkpoint", "evaluation", "file"), 0)
    for k in range(kills):
        kind = list(counts)[k % len(counts)]
        goal = last_step(job.run) + chance.randint(1, 4)
        if kind == "step":
            killed = job.killed_when(lambda goal=goal: last_step(job.run) >= goal, chance.random() * 0.02)
        elif kind == "checkpoint":
            killed = job.killed_when(lambda: any(job.run.glob("checkpoints/*.tmp")), chance.random() * 0.004)
        elif kind == "evaluation":
            killed = job.killed_when(lambda: any(job.run.glob("eval/work/*")), chance.random() * 0.03)
        else:
            killed = job.killed_before(chance.randint(1, 50))
        assert killed, f"the run was over before kill {k + 1} (seed {seed})"
        counts[kind] += 1
    job.finish()
    assert steps_of(job.run) == list(range(1, kills * steps_each + 1)), f"seed {seed}"
    assert_equal_jobs(whole.run, job.run)
    return f"{job.kills} kills (" + ", ".join(f"{n} {kind}" for kind, n in counts.items()) + ")"


def after_training(folder: Path) -> str:
    """Sampling, scoring and plotting, killed before their first, second, third … change of a file."""
    changes = {**RICH, "train__steps": 12}
    whole, job = Job(folder, "whole", **changes), Job(folder, "killed", **changes)
    whole.finish()
    while last_step(job.run) < 12:
        job.killed_when(lambda: last_step(job.run) >= 12, 0)
    trained, number = job.kills, 1
    while job.killed_before(number):
        number += 1
    assert_equal_jobs(whole.run, job.run)
    return f"{job.kills - trained} kills, one before each file operation"


def in_preparation(folder: Path) -> str:
    """Latents of the digits, killed before the first, second, third … change of a file in their folder."""
    jobs = []
    for name in ("whole", "killed"):
        changes = guided_latent_changes(folder / f"{name} latents")
        jobs.append(Job(folder, name, **changes, eval__samples=64))
    whole, job = jobs
    whole.finish()
    latents, number = folder / "killed latents", 1
    while job.killed_before(number, latents):
        number += 1
    assert_equal_jobs(whole.run, job.run)
    assert sha256_of(folder / "whole latents") == sha256_of(latents)
    return f"{job.kills} kills, one before each file operation"
