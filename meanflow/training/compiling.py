"""train.compile=auto: whether to compile a run's steps, in which mode, and whether the result may be trusted."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from meanflow.logs import log
from meanflow.training.batches import AT_THE_END, MicroBatch, random_batch
from meanflow.training.config import AUTO, RunConfig
from meanflow.training.costs import forward_multiply_adds, step_launches
from meanflow.training.processes import DistributedContext
from meanflow.training.state import TrainState
from meanflow.training.step import LossFunction, evaluating, make_loss

SHORTEST_RUN = 10_000  # steps: compiling takes minutes
PASSES = 4  # of a step: forward, its derivative, backward, which takes two
FLOPS_OF_A_LAUNCH = 1e9  # about what a data-centre GPU computes while the host starts one kernel, some 10 µs
NOISE = 0.02
CHECKED_AT = (0.0, 0.66, AT_THE_END)  # of training: an objective with a schedule makes other passes at each
TOLERANCES = {"fp32": 1e-4, "tf32": 1e-2, "bf16": 5e-2}  # relative, of losses and gradient; wrong ones are off by 1


def chosen_mode(config: RunConfig, device: torch.device, images: int) -> str | None:
    """What train.compile=auto means for steps on `images` at once: a mode of torch.compile, or None for eager ones.

    "reduce-overhead" (CUDA graphs) where starting kernels would take longer than computing: small networks or batches.
    """
    train = config.train
    by_shape = train.jvp == "func" and config.objective.varying_rows
    masks = config.objective.same_dropout and getattr(config.model, "dropout", 0) > 0
    if device.type != "cuda" or train.steps < SHORTEST_RUN or train.activation_checkpointing == "blocks":
        return None
    if by_shape or masks:
        return None
    return mode_of_step(config, images)


def mode_of_step(config: RunConfig, images: int) -> str:
    flops = 2 * PASSES * forward_multiply_adds(config) * images
    return "reduce-overhead" if flops / step_launches(config, images) < FLOPS_OF_A_LAUNCH else "default"


def loss_of_run(
    config: RunConfig, state: TrainState, ctx: DistributedContext, images: int
) -> tuple[LossFunction, bool]:
    """The loss of micro-batches of `images`, and whether it is compiled: with train.compile=auto if that is worth it
    and right here.

    Right: losses and gradient of one micro-batch are those of the eager step within TOLERANCES, on every process.
    Otherwise a warning says what is wrong, and the steps are eager. A network with dropout is compared, and compiled
    once more for it, in evaluation mode: compiled code draws other masks.
    """
    eager = make_loss(state.network, config, ctx.device, state.ema)
    if config.train.compile != AUTO:
        return eager, config.train.compile is not None
    mode = chosen_mode(config, ctx.device, images)
    if mode is None:
        return eager, False
    log.info(f"train.compile=auto: {mode}; compiling takes some minutes")
    problem, dropout = None, getattr(config.model, "dropout", 0.0) > 0
    how = replace(config, train=replace(config.train, compile=mode))
    try:
        compiled = make_loss(state.network, how, ctx.device, state.ema)
        with evaluating(state.network) if dropout else nullcontext(), perturbed(state.network):
            batch = random_batch(config, images, ctx.device)
            batches = [replace(batch, progress=progress) for progress in CHECKED_AT]
            error = max(largest_error(compiled, eager, state.network, batch) for batch in batches)
        tolerance = TOLERANCES[config.train.precision]
        if not error <= tolerance:
            problem = f"the compiled step's numbers are off by {error:.1e}, more than {tolerance:.0e}"
    except Exception as failure:  # of any kind: a compiler has many, and training is possible without it
        problem = f"{type(failure).__name__}: {(str(failure).splitlines() or [''])[0]}"
    if ctx.any(problem is not None):
        problem = problem or "another process says why"
        log.warning(
            f"train.compile=auto: not compiled ({problem}); steps are eager. train.compile=null says so at once"
        )
        return eager, False
    return make_loss(state.network, how, ctx.device, state.ema) if dropout else compiled, True


@contextmanager
def perturbed(network: nn.Module) -> Iterator[None]:
    """Noise on the weights inside: a fresh network returns almost nothing, whose derivative no loss would show."""
    before = [p.detach().cpu().clone() for p in network.parameters()]
    try:
        with torch.no_grad():
            for p in network.parameters():
                p.add_(torch.randn_like(p), alpha=NOISE)
        yield
    finally:
        with torch.no_grad():
            for p, values in zip(network.parameters(), before, strict=True):
                p.copy_(values)


def largest_error(compiled: LossFunction, eager: LossFunction, network: nn.Module, batch: MicroBatch) -> float:
    """The relative error of losses or gradient, whichever is larger. Leaves no gradients."""
    found, expected = (_losses_and_gradient(loss, network, batch) for loss in (compiled, eager))
    return max(relative_error(a, b) for a, b in zip(found, expected, strict=True))


def _losses_and_gradient(loss: LossFunction, network: nn.Module, batch: MicroBatch) -> list[Tensor]:
    network.zero_grad()
    out = loss(batch)
    out.mean.backward()
    gradient = [p.grad.flatten().double() for p in network.parameters() if p.grad is not None]
    network.zero_grad()
    return [out.per_sample.detach().clone(), torch.cat(gradient)]


def relative_error(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())
