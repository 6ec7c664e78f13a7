"""Errors that the user can fix: one line each, with a documented exit code.

A traceback means a bug; anything that a user can cause is a `UserError`. Entry points print its single line to stderr
and exit with `exit_code`. The table of codes is in docs/troubleshooting.md.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from meanflow.logs import log_to_console

EXIT_USAGE = 2
EXIT_ASSET = 3
EXIT_NUMERICS = 4
EXIT_INCOMPLETE = 5
EXIT_INTERRUPTED = 130
EXIT_TERMINATED = 143


class UserError(Exception):
    """What was wrong, where, and what to do, in one line. Exit code 2: usage or configuration."""

    exit_code = EXIT_USAGE


class ConfigError(UserError):
    """A setting is unknown, missing, of the wrong type or out of range."""


class AssetError(UserError):
    """A file, archive, checkpoint, download or disk is missing, damaged or full. Exit code 3."""

    exit_code = EXIT_ASSET


class NumericsError(UserError):
    """Numbers that cannot be used: non-finite losses, NaN samples, broken statistics. Exit code 4."""

    exit_code = EXIT_NUMERICS


class IncompleteError(UserError):
    """The work is unfinished and the same command continues it. Exit code 5."""

    exit_code = EXIT_INCOMPLETE


@contextmanager
def write_errors_named(path: Path) -> Iterator[None]:
    """Turns an OSError raised inside into an AssetError that names `path`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise AssetError(f"{path}: cannot be written ({reason}); fix that and run the same command again") from error


def run_main(main: Callable[[list[str] | None], int | None], argv: list[str] | None = None) -> int:
    """Run an entry point and turn a `UserError` into its one line and exit code.

    Ctrl-C outside the training loop (which saves first) ends with 130, as shells expect.
    """
    log_to_console(int(os.environ.get("RANK", 0)))
    try:
        return main(argv) or 0
    except UserError as error:
        line = "".join(c if c.isprintable() else "�" for c in " ".join(str(error).split()))  # of file names
        print(f"error: {line}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
