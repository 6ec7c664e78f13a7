"""Scoring a run as its recipe says: at the end of the job, and on a schedule while it trains."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from eval.evaluate import evaluate
from eval.extractors import INCEPTION, Extractor, Options, create, inception_weights_path
from eval.files import default_cache, read_json, write_json
from eval.generate import open_checkpoint
from eval.metrics import MetricOptions, Statistics, frechet
from eval.protocol import Request, Variant, table
from eval.references import Reference, check_reference, open_reference, reference_of_images
from eval.subjects import Sampling, variants_of
from meanflow.data import load_dataset
from meanflow.random import generator
from meanflow.training.checkpoint import Checkpoint, checkpoint_path, file_sha256
from meanflow.training.config import RunConfig
from meanflow.training.distributed import Processes
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState

METRICS = ("fid",)
BEST = "best.pt"


def score_run(
    run: RunFolder, config: RunConfig, processes: Processes, say: Callable[[str], None] = print
) -> list[dict]:
    """Score the newest checkpoint with the recipe's EMA at each of `config.eval.steps`; the results.

    They are written to RUN/eval/*.json and shown as a table. What an interrupted call has done is used, and
    results that stand there already are not made again. Raises what `eval.evaluate.evaluate` raises.
    """
    path, checkpoint = open_checkpoint(run.path)
    variants = variants_of(
        path,
        checkpoint,
        file_sha256(path),
        repr(config.ema.eval),
        config.eval.steps,
        Sampling(config.eval.samples, 0, "random", "round"),
        processes.device,
    )
    results = evaluate(_request(run, config, processes), variants, processes)
    if processes.is_main:
        say(table(results))
    return results
