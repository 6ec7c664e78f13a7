"""Images → latents on disk, once; `bash run.sh prepare_latents` is the command, and the ImageNet recipes begin with it.

Each image and its mirror image are encoded; the latents' means and standard deviations are kept (see shards.py).
However it is interrupted, the same command continues. Several processes divide the shards among them, on any number
of GPUs.
"""

import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from meanflow.data.archives import open_source
from meanflow.data.codec import Codec, open_codec
from meanflow.data.dataset import digits
from meanflow.data.images import crop_file, decode_ahead, decoders
from meanflow.data.latents import LatentsConfig, find_fault, open_latents, refuse_other
from meanflow.data.layout import arrange
from meanflow.data.shards import (
    FORMAT,
    MANIFEST,
    PLAN,
    Manifest,
    Plan,
    ShardWriter,
    new_shard,
    read_manifest,
    read_plan,
    remove_leftovers,
    shard_entry,
    write_manifest,
)
from meanflow.errors import AssetError, ConfigError, write_errors_named
from meanflow.files import sha256_json, write_bytes
from meanflow.logs import log, progress_bar

SHARD_IMAGES = 1024  # 34 MB of latents at 4×32×32, and the most that an interruption loses
BATCH = 32


# --- which images -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Listing:
    """The images to encode, numbered in the order in which their source is read fastest."""

    names: list[str]
    labels: list[int]
    classes: tuple[str, ...]
    channels: int
    sha256: str  # of the names and the classes; of the pixels where images are not files
    decode: Callable[[Iterable[int]], Iterator[Future]]  # numbers → uint8 (channels, S, S), or AssetError by name


@contextmanager
def open_listing(config: LatentsConfig, processes: int) -> Iterator[Listing]:
    """The images that `config` names. processes: how many processes of this machine read at the same time.

    Raises AssetError for missing or unreadable images or class folders, ConfigError for a split or an image size that
    the source does not have.
    """
    if config.source == "digits":
        yield _digits(config)
        return
    with open_source(config.images, "data.images") as source, decoders(processes) as pool:
        layout = arrange(source, config.split)
        if not layout.classes:
            raise AssetError(f"{source.where}: has images but no class folders, which latents need: one folder a class")
        label_of = dict(zip(layout.images, layout.labels, strict=True))
        files = [parts for parts in source.files if parts in label_of]
        names = ["/".join(parts) for parts in files]
        labels = [label_of[parts] for parts in files]

        def crop(name: str, data: Path | BytesIO) -> Tensor:
            return crop_file(name, data, config.image_size, deep=False)

        def decode(numbers: Iterable[int]) -> Iterator[Future]:
            chosen = (files[k] for k in numbers)
            return (future for _, future in decode_ahead(pool, source, chosen, crop))

        yield Listing(names, labels, layout.classes, 3, sha256_json([names, layout.classes]), decode)


def _digits(config: LatentsConfig) -> Listing:
    data = digits(config.split)
    if config.image_size != data.images.shape[-1]:
        raise ConfigError(f"data.source digits has data.image_size {data.images.shape[-1]}, not {config.image_size}")

    def decode(numbers: Iterable[int]) -> Iterator[Future]:
        for k in numbers:
            future: Future = Future()
            future.set_result(data.images[k])
            yield future

    names = [f"digit {k}" for k in range(len(data))]
    digest = hashlib.sha256(data.images.numpy()).hexdigest()
    return Listing(names, data.labels.tolist(), data.class_names, data.images.shape[1], digest, decode)


# --- encoding them ----------------------------------------------------------------------------------------------------


def prepare(
    config: LatentsConfig,
    rank: int,
    world: int,
    device: torch.device | str,
    skip_broken: bool = False,
    batch: int = BATCH,
    shard_images: int = SHARD_IMAGES,
    shape: tuple[int, int, int] | None = None,
    classes: int | None = None,
) -> bool:
    """Encode this process's part, every world-th shard, as far as it is not done. False, at once, if all is there.

    Processes need no connection: whichever finds all shards done writes the manifest. So it is there once all
    processes have returned (where files of other machines appear late, one more call in one process writes it).

    skip_broken: leave out images that cannot be read (they are listed in the manifest) instead of stopping. batch:
    images encoded at once. shard_images: files of a shard, in a new preparation. shape, classes: of the latents and
    labels that a network takes; None: any.

    Raises AssetError for an image, archive, VAE or disk that cannot be used, or where another process works in the
    folder; ConfigError if it was begun with other settings or images, or the network takes others; NumericsError if the
    VAE gives NaN or infinity.
    """
    folder = Path(os.path.expanduser(config.latents))
    if _is_prepared(folder, config):
        return False
    if config.source == "folder" and config.images is None:
        open_latents(folder, config)  # says what is wrong with it
        return False
    with ExitStack() as stack:
        listing = stack.enter_context(open_listing(config, world))
        codec = open_codec(config.vae, device, config.decode_precision, config.decode_batch)
        requested = _plan(config, listing, codec, shard_images)
        _refuse_another_network(requested, shape, classes)
        stack.enter_context(_hold(folder, rank))
        remove_leftovers(folder, rank, world)
        plan = _begun_plan(folder, requested, rank)
        todo = [k for k in range(rank, plan.shards, world) if shard_entry(folder, plan, k) is None]
        if todo:  # a manifest that is there lists a shard that has to be made again
            with write_errors_named(folder / MANIFEST):
                (folder / MANIFEST).unlink(missing_ok=True)
        _warn_of_space(folder, plan, world, todo)
        _encode(folder, plan, listing, codec, todo, rank, skip_broken, batch)
        manifest = write_manifest(folder, plan, rank)
    if manifest:
        log.info(_summary(folder, manifest))
    else:
        log.info(f"{folder}: this process's shards are done; the process that finishes last writes the manifest")
    return True


def _refuse_another_network(plan: Plan, shape: tuple[int, int, int] | None, classes: int | None) -> None:
    """Raises ConfigError, before hours of encoding, if the network takes other latents or classes."""
    if shape is not None and plan.shape != shape:
        raise ConfigError(
            f"the latents would be {plan.shape} (channels, height, width) and the model is set to {shape}: change its "
            "channels and image_size, or data.image_size"
        )
    if classes and len(plan.classes) != classes:
        raise ConfigError(
            f"data.images {plan.images} has {len(plan.classes)} classes and model.classes is {classes}: set "
            f"model.classes={len(plan.classes)}"
        )


def _is_prepared(folder: Path, config: LatentsConfig) -> bool:
    """Whether all latents are there, of the same images. Raises ConfigError if they have other settings."""
    if not os.path.exists(folder / MANIFEST):
        return False
    manifest = read_manifest(folder)
    refuse_other(manifest.plan, config, folder)
    plan = manifest.plan
    same_images = config.images is None or plan.images == _absolute(config.images)
    return same_images and find_fault(folder, manifest) is None


def _absolute(path: str | None) -> str | None:
    return None if path is None else str(Path(os.path.expanduser(path)).resolve())


@contextmanager
def _hold(folder: Path, rank: int) -> Iterator[None]:
    """Lock the folder against a second command, at most until this process ends."""
    path = folder / f".rank{rank}.lock"
    with ExitStack() as stack:
        with write_errors_named(path):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(path.open("w"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise AssetError(f"{folder}: another process prepares latents here; wait for it or stop it") from error
        yield


def _plan(config: LatentsConfig, listing: Listing, codec: Codec, shard_images: int) -> Plan:
    return Plan(
        format=FORMAT,
        source=config.source,
        images=_absolute(config.images),
        split=config.split,
        listing=listing.sha256,
        files=len(listing.names),
        classes=listing.classes,
        image_size=config.image_size,
        shape=codec.latent_shape(listing.channels, config.image_size),
        dtype="float16",
        scale=codec.scale,
        codec=codec.record,
        shard_images=shard_images,
    )


def _begun_plan(folder: Path, requested: Plan, rank: int) -> Plan:
    """The plan that the folder was begun with; `requested` if it is new. Raises ConfigError where they differ."""
    path = folder / PLAN
    if not path.exists():
        write_bytes(path, json.dumps(asdict(requested), indent=1).encode(), rank, sync=True)
    begun = read_plan(path)
    old, new = begun.identity(), requested.identity()
    if begun.codec["sha256"] != requested.codec["sha256"]:  # named, since checksums say little
        old["codec"], new["codec"] = (f"{c['name']} (sha256 {c['sha256']})" for c in (begun.codec, requested.codec))
    for name in ("codec", "image_size", "split", "source", "scale", "shape", "files", "classes", "listing"):
        if old[name] == new[name]:
            continue
        what = f"{name} {old[name]}, now {name} {new[name]}"
        if name in ("classes", "listing"):
            what = f"another list of images ({begun.images}, now {requested.images})"
        raise ConfigError(f"{folder}: was begun with {what}: give the same again, or another folder for the latents")
    return begun


def _warn_of_space(folder: Path, plan: Plan, world: int, todo: list[int]) -> None:
    needed = sum(len(plan.numbers(index)) for index in todo) * plan.record_bytes * world
    free = shutil.disk_usage(folder).free
    if needed > free:
        log.warning(f"{folder}: about {needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free")


def _encode(
    folder: Path, plan: Plan, listing: Listing, codec: Codec, todo: list[int], rank: int, skip_broken: bool, batch: int
) -> None:
    """Write the shards `todo`. Decoding runs ahead across their borders, so the encoder need not wait at them."""
    numbers = [number for index in todo for number in plan.numbers(index)]
    decoded = zip(numbers, listing.decode(numbers), strict=True)
    with progress_bar(total=len(numbers), desc="encoding images", unit="img", disable=rank > 0 or not todo) as bar:
        for index in todo:
            with new_shard(folder, plan, index, rank) as shard:
                for part in _chunks(decoded, len(plan.numbers(index)), batch):
                    _encode_batch(listing, codec, shard, part, skip_broken)
                    bar.update(len(part))


def _chunks(items: Iterator[Any], count: int, size: int) -> Iterator[list[Any]]:
    """The next `count` items in lists of `size`."""
    for start in range(0, count, size):
        yield list(islice(items, min(size, count - start)))


def _encode_batch(
    listing: Listing, codec: Codec, shard: ShardWriter, part: list[tuple[int, Future]], skip_broken: bool
) -> None:
    images, labels = [], []
    for number, future in part:
        error = future.exception()
        if error is None:
            images.append(future.result())
            labels.append(listing.labels[number])
        elif skip_broken and isinstance(error, AssetError):
            shard.skipped.append((listing.names[number], str(error)))
        elif isinstance(error, AssetError):
            advice = "replace it, or leave such images out with `bash run.sh prepare_latents --skip-broken`"
            raise AssetError(f"{error}; {advice}") from error
        else:
            raise error
    if images:
        shard.add(encode_both(codec, torch.stack(images)), labels)


def encode_both(codec: Codec, images: Tensor) -> Tensor:
    """uint8 (n, channels, S, S) → (n, 2, 2, C, h, w): of the images and their mirror images, mean and std."""
    sides = [torch.stack(codec.encode(side), 1) for side in (images, images.flip(-1))]
    return torch.stack(sides, 1)


def _summary(folder: Path, manifest: Manifest) -> str:
    plan, skipped = manifest.plan, manifest.skipped
    shape, size = "x".join(map(str, plan.shape)), sum(shard.bytes for shard in manifest.shards)
    line = f"{folder}: {manifest.count:,} latents of {shape} in {len(plan.classes):,} classes, {size / 1e9:.2f} GB"
    if skipped:
        line += f"; {len(skipped):,} images left out, listed in {MANIFEST}, the first because {skipped[0][1]}"
    return line


if __name__ == "__main__":
    sys.exit("error: this command has moved: bash run.sh prepare_latents, or torchrun … run.py prepare_latents")
