"""`--dry-run`: whether a run's data are there, what it needs, counted, and how fast two steps of it were here."""

import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from meanflow.data import LatentsConfig, open_latents
from meanflow.data.archives import open_source
from meanflow.data.dataset import cache_of
from meanflow.data.images import check_first
from meanflow.data.layout import arrange
from meanflow.data.shards import MANIFEST
from meanflow.errors import UserError
from meanflow.logs import duration
from meanflow.training.batches import check_classes, random_batch, split_batch
from meanflow.training.config import RunConfig
from meanflow.training.costs import META, forward_multiply_adds, step_memory
from meanflow.training.metrics import StepSums
from meanflow.training.microbatch import free_memory, with_microbatch
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.state import build_network, count_parameters, fresh_state
from meanflow.training.step import accumulate, configure_numerics, make_loss, update

PROBE_SAMPLES = {"cuda": 128, "cpu": 8}  # enough for a rate
CPU_PROBE = 1e11  # multiplications and additions: as many samples of those as take a CPU a few seconds
CPU_PARAMETERS = 60e6  # of a network that a CPU makes and trains in seconds
PASSES = 4  # of a step: forward, its derivative, backward, which takes two


def estimate(config: RunConfig, ctx: DistributedContext) -> Iterator[str]:
    """Lines on data, parameters, memory and, last, images/s. Every process must take all of them.

    Memory is counted and not taken. The rate is that of two steps with a few samples, eager unless the recipe says
    otherwise. Raises UserError where memory is too small and, after the last line, for data that cannot be trained on.
    """
    wrong = None
    try:
        yield f"data              {data_line(config)}"
    except UserError as error:
        wrong = error
        yield "data              cannot be used, see below"
    parameters = count_parameters(build_network(config, META))
    yield f"parameters        {parameters:,} ({parameters / 1e6:.2f} M)"
    multiply_adds = forward_multiply_adds(config)
    yield f"forward pass      {multiply_adds / 1e9:.3g} G multiply-adds an image (FLOPs, in papers)"
    local = split_batch(config, ctx.world)
    micro = with_microbatch(config, ctx).train.images_at_once(local)
    memory, available = step_memory(config), free_memory(ctx.device)
    yield (
        f"micro-batch       {micro} images ({config.train.microbatch or 'all'}), {-(-local // micro)} a step and "
        f"process, {ctx.world} process(es)"
    )
    yield (
        f"memory (counted)  {_size(memory.of(micro))} a process: {_size(memory.fixed)} weights, gradients, Adam and "
        f"{len(config.ema.decays)} EMA(s), {_size(memory.peak)} activations an image"
    )
    where = "CUDA device" if ctx.device.type == "cuda" else "CPU"
    if available is not None:
        short = memory.of(micro) > available
        yield f"memory free       {_size(available)} on this {where}" + (
            ": TOO LITTLE; set train.microbatch lower, or train.activation_checkpointing=cheap or blocks"
            if short
            else ""
        )
    rate, how = _rate(config, ctx.device, micro, multiply_adds)
    if rate is None:
        yield f"speed             {how}"
    else:
        seconds = config.train.steps * config.train.batch / (rate * ctx.world)
        yield f"speed (measured)  {rate * ctx.world:.3g} images/s on this {where} {how}"
        yield (
            f"whole run         {config.train.steps:,} steps of {config.train.batch:,} images: "
            f"about {duration(seconds)} at that speed"
        )
    if wrong is not None:
        raise wrong


def _rate(config: RunConfig, device: torch.device, micro: int, multiply_adds: int) -> tuple[float | None, str]:
    """Images/s of one process and how they were measured; None for a network that would take a CPU minutes."""
    smaller, scale, part = config, 1.0, ""
    samples = min(PROBE_SAMPLES[device.type], micro)
    if device.type == "cpu":
        parameters = count_parameters(build_network(config, META))
        if parameters > CPU_PARAMETERS:
            depth = getattr(config.model, "depth", 0)
            few = int(depth * CPU_PARAMETERS / parameters)
            if not few:
                return None, f"not measured: {parameters / 1e6:.0f} M parameters would take this CPU minutes"
            depths = {
                name: getattr(config.model, name) for name in ("depth", "head_depth") if hasattr(config.model, name)
            }
            shallow = {name: max(1, round(value * few / depth)) for name, value in depths.items()}
            smaller = replace(config, model=replace(config.model, **shallow))
            scale = forward_multiply_adds(smaller) / multiply_adds
            part = f" and {few} of {depth} blocks, scaled by their multiply-adds"
        samples = max(1, min(samples, int(CPU_PROBE / (PASSES * scale * multiply_adds))))
    configure_numerics(smaller.train)
    state = fresh_state(smaller, device)
    state.network.train()
    loss = make_loss(state.network, smaller, device, state.ema)
    gradients = GradientSum(state.network, DistributedContext(0, 1, device))
    batch = random_batch(smaller, samples, device)
    for step in range(2):  # the first one warms up
        start = time.perf_counter()
        accumulate(loss, [batch], 1, samples, gradients, StepSums())
        norm = update(state.optimizer, gradients.parameters, smaller.optim, step, state.guard)
        norm.item()  # wait for the device
        seconds = time.perf_counter() - start
    return scale * samples / seconds, f"with {samples} images at once{part}"


def data_line(config: RunConfig) -> str:
    """What the run would train on, without downloading, preparing or decoding it.

    Raises AssetError for files that are missing or cannot be listed, ConfigError where the classes do not fit.
    """
    data, model = config.data, config.model
    if not isinstance(data, LatentsConfig):
        if data.path is not None:
            cache = cache_of(data, model.image_size, model.channels)
            if cache is not None and (kept := cache.header()):
                return f"{_counted(kept['shape'][0], kept['classes'], data.path, config)}, decoded in {cache.file}"
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
            check_first(source, layout, config.model.image_size, config.model.channels, config.data.resize)
    return _counted(len(layout.images), layout.classes, path, config)


def _counted(images: int, classes: Sequence[str], path: str, config: RunConfig) -> str:
    check_classes(config.model.classes, classes)
    return f"{images:,} images of {len(classes) or 'no'} classes in {path}"


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.3g} MB"
