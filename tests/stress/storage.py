"""Damage to the newest checkpoint, at random, between one start of a run and the next."""

import io
import logging
import random
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch
from running import assert_equal_runs, tiny_config, train_run

from meanflow.logs import log
from meanflow.training.checkpoint import list_checkpoints
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def damage(path: Path, chance: random.Random) -> str:
    """Damage one of a checkpoint's two files; in a word, how."""
    file = path.with_suffix(chance.choice([".pt", ".json"]))
    data = bytearray(file.read_bytes())
    kind = chance.choice(["bit flipped", "cut short", "zeroed", "emptied", "removed"])
    at = chance.randrange(len(data))
    if kind == "removed":
        file.unlink()
        return kind
    if kind == "bit flipped":
        data[at] ^= 1 << chance.randrange(8)
    elif kind == "zeroed":
        data[at : at + 4096] = bytes(len(data[at : at + 4096]))
    else:
        del data[at if kind == "cut short" else 0 :]
    file.write_bytes(data)
    return kind


class Warnings(logging.Handler):
    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def go_on(run: Path, steps: int) -> list[str]:
    """Train to `steps`; what was warned of."""
    warnings = Warnings()
    log.addHandler(warnings)
    with redirect_stderr(io.StringIO()):  # sixty progress bars
        assert train_run(tiny_config(train__steps=steps, model__dropout=0.2), RunFolder(run), ALONE) == 0
    log.removeHandler(warnings)
    return warnings.lines


def damaged(folder: Path, times: int) -> str:
    """Each time the run must say so and continue from the one before, to the same end."""
    seed = random.randrange(10**6)
    chance = random.Random(seed)
    go_on(folder / "whole", 6)
    go_on(folder / "begun", 4)
    noticed = 0
    for k in range(times):
        run = Path(shutil.copytree(folder / "begun", folder / f"damaged {k}"))
        newest = list_checkpoints(run / "checkpoints")[-1]
        before = newest.read_bytes()
        kind = damage(newest, chance)
        warned = any("using the one before" in line for line in go_on(run, 6))
        # A flipped bit in the JSON's description of the run changes nothing that is read.
        harmless = newest.exists() and newest.read_bytes() == before
        assert warned or harmless, f"{kind} went unnoticed (seed {seed}, {k})"
        noticed += warned
        assert_equal_runs(folder / "whole", run)
        shutil.rmtree(run)
    return f"{times} damages, {noticed} noticed and passed over, the others of no effect; bit-equal ends"
