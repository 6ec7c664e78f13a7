"""Fuzzing: a few mutated inputs in the normal tests, `MEANFLOW_FUZZ=10000 pytest tests/fuzz` for as many a test.

Few are the same at each run; many are new ones. Every test also bounds the memory that its inputs cost.
"""

import faulthandler
import os
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from mutations import peak_mb

INPUTS = int(os.environ.get("MEANFLOW_FUZZ", 0))
MAX_GROWTH_MB = 300  # of peak memory, over all inputs of a test, besides what hypothesis keeps of each
KEPT_MB = 0.2  # measured: 0.15 an input of the largest, while the readers alone stay flat
HANG_S = 60

settings.register_profile(
    "fuzz",
    max_examples=INPUTS or 40,
    derandomize=not INPUTS,
    deadline=20_000,  # ms an input
    database=None,
    phases=[Phase.generate],  # shrinking takes longer than it helps: inputs are small
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


@pytest.fixture(autouse=True)
def _no_blow_up_and_no_hang():
    faulthandler.dump_traceback_later(HANG_S + INPUTS * 0.1, exit=True, file=sys.__stderr__)
    before = peak_mb()
    yield
    faulthandler.cancel_dump_traceback_later()
    assert peak_mb() - before < MAX_GROWTH_MB + KEPT_MB * INPUTS
