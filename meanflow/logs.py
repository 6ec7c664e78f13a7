"""What a user sees: log lines, progress bars, durations and tables."""

import logging
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tqdm import tqdm

BAR_EVERY_S = 30.0

log = logging.getLogger("meanflow")


class _Console(logging.Handler):
    """INFO to stdout, unchanged; warnings to stderr, with their level. The streams are looked up at each line."""

    def emit(self, record: logging.LogRecord) -> None:
        warning = record.levelno >= logging.WARNING
        text = f"{record.levelname.lower()}: {record.getMessage()}" if warning else record.getMessage()
        print(text, file=sys.stderr if warning else sys.stdout, flush=True)


def log_to_console(rank: int = 0) -> None:
    """Show the lines of this package; of several processes, those of rank 0 alone."""
    if not any(isinstance(handler, _Console) for handler in log.handlers):
        log.addHandler(_Console())
    log.setLevel(logging.INFO if rank == 0 else logging.ERROR)


def progress_bar(iterable: Any = None, **options: Any) -> "tqdm":
    """A tqdm bar on stderr; where that is no terminal, a line every half minute instead of ten a second."""
    from tqdm import tqdm  # here: messages, and the list of recipes, need no other package

    if not sys.stderr.isatty():
        options |= {"mininterval": BAR_EVERY_S, "maxinterval": BAR_EVERY_S}
    return tqdm(iterable, dynamic_ncols=True, **options)


def duration(seconds: float) -> str:
    """A time in words: 47 seconds, 2.2 minutes, 2.5 hours, 4.6 days."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:,.1f} {unit}"
    return f"{seconds:.0f} seconds"


def aligned(rows: list[Sequence[str]], left: int = 1) -> list[str]:
    """Lines with the first `left` columns to the left and the others to the right."""
    widths = [max(len(row[k]) for row in rows) for k in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(w) if k < left else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
