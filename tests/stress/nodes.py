"""torchrun itself: two agents that meet, restarts, and a process that fails."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch
from running import ROOT, context, last_step, redirect, start, steps_of, until, write_recipe
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import run as job
from meanflow.errors import run_main
from meanflow.training import launch
from stress.compare import curve_difference

# As docs/reliability.md says: with the agent's store, restarted processes find the addresses of those that were killed.
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}

FAILS = """
import os, sys
import run
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


class Torchrun:
    """The agent of one of `nodes` nodes, with `each` processes."""

    def __init__(self, nodes: int, each: int, port: int, recipe: Path, run: Path, log: Path):
        how = [f"--nnodes={nodes}", f"--nproc-per-node={each}", "--max-restarts=3"]
        how += ["--rdzv-id=stress", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}"]
        how += ["run.py", str(recipe), "--out", str(run)]
        command = [sys.executable, "-m", "torch.distributed.run", *how]
        environment = {**os.environ, **OWN_STORE, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(run.parent / "cache")}
        with open(log, "w") as file:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=environment)
        self.pid, self.kill = self.process.pid, self.process.kill

    def wait(self) -> int:
        return self.process.wait(300)

    @property
    def code(self) -> int | None:
        return self.process.poll()


class Forked:
    """The same from a process that has imported everything: it starts at once."""

    def __init__(self, nodes: int, each: int, port: int, recipe: Path, run: Path, log: Path):
        log.touch()
        self.process = context.Process(target=_agent, args=(nodes, each, port, recipe, run, log))
        self.process.start()
        self.pid, self.kill = self.process.pid, self.process.kill

    def wait(self) -> int | None:
        self.process.join(300)
        return self.code

    @property
    def code(self) -> int | None:
        return self.process.exitcode


def _agent(nodes: int, each: int, port: int, recipe: Path, run: Path, log: Path) -> None:
    redirect((log, log))
    os.environ.update(OWN_STORE, XDG_CACHE_HOME=str(run.parent / "cache"))
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=each,
        run_id="stress",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        max_restarts=3,
        start_method="fork",
        logs_specs=DefaultLogsSpecs(str(run.parent / f"{log.stem} logs")),
    )
    elastic_launch(config, _worker)([str(recipe), "--out", str(run)])


def _worker(arguments: list[str]) -> None:
    torch.set_num_threads(1)
    if code := run_main(job.main, arguments):
        sys.exit(code)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def agents(folder: Path, nodes: int, each: int, steps: int, kills: int, kind: type = Torchrun) -> str:
    """Agents meet and train one run; the last one's first process is killed, and all restart from a checkpoint."""
    changes = {"train__steps": steps, "checkpoint__every": 5, "eval__samples": 64}
    recipe, run = write_recipe(folder / "many.yaml", **changes), folder / "many"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    logs = [folder / f"agent{k}.log" for k in range(nodes)]
    members = [kind(nodes, each, port, recipe, run, log) for log in logs]
    try:
        for k in range(kills):
            goal = steps * (k + 1) // (kills + 1)
            until(lambda goal=goal: last_step(run) >= goal or any(one.code is not None for one in members), 120)
            assert all(one.code is None for one in members), "\n".join(log.read_text() for log in logs)
            os.kill(children(members[-1].pid)[0], signal.SIGKILL)
        codes = [one.wait() for one in members]
    finally:
        for one in members:
            one.kill()
    said = "\n".join(log.read_text() for log in logs)
    assert codes == [0] * nodes, f"{codes}:\n{said}"
    assert steps_of(run) == list(range(1, steps + 1))
    assert len((run / "starts.jsonl").read_text().splitlines()) == 1 + kills, said
    assert said.count("continuing from step") == kills, said

    alone = start("run", recipe, "--out", folder / "one", logs=folder / "logs").wait(300)
    assert alone.code == 0, alone.err
    curve = curve_difference(folder / "one", run)
    assert curve < 1e-5, curve
    how = f"{nodes} agent{'s' * (nodes > 1)} of {each} process{'es' * (each > 1)}, {steps} steps, {kills} kill(s)"
    return f"{how}: losses within {curve:.0e} of one process"


def _launch(arguments: list[str], files: tuple[Path, Path]) -> None:
    redirect(files)
    sys.exit(launch.run_in_processes(2, ["-c", FAILS.replace("ARGUMENTS", repr(arguments))]))


def one_fails(folder: Path) -> str:
    """The second of two processes stops with an error of its own while the first waits for it."""
    recipe, files = write_recipe(folder / "fails.yaml", train__steps=10_000), (folder / "out", folder / "err")
    arguments = [str(recipe), "--out", str(folder / "run")]
    process = context.Process(target=_launch, args=(arguments, files))
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
