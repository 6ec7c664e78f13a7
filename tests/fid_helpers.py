"""Small runs and images for the tests of evaluation."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import torch
from running import tiny_config

from eval.fid import main
from meanflow.errors import run_main
from meanflow.training.checkpoint import save_checkpoint
from meanflow.training.config import RunConfig, config_to_yaml
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import TrainState, fresh_state, to_checkpoint

EMAS = {"ema__decays": [0.9, 0.99], "ema__eval": 0.99}


def tiny_run(path: Path, config: RunConfig | None = None, step: int = 7) -> tuple[RunFolder, TrainState]:
    """A run folder whose networks are random: nothing is trained. Its two EMAs differ."""
    config = config or tiny_config(**EMAS)
    state = fresh_state(config, torch.device("cpu"))
    state.step = step
    generator = torch.Generator().manual_seed(1)
    for averages in state.ema.averages.values():
        for tensor in averages.values():
            tensor += 0.05 * torch.randn(tensor.shape, generator=generator)
    run = RunFolder(path)
    data = {"images": 1797, "classes": [], "sha256": "0" * 64}
    save_checkpoint(run.checkpoints, step, to_checkpoint(state, config, data))
    run.config_file.write_text(config_to_yaml(config))
    return run, state


def grey_blobs(n: int, seed: int, size: int = 8) -> np.ndarray:
    """uint8 (n, size, size, 1)."""
    coarse = torch.rand(n, 1, 3, 3, generator=torch.Generator().manual_seed(seed))
    fine = torch.nn.functional.interpolate(coarse, size=size, mode="bilinear")
    return (255 * fine).to(torch.uint8).permute(0, 2, 3, 1).numpy()


def fid(*args: object) -> int:
    """`bash run.sh fid ARGS`: its exit code."""
    return run_main(main, [str(arg) for arg in args])


def result(path: Path) -> dict:
    return json.loads(path.read_text())


def error(capsys) -> str:
    """The line of the error that was shown last."""
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith("error: ")
    return line


def count_pieces(patch, at_most: float = float("inf"), end=None, log: Path | None = None) -> list[str]:
    """Batches of features that are written from now on, by folder and name; `end()` is called before one too many."""
    import eval.scoring.features as features

    written: list[str] = []
    write = features.write_npz

    def counted(path: Path, arrays) -> None:
        if len(written) >= at_most:
            end()
        write(path, arrays)
        if "-" in path.stem and path.stem.replace("-", "").isdecimal():
            written.append(f"{path.parent.name}/{path.stem}")
            if log is not None:
                with log.open("a") as file:
                    file.write(f"{written[-1]}\n")

    patch.setattr(features, "write_npz", counted)
    return written


def interrupt() -> None:
    raise KeyboardInterrupt


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
