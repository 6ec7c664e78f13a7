"""The job in several processes on this machine, one for each GPU, started by torchrun's own agent.

Unlike under torchrun itself, the exit code is the one a single process would end with, and Ctrl-C leaves time to save.
"""

import logging
import os
import signal
import sys
import tempfile
import uuid
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from meanflow.errors import (
    EXIT_ASSET,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_NUMERICS,
    EXIT_TERMINATED,
    EXIT_USAGE,
)

SECONDS_TO_SAVE = 600  # after Ctrl-C; processes read the request once in logging.flush_every steps
EXPLAINED = {EXIT_USAGE, EXIT_ASSET, EXIT_NUMERICS, EXIT_INCOMPLETE, EXIT_INTERRUPTED}


def run_in_processes(count: int, program: list[str]) -> int:
    """Run `python PROGRAM…` in `count` processes; the exit code.

    Process 0 writes to this one's stderr. That of the others is shown only if they are what failed.
    """
    with tempfile.TemporaryDirectory(prefix="meanflow-") as logs:
        return _launch(count, program, Path(logs))


def _launch(count: int, program: list[str], logs: Path) -> int:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SECONDS_TO_SAVE))
    signal.signal(signal.SIGUSR1, _stop)  # the agent passes on SIGTERM, SIGINT, SIGHUP and SIGQUIT by itself
    logging.disable(logging.ERROR)  # the agent's own messages on what process 0 explains better
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(str(logs), redirects={rank: Std.ERR for rank in range(1, count)}),
    )
    try:
        elastic_launch(config, sys.executable)("-u", *program)
    except SignalException as stop:
        return EXIT_TERMINATED if stop.sigval == signal.SIGUSR1 else 128 + int(stop.sigval)
    except ChildFailedError as error:
        code = _explain({rank: failure.exitcode for rank, failure in error.failures.items()}, logs)
        return code if code > 0 else 128 - code
    return 0


def _stop(number: int, _) -> None:
    raise SignalException("asked to stop", sigval=signal.Signals(number))


def _explain(codes: dict[int, int], logs: Path) -> int:
    """The exit code that counts among those of the processes that failed, by rank; prints the messages of these."""
    if codes.get(0) in EXPLAINED - {EXIT_INCOMPLETE}:
        return codes[0]
    stopped = (EXIT_TERMINATED, -signal.SIGTERM, EXIT_INCOMPLETE)  # because another one failed
    culprits = [rank for rank, code in codes.items() if code not in stopped]
    for rank in culprits:
        for file in logs.glob(f"*/attempt_0/{rank}/stderr.log"):  # none of process 0, whose messages were shown
            print(file.read_text(encoding="utf-8", errors="replace"), end="", file=sys.stderr)
    return codes[culprits[0]] if culprits else codes.get(0, next(iter(codes.values())))
