"""torchrun itself: two agents that meet, restarts, and a process that fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from running import ROOT, last_step, redirect, start, steps_of, until, write_recipe

from eval import launch
from torture.compare import curve_difference, largest_difference, newest
from torture.ranks import SMOOTH

from running import context  # isort: skip

FAILS = """
import os, sys
from eval import run
from meanflow.errors import AssetError, run_main
from meanflow.training.batches import BatchStream

whole = BatchStream.micro_batches
def broken(self, step):
    if step == 5 and os.environ["RANK"] == "1":
        raise AssetError("the disk of this node is gone")
    return whole(self, step)
BatchStream.micro_batches = broken
sys.exit(run_main(run.main, ARGUMENTS))
"""


def agent(port: int, recipe: Path, run: Path, log: Path, restarts: int) -> subprocess.Popen:
    """One node's torchrun with one process."""
    how = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-id=torture", "--rdzv-backend=c10d"]
    how += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--max-restarts={restarts}", "--monitor-interval=0.2"]
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "eval.run", recipe, "--out", run]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(run.parent / "cache")}
    with open(log, "w") as file:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, stdout=file, stderr=file, env=environment)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def two_agents(folder: Path, steps: int, kill: bool = True) -> str:
    """Two rendezvous members train together; a worker of the second is killed, and both restart from a checkpoint."""
    changes = {**SMOOTH, "train__steps": steps, "checkpoint__every": 5, "eval__samples": 64}
    recipe, run = write_recipe(folder / "two.yaml", **changes), folder / "two"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"agent{k}.log" for k in range(2)]
    agents = [agent(port, recipe, run, log, restarts=2) for log in logs]
    try:
        if kill:
            until(lambda: last_step(run) >= 7 or any(one.poll() is not None for one in agents), 120)
            for worker in children(agents[1].pid):
                os.kill(worker, signal.SIGKILL)
        codes = [one.wait(300) for one in agents]
    finally:
        for one in agents:
            one.kill()
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0, 0], f"{codes}:\n{said}"
    assert steps_of(run) == list(range(1, steps + 1))
    starts = len((run / "starts.jsonl").read_text().splitlines())
    assert starts == 1 + kill and (not kill or "continuing from step" in said), said

    alone = start("eval.run", recipe, "--out", folder / "one", logs=folder / "logs").wait(300)
    assert alone.code == 0, alone.err
    curve, weights = (
        curve_difference(folder / "one", run),
        largest_difference(newest(folder / "one").model, newest(run).model),
    )
    assert curve < 1e-5 and weights < 2e-5, (curve, weights)
    return f"2 agents, {steps} steps, {starts - 1} restart after a kill: losses within {curve:.0e} of one process"


def _launch(arguments: list[str], files: tuple[Path, Path], logs: Path) -> None:
    redirect(files)
    sys.exit(launch.launch(2, ["-c", FAILS.replace("ARGUMENTS", repr(arguments))], logs))


def one_fails(folder: Path) -> str:
    """The second of two processes stops with an error of its own while the first waits for it."""
    recipe, files = write_recipe(folder / "fails.yaml", train__steps=10_000), (folder / "out", folder / "err")
    arguments = [str(recipe), "--out", str(folder / "run")]
    process = context.Process(target=_launch, args=(arguments, files, folder / "logs"))
    process.start()
    until(lambda: last_step(folder / "run") >= 5 or process.exitcode is not None, 120)
    began = time.monotonic()
    process.join(120)
    seconds, said = time.monotonic() - began, files[1].read_text()
    assert process.exitcode == 3, f"{process.exitcode}:\n{said}"
    assert "error: the disk of this node is gone" in said, said
    assert "error: process 0 lost another process" in said and not re.search("Traceback|Connection closed", said), said
    assert seconds < 30, seconds
    return f"{seconds:.0f} s from the failure to the end of both, with its message and exit code"
