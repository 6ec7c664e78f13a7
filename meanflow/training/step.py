"""One optimiser step: Algorithm 1 over the micro-batches, one sum of gradients, one guarded update."""

import functools
import os
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from meanflow.guidance import guided_velocity
from meanflow.objective import MeanFlowLoss, interpolate, meanflow_loss
from meanflow.recompute import recomputed
from meanflow.tangent import Network, value_and_tangent
from meanflow.training.batches import MicroBatch
from meanflow.training.compiled import compiled_derivative
from meanflow.training.config import OptimConfig, RunConfig, TrainConfig
from meanflow.training.distributed import GradientSum
from meanflow.training.guard import Guard
from meanflow.training.metrics import StepSums
from meanflow.training.state import learning_rate

LossFunction = Callable[[MicroBatch], MeanFlowLoss]


def configure_numerics(config: TrainConfig) -> None:
    """Precision and determinism are process-wide switches in PyTorch; this is the one place that sets them."""
    tf32 = config.precision == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = not config.deterministic
    torch.use_deterministic_algorithms(config.deterministic)
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it when it starts


def make_loss(network: nn.Module, config: RunConfig, device: torch.device) -> LossFunction:
    """The loss of a micro-batch."""
    velocity = velocity_of(network, config.train)
    mode, derivative = config.train.compile, value_and_tangent
    if mode is not None:
        derivative = compiled_derivative(network, config.loss.jvp, mode)

    def loss(batch: MicroBatch) -> MeanFlowLoss:
        cond, v = batch.cond, None
        if config.guidance is not None:
            network.eval()
            v = _guided(velocity, batch, config)
            network.train()
            null = torch.full_like(cond["class_labels"], config.model.classes)
            dropped = batch.dropped.to(device, non_blocking=True)
            cond = {**cond, "class_labels": torch.where(dropped, null, cond["class_labels"])}
        return meanflow_loss(velocity, batch.x, batch.eps, batch.t, batch.r, config.loss, v, derivative, **cond)

    return loss


def velocity_of(network: nn.Module, config: TrainConfig) -> Network:
    """u(z, t, r, **cond), its blocks recomputed by the backward pass or under bf16 autocast if the recipe says so.

    Bf16 is for the blocks, where the work is. Times, labels, the first and the last layer stay float32: rounded to
    bf16, times near 1 would differ by 1/256 at least, and u and du/dt would carry more error than all blocks give them.
    """
    run_block = recomputed if config.activation_checkpointing else nn.Module.__call__
    bf16 = config.precision == "bf16"

    def in_precision(block: nn.Module, x: Tensor, emb: Tensor) -> Tensor:
        with torch.autocast(x.device.type, dtype=torch.bfloat16, enabled=bf16):
            return run_block(block, x, emb)

    return functools.partial(network, run_block=in_precision)


def _guided(u: Network, batch: MicroBatch, config: RunConfig) -> Tensor:
    """The guided velocity of a micro-batch. Two passes as one fill a GPU better; a CPU is full with one."""
    z = interpolate(batch.x, batch.eps, batch.t.to(batch.x, non_blocking=True))
    together, null = z.device.type != "cpu", config.model.classes
    v = batch.eps - batch.x
    return guided_velocity(u, z, batch.t, v, batch.dropped, null, config.guidance, together, **batch.cond)


def accumulate(
    loss: LossFunction, batches: Iterable[MicroBatch], count: int, batch: int, gradients: GradientSum, sums: StepSums
) -> None:
    """Leave the gradient of the global batch's mean loss in `.grad`, from `count` micro-batches of this process."""
    gradients.zero()
    for i, micro in enumerate(batches):
        if i == count - 1:
            gradients.arm()
        out = loss(micro)
        total = out.weighted.sum() / batch
        total.backward(1 + 0 * total.detach())  # a loss that is not finite spoils the gradient of every process
        sums.add(out.weighted, out.squared_error, int((micro.t != micro.r).sum()))
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
