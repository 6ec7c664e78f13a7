"""Damage to the newest checkpoint, at random, between one start of a run and the next."""

import io
import random
import shutil
from contextlib import redirect_stderr
from pathlib import Path

import torch
from running import tiny_config

from meanflow.training.checkpoint import list_checkpoints
from meanflow.training.loop import train
from meanflow.training.processes import DistributedContext
from meanflow.training.run_folder import RunFolder
from stress.compare import assert_equal_runs

ALONE = DistributedContext(0, 1, torch.device("cpu"))


def damage(path: Path, chance: random.Random) -> str:
    """Spoil one of a checkpoint's two files; in a word, how."""
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


def go_on(run: Path, steps: int) -> list[str]:
    """Train to `steps`; what was said."""
    said, folder, config = [], RunFolder(run), tiny_config(train__steps=steps, model__dropout=0.2)
    with folder.lock(), redirect_stderr(io.StringIO()):  # sixty progress bars
        folder.open_for(config)
        assert train(config, folder, ALONE, said.append) == 0
    return said


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
        before = {suffix: newest.with_suffix(suffix).read_bytes() for suffix in (".pt", ".json")}
        kind = damage(newest, chance)
        said = go_on(run, 6)
        warned = any("using the one before" in line for line in said)
        # A flipped bit in the JSON's description of the run changes nothing that is read.
        harmless = newest.with_suffix(".pt").exists() and newest.with_suffix(".pt").read_bytes() == before[".pt"]
        assert warned or harmless, f"{kind} went unnoticed (seed {seed}, {k})"
        noticed += warned
        assert_equal_runs(folder / "whole", run)
        shutil.rmtree(run)
    return f"{times} damages, {noticed} noticed and passed over, the others of no effect; bit-equal ends"
