"""Progress bars that leave logs readable."""

import sys
from typing import Any

from tqdm import tqdm

LOG_EVERY_S = 30.0


def progress_bar(iterable: Any = None, **options: Any) -> tqdm:
    """A tqdm bar on stderr; where that is no terminal, a line every half minute instead of ten a second."""
    if not sys.stderr.isatty():
        options |= {"mininterval": LOG_EVERY_S, "maxinterval": LOG_EVERY_S}
    return tqdm(iterable, dynamic_ncols=True, **options)
