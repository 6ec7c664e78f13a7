"""Fine-tuning: a new run's weights from another run's average, wherever names and shapes agree."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from meanflow.errors import ConfigError, write_errors_named
from meanflow.training.config import InitConfig, config_from_tree
from meanflow.training.run_folder import find_checkpoint
from meanflow.training.state import TrainState

NAMES_SHOWN = 4


@dataclass(frozen=True)
class Taken:
    """What came from where. `reshaped`: in both, of another shape, so not taken."""

    source: str
    step: int
    ema: float
    taken: list[str]
    fresh: list[str]
    reshaped: list[str]
    unused: list[str]

    def summary(self) -> str:
        parts = [
            f"init.from {self.source} (step {self.step:,}, EMA {self.ema}): took {len(self.taken)} of "
            f"{len(self.taken) + len(self.fresh) + len(self.reshaped)} tensors"
        ]
        for names, what in (
            (self.fresh, "not there, so fresh"),
            (self.reshaped, "of another shape there, so fresh"),
            (self.unused, "there and not used"),
        ):
            if names:
                more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
                parts.append(f"{len(names)} {what}: {', '.join(names[:NAMES_SHOWN])}{more}")
        return "; ".join(parts)

    def write(self, path: Path) -> None:
        with write_errors_named(path):
            path.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")


@torch.no_grad()
def initialise(state: TrainState, config: InitConfig) -> Taken:
    """Fill the weights, and all averages with them.

    Raises AssetError if the checkpoint cannot be read, and ConfigError if it lacks the average asked for or fits so
    little that the network must be another one: less than half of the parameters.
    """
    path, checkpoint, _ = find_checkpoint(Path(config.from_))
    ema = config.ema
    if ema is None:
        ema = config_from_tree(checkpoint.meta["config"], str(path)).ema.eval
    if repr(ema) not in checkpoint.ema:
        raise ConfigError(f"init.ema: {path} keeps no average {ema}, only {', '.join(checkpoint.ema)}")
    there, here = checkpoint.ema[repr(ema)], dict(state.network.named_parameters())
    common = [name for name in here if name in there]
    taken = [name for name in common if here[name].shape == there[name].shape]
    share = sum(here[name].numel() for name in taken) / sum(p.numel() for p in here.values())
    if share < 0.5:
        raise ConfigError(f"init.from: {path} holds another network: {share:.0%} of this one's parameters fit by name")
    for name in taken:
        here[name].copy_(there[name])
    state.ema.restart()
    fresh = [name for name in here if name not in there]
    reshaped = [name for name in common if name not in taken]
    unused = [name for name in there if name not in here]
    return Taken(str(path), checkpoint.meta["step"], ema, taken, fresh, reshaped, unused)
