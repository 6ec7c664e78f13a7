"""Where people look at a run besides its folder: TensorBoard and Weights & Biases, both optional packages.

Both get the same: every line of metrics.jsonl, the run's settings, and at each evaluation its scores and a grid of
samples.
"""

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from meanflow.errors import AssetError, ConfigError
from meanflow.files import read_json, write_json
from meanflow.logs import log
from meanflow.training import settings
from meanflow.training.config import RunConfig, config_to_yaml
from meanflow.training.run_folder import RunFolder

PROJECT = "meanflow"  # of Weights & Biases, unless WANDB_PROJECT names another


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation shows: {name: number} and {name: picture, uint8 (H, W) or (H, W, 3)}."""

    scores: dict[str, float] = field(default_factory=dict)
    pictures: dict[str, np.ndarray] = field(default_factory=dict)


class Tracker(Protocol):
    """Shows numbers and pictures by step. Steps never fall, and one may come several times with other names."""

    def log(self, step: int, values: dict[str, float]) -> None: ...

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None: ...

    def close(self) -> None: ...


def open_trackers(config: RunConfig, run: RunFolder, step: int) -> list[Tracker]:
    """Those that `logging` asks for, to be continued after `step`. Raises ConfigError if one cannot start."""
    kinds = {"tensorboard": TensorBoard, "wandb": WeightsAndBiases}
    return [kind(config, run, step) for name, kind in kinds.items() if getattr(config.logging, name)]


class TensorBoard:
    """Events in RUN/tensorboard; those after `step`, which a run that continues makes again, are hidden."""

    def __init__(self, config: RunConfig, run: RunFolder, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(run.path / "tensorboard"), purge_step=step + 1)
        self.writer.add_text("config", f"```\n{config_to_yaml(config)}```", step)

    def log(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        for name, picture in pictures.items():
            self.writer.add_image(name, picture, step, dataformats="HW" if picture.ndim == 2 else "HWC")

    def close(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A run of Weights & Biases, whose id is kept in RUN/wandb.json: the same command continues it.

    Its own settings (WANDB_MODE=offline, WANDB_PROJECT, …) are as its manual says. Once training is under way nothing
    that goes wrong there ends it.
    """

    def __init__(self, config: RunConfig, run: RunFolder, step: int):
        import wandb

        self.images = wandb.Image
        try:
            self.run = wandb.init(
                id=_run_id(run, step),
                resume="allow",
                project=os.environ.get("WANDB_PROJECT", PROJECT),
                name=run.path.resolve().name,
                dir=str(run.path),
                config=settings.to_tree(config),
                allow_val_change=True,  # of settings that a run may change when it continues
            )
        except wandb.Error as error:
            raise ConfigError(
                f"logging.wandb is true, but wandb cannot start ({' '.join(str(error).split())}); "
                "WANDB_MODE=offline keeps everything in the run folder"
            ) from error
        self.broken = False

    def log(self, step: int, values: dict[str, Any]) -> None:
        self._try(lambda: self._log(step, values))

    def show(self, step: int, pictures: dict[str, np.ndarray]) -> None:
        self._try(lambda: self._log(step, {name: self.images(picture) for name, picture in pictures.items()}))

    def close(self) -> None:
        self._try(self.run.finish)

    def _log(self, step: int, values: dict[str, Any]) -> None:
        if step >= self.run.step:  # a run that continues makes steps again that are there already
            self.run.log(values, step=step)

    def _try(self, work: Callable[[], Any]) -> None:
        if self.broken:
            return
        try:
            work()
        except Exception as error:  # its process may be gone, in any of its ways
            self.broken = True
            log.warning(f"wandb has failed ({error}); training goes on without it, and metrics.jsonl has everything")


def _run_id(run: RunFolder, step: int) -> str:
    """That of a run that continues; a new one for a run that begins, or whose file is damaged."""
    file = run.path / "wandb.json"
    if step and file.exists():
        try:
            return str(read_json(file)["id"])
        except (AssetError, KeyError, TypeError) as error:
            log.warning(f"{file}: has no id of a wandb run ({error}); a new one is begun")
    write_json(file, {"id": (name := secrets.token_hex(4))})
    return name
