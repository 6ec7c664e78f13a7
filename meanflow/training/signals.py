"""Requests to stop: finish the step, save, and exit with a code that says why."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from meanflow.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

SECOND_AFTER_S = 1.0  # within it a second Ctrl-C is torchrun's copy of the one from the terminal
POLL_S = 0.5  # how often a process looks for its launcher
TIME_TO_SAVE_S = 60.0  # after its launcher has died
_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED, signal.SIGUSR1: EXIT_TERMINATED}


@contextmanager
def warned_by_usr1() -> Iterator[None]:
    """Inside, SIGUSR1 (Slurm's warning) ends the process with the code of SIGTERM: there is nothing to save yet."""
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


def end_with_launcher() -> None:
    """From now on this process is stopped, as by SIGTERM, when the process that started it has died.

    torchrun starts its processes in sessions of their own. If it is killed they would go on without it, keep the run
    folder locked and the GPU's memory taken, or wait for each other. To be called first, since a launcher that has
    died before is not noticed.
    """
    threading.Thread(target=_end_with, args=(os.getppid(),), name="launcher", daemon=True).start()


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(TIME_TO_SAVE_S)  # other processes may be gone for good
    os.kill(os.getpid(), signal.SIGKILL)


class StopRequest:
    """Inside `with`, Ctrl-C, SIGTERM and SIGUSR1 (Slurm's warning) only set `requested`; a second Ctrl-C is immediate.

    `exit_code` is 130 for Ctrl-C, 143 for the others.
    """

    def __init__(self):
        self.requested = False
        self.exit_code = 0
        self.since = 0.0

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._note) for number in _CODES}
        return self

    def __exit__(self, *exc_info) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self.exit_code, self.since = True, _CODES[signal.Signals(number)], now
        elif number == signal.SIGINT and now - self.since > SECOND_AFTER_S:
            raise KeyboardInterrupt
