"""One optimiser step: the loss of each micro-batch, the sum of gradients, the update."""

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from meanflow.dual import tangents_in, value_of
from meanflow.guidance import guided_velocity
from meanflow.jvp import Network, checkpointed, compiled_jvp, take_jvp
from meanflow.objectives import Loss
from meanflow.objectives.base import interpolate
from meanflow.training.batches import LABELS, MicroBatch
from meanflow.training.config import OptimConfig, RunConfig, TrainConfig
from meanflow.training.divergence import Guard
from meanflow.training.metrics import StepSums
from meanflow.training.processes import GradientSum
from meanflow.training.state import Ema, learning_rate

LossFunction = Callable[[MicroBatch], Loss]
# By train.activation_checkpointing. A compiled graph computes cheap operations again by itself.
RUN_BLOCK = {
    None: nn.Module.__call__,
    "cheap": functools.partial(nn.Module.__call__, run=checkpointed),
    "blocks": checkpointed,
}


def configure_numerics(config: TrainConfig) -> None:
    """Set PyTorch's process-wide switches of precision and determinism; nothing else does."""
    tf32 = config.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it when it starts


def make_loss(network: nn.Module, config: RunConfig, device: torch.device, ema: Ema | None = None) -> LossFunction:
    """The loss of a micro-batch. `ema` gives the averaged teacher, where the objective asks for one."""
    u = eager = in_training_precision(network, config.train)
    jvp, mode = take_jvp(config.train.jvp), config.train.compile_mode
    if mode is not None and config.objective.needs_jvp:
        jvp = compiled_jvp(network, config.train.jvp, mode)
    elif mode is not None:
        u = torch.compile(u, dynamic=False, mode=mode)
    teacher = None if config.objective.teacher_decay is None else averaged(network, ema, config)
    constant = {"frozen": frozen(u, network)} if config.objective.needs_frozen else {}

    def loss(batch: MicroBatch) -> Loss:
        if mode is not None:  # CUDA graphs: what the call before returned may be overwritten
            torch.compiler.cudagraph_mark_step_begin()
        cond, v = batch.cond, None
        if config.guidance is not None:
            v = _guided(eager, network, batch, config)  # the number of rows varies: compiled, each would be a graph
            null_class = torch.full_like(cond["class_labels"], config.model.classes)
            unconditional = batch.unconditional.to(device, non_blocking=True)
            cond = {**cond, "class_labels": torch.where(unconditional, null_class, cond["class_labels"])}
        how = {"v": v, "jvp": jvp, "progress": batch.progress, "teacher": teacher, **constant}
        return config.objective.loss(u, batch.x, batch.eps, batch.r, batch.t, **how, **cond)

    return loss


def in_training_precision(network: nn.Module, config: TrainConfig) -> Network:
    """u(z, r, t, **cond), its blocks under bf16 autocast or with activation checkpointing if the recipe says so.

    Only the blocks run in bf16. Times, labels, the first and the last layer stay float32: rounded to bf16, times near
    1 would differ by 1/256 at least, and u and du/dt would have more error from them than from all blocks.
    """
    if "v" in getattr(getattr(network, "config", None), "branches", ()):
        network = functools.partial(network, primal=value_of)  # v needs no derivative
    run_block = RUN_BLOCK[config.activation_checkpointing if config.compile_mode is None else None]
    if config.precision == "bf16":  # a context that is entered but disabled would still be part of a compiled graph

        def run_in_bf16(block: nn.Module, x: Tensor, *inputs: Tensor) -> Tensor:
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                return run_block(block, x, *inputs)

        return functools.partial(network, run_block=run_in_bf16)
    if config.tangent_precision == "bf16":

        def run_tangent_in_bf16(block: nn.Module, x: Tensor, *inputs: Tensor) -> Tensor:
            with tangents_in(torch.bfloat16):
                return run_block(block, x, *inputs)

        return functools.partial(network, run_block=run_tangent_in_bf16)
    return functools.partial(network, run_block=run_block)


def averaged(network: nn.Module, ema: Ema, config: RunConfig) -> Network:
    """u by the averaged weights that the objective asks for, in evaluation mode and without gradient."""
    weights = ema.averages[config.objective.teacher_decay]

    @torch.no_grad()
    def teacher(z: Tensor, r: Tensor, t: Tensor, **cond: Tensor | None) -> Tensor:
        with evaluating(network):
            return torch.func.functional_call(network, weights, (z, r, t), cond)

    return teacher


def frozen(u: Network, network: nn.Module) -> Network:
    """u as it is now, in evaluation mode and without gradient. `network`: whose mode that is."""

    @torch.no_grad()
    def constant(z: Tensor, r: Tensor, t: Tensor, **cond: Tensor | str | None) -> Tensor:
        with evaluating(network):
            return u(z, r, t, **cond)

    return constant


def _guided(u: Network, network: nn.Module, batch: MicroBatch, config: RunConfig) -> Tensor:
    """The guided velocity of a micro-batch. One pass of twice the batch uses a GPU better; a CPU gains nothing."""
    z, v = interpolate(batch.x, batch.eps, batch.t), batch.eps - batch.x
    batched, null_class = z.device.type != "cpu", config.model.classes
    labels = {name: batch.cond[name] for name in LABELS if name in batch.cond}
    with evaluating(network):
        return guided_velocity(u, z, batch.t, v, batch.unconditional, null_class, config.guidance, batched, **labels)


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode inside, which is without dropout; then the mode from before."""
    training = network.training
    network.eval()
    try:
        yield
    finally:
        network.train(training)


def accumulate(
    loss: LossFunction, batches: Iterable[MicroBatch], count: int, batch: int, gradients: GradientSum, sums: StepSums
) -> None:
    """Leave the gradient of the global batch's mean loss in `.grad`, from `count` micro-batches of this process."""
    gradients.zero()
    for i, micro in enumerate(batches):
        if i == count - 1:
            gradients.arm()
        out = loss(micro)
        total = out.per_sample.sum() / batch
        total.backward(1 + 0 * total.detach())  # a loss that is not finite makes the gradient so on every process
        sums.add(out)
    gradients.finish()


def update(
    optimizer: torch.optim.Optimizer, parameters: list[Tensor], config: OptimConfig, step: int, guard: Guard
) -> Tensor:
    """Clip and apply the gradients; their norm (a device scalar, before clipping).

    A gradient that is not finite changes nothing, nor does a spike if `guard` looks for them: the fused optimiser
    reads `found_inf` on the device, so no step waits for the host to look. The log raises when it reads the norm.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if config.clip is not None:
        torch._foreach_mul_(gradients, (config.clip / (norm + 1e-6)).clamp(max=1.0))
    optimizer.found_inf = guard.judge(norm)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
    optimizer.step()
    return norm
