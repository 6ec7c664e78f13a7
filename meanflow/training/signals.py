"""Requests to stop: finish the step, save, and exit with a code that says why."""

import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from meanflow.errors import EXIT_INTERRUPTED, EXIT_TERMINATED

SECOND_AFTER_S = 1.0  # within it a second Ctrl-C is torchrun's copy of the one from the terminal
_CODES = {signal.SIGINT: EXIT_INTERRUPTED, signal.SIGTERM: EXIT_TERMINATED, signal.SIGUSR1: EXIT_TERMINATED}


@contextmanager
def warned_by_usr1() -> Iterator[None]:
    """Inside, SIGUSR1 (Slurm's warning) ends the process with the code of SIGTERM: there is nothing to save yet."""
    previous = signal.signal(signal.SIGUSR1, lambda number, frame: sys.exit(EXIT_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, previous)


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
