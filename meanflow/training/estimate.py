"""`--dry-run`: what a run needs, measured with two steps on this machine, and whether its data are there."""

import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

from meanflow.data import LatentsConfig, augment, open_latents
from meanflow.data.archives import open_source
from meanflow.data.images import arrange, check_first
from meanflow.data.shards import MANIFEST
from meanflow.guidance import drop_labels
from meanflow.jvp import rows_first
from meanflow.logs import duration
from meanflow.random import generator
from meanflow.training.batches import MicroBatch, check_classes, split_batch
from meanflow.training.config import RunConfig
from meanflow.training.metrics import StepSums
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.state import build_network, count_parameters, fresh_state
from meanflow.training.step import accumulate, configure_numerics, make_loss, update

PROBE_SAMPLES = 8  # enough for a rate on a CPU, where a whole batch can take minutes
FLOAT32_BYTES = 4


def estimate(config: RunConfig, ctx: DistributedContext) -> str:
    """Two steps on random images; data, parameters, memory and images/s of one process, as lines of text.

    Memory of activations is counted (the tensors saved for the backward pass) on a few samples and scaled to the
    micro-batch. The rate on a CPU is that of these few samples. Raises UserError for data that cannot be trained on.
    """
    data = data_line(config)
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
    lines = [
        f"data              {data}",
        f"parameters        {parameters:,} ({parameters / 1e6:.2f} M)",
        f"forward pass      {forward_multiply_adds(config) / 1e9:.3g} G multiply-adds an image (FLOPs, in papers)",
        f"micro-batch       {micro} images, {-(-local // micro)} a step and process, {ctx.world} process(es)",
        f"memory (estimate) {_size(fixed + activations)} a process: {_size(fixed)} weights, gradients, Adam and "
        f"{len(config.ema.decays)} EMA(s), {_size(activations)} activations",
    ]
    available = free_memory(ctx.device)
    if available is not None:
        short = fixed + activations > available
        lines.append(
            f"memory free       {_size(available)} on this {where}"
            + (": TOO LITTLE; set train.microbatch lower, or train.activation_checkpointing=true" if short else "")
        )
    lines += [
        f"speed (measured)  {rate:.3g} images/s on this {where} with {probe} images at once",
        f"whole run         {config.train.steps:,} steps of {config.train.batch:,} images: "
        f"about {duration(whole)} at that speed",
    ]
    return "\n".join(lines)


def data_line(config: RunConfig) -> str:
    """What the run would train on, without downloading, preparing or decoding it.

    Raises AssetError for files that are missing or cannot be listed, ConfigError where the classes do not fit.
    """
    data, model = config.data, config.model
    if not isinstance(data, LatentsConfig):
        if data.path is not None:
            return _listed(data.path, "data.path", config)
        downloaded = data.source != "cifar10" or any(Path(data.root).expanduser().glob("cifar-10*"))
        return data.source if downloaded else f"{data.source}, to be downloaded to {data.root} (170 MB)"
    folder = Path(data.latents).expanduser()
    if not (folder / MANIFEST).exists() and (data.source == "digits" or data.images is not None):
        images = "digits" if data.source == "digits" else _listed(data.images, "data.images", config)
        return f"{images}, to be encoded into {folder}"
    latents = open_latents(folder, data, config.z_shape)
    check_classes(model.classes, latents.class_names)
    return f"{len(latents):,} latents of {len(latents.class_names)} classes in {folder}"


def _listed(path: str, setting: str, config: RunConfig) -> str:
    with open_source(path, setting) as source:
        layout = arrange(source, config.data.split)
        if not isinstance(config.data, LatentsConfig):
            check_first(source, layout, config.model.image_size, config.model.channels)
    check_classes(config.model.classes, layout.classes)
    return f"{len(layout.images):,} images of {len(layout.classes) or 'no'} classes in {path}"


def free_memory(device: torch.device) -> int | None:
    """Bytes that are free on a CUDA device, or available in the computer's memory; None where that is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    info = Path("/proc/meminfo")
    lines = info.read_text(encoding="ascii").splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"


def forward_multiply_adds(config: RunConfig) -> int:
    """Of the network on one sample, counted without computing anything."""
    meta = torch.device("meta")
    network = build_network(config, meta)
    z, time = torch.zeros(1, *config.z_shape, device=meta), torch.zeros(1, device=meta)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(z, time, time)
    return counter.get_total_flops() // 2


def random_batch(config: RunConfig, size: int, device: torch.device) -> MicroBatch:
    """A micro-batch of noise images in the recipe's shapes, with its times and label inputs."""
    random, shape = generator(config.seed, "probe"), (size, *config.z_shape)
    x, eps = (torch.randn(shape, generator=random).to(device) for _ in range(2))
    x, eps = (y.contiguous(memory_format=torch.channels_last) for y in (x, eps))
    r, t = config.objective.sample_times(size, random)
    order, _ = rows_first(r != t)
    order = torch.arange(size) if order is None else order
    cond = {}
    if config.augment_labels:
        data = config.data
        draw = augment.draw(size, data.augment_p, data.flip, data.anisotropy, random)
        cond["augment_labels"] = draw.labels.to(device)
    if classes := config.model.classes:
        cond["class_labels"] = torch.randint(classes, (size,), generator=random).to(device)
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
