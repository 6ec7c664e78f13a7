"""`--dry-run`: what a run would need, measured with a probe on this machine rather than guessed."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.data import augment
from meanflow.guidance import drop_labels
from meanflow.jvp import rows_first
from meanflow.logs import duration
from meanflow.random import generator
from meanflow.training.batches import MicroBatch, split_batch
from meanflow.training.config import RunConfig
from meanflow.training.metrics import StepSums
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.state import build_network, count_parameters, fresh_state
from meanflow.training.step import accumulate, configure_numerics, make_loss, update

PROBE_SAMPLES = 8  # enough for a rate on a CPU, where a whole batch can take minutes
FLOAT32_BYTES = 4


def estimate(config: RunConfig, ctx: DistributedContext) -> str:
    """Two probe steps on random images; parameters, memory and images/s of one process, as lines of text.

    Memory of activations is counted (the tensors saved for the backward pass) on a few samples and scaled to the
    micro-batch. The rate on a CPU is that of the small probe.
    """
    configure_numerics(config.train)
    state = fresh_state(config, ctx.device)
    state.network.train()
    local = split_batch(config, ctx.world)
    micro = min(config.train.microbatch or local, local)
    probe = min(PROBE_SAMPLES if ctx.device.type == "cpu" else micro, micro)
    loss = make_loss(state.network, config, ctx.device, state.ema)
    gradients = GradientSum(state.network, ctx)
    batch = random_batch(config, probe, ctx.device)

    saved = _count_saved(lambda: loss(batch))
    seconds = []
    for step in range(2):  # the first one warms up
        start = time.perf_counter()
        accumulate(loss, [batch], 1, probe, gradients, StepSums())
        norm = update(state.optimizer, gradients.parameters, config.optim, step, state.guard)
        norm.item()  # wait for the device
        seconds.append(time.perf_counter() - start)

    parameters = count_parameters(state.network)
    copies = 1 + 1 + 2 + len(config.ema.decays)  # weights, gradients, two Adam moments, averages
    fixed = parameters * FLOAT32_BYTES * copies
    activations = saved / probe * micro
    rate = probe / seconds[-1] * ctx.world
    whole = config.train.steps * config.train.batch / rate
    where = "CUDA device" if ctx.device.type == "cuda" else "CPU"
    return "\n".join(
        [
            f"parameters        {parameters:,} ({parameters / 1e6:.2f} M)",
            f"forward pass      {forward_multiply_adds(config) / 1e9:.3g} G multiply-adds an image (FLOPs, in papers)",
            f"micro-batch       {micro} images, {-(-local // micro)} a step and process, {ctx.world} process(es)",
            f"memory (estimate) {(fixed + activations) / 1e9:.1f} GB a process: {fixed / 1e9:.1f} GB weights, "
            f"gradients, Adam and {len(config.ema.decays)} EMA(s), {activations / 1e9:.1f} GB activations",
            f"speed (measured)  {rate:.3g} images/s on this {where} with a probe of {probe} images",
            f"whole run         {config.train.steps:,} steps of {config.train.batch:,} images: "
            f"about {duration(whole)} at that speed",
        ]
    )


def forward_multiply_adds(config: RunConfig) -> int:
    """Of the network on one sample, counted without computing anything."""
    model, meta = config.model, torch.device("meta")
    network = build_network(config, meta)
    z, time = (
        torch.zeros(1, model.channels, model.image_size, model.image_size, device=meta),
        torch.zeros(1, device=meta),
    )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(z, time, time)
    return counter.get_total_flops() // 2


def random_batch(config: RunConfig, size: int, device: torch.device) -> MicroBatch:
    """A micro-batch of noise images in the recipe's shapes, with its times and label inputs."""
    random, model = generator(config.seed, "probe"), config.model
    shape = (size, model.channels, model.image_size, model.image_size)
    x, eps = (
        torch.randn(shape, generator=random).to(device).contiguous(memory_format=torch.channels_last) for _ in range(2)
    )
    r, t = config.objective.sample_times(size, random)
    order, _ = rows_first(r != t)
    order = torch.arange(size) if order is None else order
    cond = {}
    if config.augment_labels:
        data = config.data
        draw = augment.draw(size, data.augment_p, data.flip, data.anisotropy, random)
        cond["augment_labels"] = draw.labels.to(device)
    if model.classes:
        cond["class_labels"] = torch.randint(model.classes, (size,), generator=random).to(device)
    r, t, unconditional = r[order], t[order], None
    if config.guidance is not None:
        unconditional = drop_labels(r, t, config.guidance, random)
    return MicroBatch(x, eps, r, t, cond, unconditional, progress=0.0)


def _count_saved(call) -> int:
    """Bytes that `call` saves for a backward pass, each storage once, parameters included."""
    storages: dict[int, int] = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = call()
    del out
    return sum(storages.values())
