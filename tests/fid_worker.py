"""`eval.fid` in a process of its own, for the tests: Inception at a small input size, death on demand.

python tests/fid_worker.py DIE_AFTER ARGUMENTS…     (DIE_AFTER: batches written before SIGKILL; 0: never)
"""

import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

import eval.scoring.features
from eval.fid import main
from meanflow.errors import run_main

SMALL_INPUT = 75  # the smallest that Inception takes: a sixteenth of the arithmetic


def die_after(count: int) -> None:
    written = 0
    write = eval.scoring.features.write_npz

    def counted(path, arrays):
        nonlocal written
        write(path, arrays)
        written += 1
        if written == count:
            os.kill(os.getpid(), signal.SIGKILL)

    eval.scoring.features.write_npz = counted


if __name__ == "__main__":
    torch.set_num_threads(1)
    FeatureExtractorInceptionV3.INPUT_IMAGE_SIZE = SMALL_INPUT
    if int(sys.argv[1]):
        die_after(int(sys.argv[1]))
    sys.exit(run_main(main, sys.argv[2:]))
