"""Strategies for damaged inputs, and what counts as a documented refusal."""

import resource
from collections.abc import Callable, Sequence
from pathlib import Path

from hypothesis import strategies as st

from meanflow.errors import UserError

MAX_GROWTH_MB = 100  # of peak memory, by one input
NUMBERS = [0, 1, 2, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def refused(read: Callable[[], object]) -> bool:
    """Whether `read` refuses with a UserError, whose line `run_main` prints.

    Any other exception is a failure, and so is peak memory that grows by more than MAX_GROWTH_MB.
    """
    before = peak_mb()
    try:
        read()
    except UserError as error:
        assert len(str(error)) > 10
        return True
    finally:
        assert peak_mb() - before < MAX_GROWTH_MB
    return False


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@st.composite
def mutated(draw, wholes: Sequence[bytes], words: Sequence[bytes] = (b"\0",)) -> bytes:
    """One of `wholes` with up to eight edits: bits, bytes, numbers, runs cut out, repeated or moved, words, an end."""
    data = bytearray(draw(st.sampled_from(wholes)))
    for _ in range(draw(st.integers(1, 8))):
        at = draw(st.integers(0, len(data)))
        run = draw(st.integers(1, 64))
        kind = draw(st.sampled_from(["bit", "byte", "number", "cut", "repeat", "other", "word", "end"]))
        if kind == "bit" and at < len(data):
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "byte":
            data[at : at + 1] = draw(st.binary(min_size=1, max_size=4))
        elif kind == "number":
            size = draw(st.sampled_from([1, 2, 4, 8]))
            number = draw(st.sampled_from(NUMBERS)) % 256**size
            data[at : at + size] = number.to_bytes(size, draw(st.sampled_from(["little", "big"])))
        elif kind == "cut":
            del data[at : at + run]
        elif kind == "repeat":
            data[at:at] = data[at : at + run] * draw(st.integers(1, 50))
        elif kind == "other":
            source = draw(st.sampled_from(wholes))
            start = draw(st.integers(0, len(source)))
            data[at : at + run] = source[start : start + run]
        elif kind == "word":
            data[at:at] = draw(st.sampled_from(words))
        elif kind == "end":
            del data[at:]
    return bytes(data)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path
