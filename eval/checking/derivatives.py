"""Loss, du/dt and gradient of the recipe's network against `torch.func` in float32, for each way of computing them."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from eval.benchmark.steps import Setting
from eval.checking.report import FAILED, NOT_RUN, OK, Finding, failure
from meanflow.jvp import compiled_jvp, take_jvp
from meanflow.training.batches import MicroBatch, random_batch
from meanflow.training.compiling import perturbed, relative_error
from meanflow.training.state import build_network
from meanflow.training.step import configure_numerics, in_training_precision

SAMPLES = 2
LIMITS = {"fp32": 1e-3, "tf32": 2e-2, "bf16": 1e-1}  # of the relative errors: a wrong rule gives errors near 1


def agreement(setting: Setting, ways: list[tuple[str, str | None]], device: torch.device) -> Iterator[Finding]:
    """One finding for each of `ways`: a precision, and a mode of torch.compile (None: eager)."""
    config = setting.config()
    if not config.objective.needs_jvp:
        yield Finding("dual against torch.func", NOT_RUN, f"objective {config.objective.kind} takes no derivative")
        return
    torch.manual_seed(0)
    network = build_network(config, device).eval()  # without dropout
    batch = random_batch(config, SAMPLES, device)
    batch = replace(batch, r=torch.tensor([0.2, 0.5]), t=torch.tensor([0.7, 0.5]))  # one with r < t, one with r = t
    with perturbed(network):
        expected = _computed(network, config, batch, "func", "fp32", None)
        for precision, mode in ways:
            name = f"{precision}, {f'compiled ({mode})' if mode else 'eager'}"
            try:
                found = _computed(network, config, batch, "dual", precision, mode)
            except Exception as error:  # such as a compiler that is missing: the other ways may work
                yield failure(name, error)
                continue
            errors = [relative_error(a, b) for a, b in zip(found, expected, strict=True)]
            yield Finding(name, *_judged(errors, LIMITS[precision]))


def _judged(errors: list[float], limit: float) -> tuple[str, str]:
    text = ", ".join(f"{what} {error:.1e}" for what, error in zip(("loss", "du/dt", "gradient"), errors, strict=True))
    return OK if all(error < limit for error in errors) else FAILED, f"relative errors: {text}"


def _computed(network, config, batch: MicroBatch, method: str, precision: str, mode: str | None) -> list[Tensor]:
    """The loss of each sample, du/dt and the gradient."""
    train = replace(config.train, precision=precision, jvp=method, compile=mode, activation_checkpointing=None)
    configure_numerics(train)
    u = in_training_precision(network, train)
    jvp = take_jvp(method) if mode is None else compiled_jvp(network, method, mode)
    taken = []

    def recorded(*args, **kwargs):
        taken.append(jvp(*args, **kwargs))
        return taken[-1]

    network.zero_grad()
    how = {"jvp": recorded, "progress": batch.progress, **batch.cond}
    loss = config.objective.loss(u, batch.x, batch.eps, batch.r, batch.t, **how)
    loss.per_sample.sum().backward()
    gradient = torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None])
    return [loss.per_sample.detach(), taken[-1][1].detach(), gradient]
