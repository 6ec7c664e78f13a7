"""Features of images, extracted batch by batch by any number of processes, and resumable.

Batch k is the images [kB, (k+1)B), the last one shortened to end at N: the partition depends on N and B alone.
Process `rank` of `world` takes the batches with k mod world = rank, whole, so every convolution sees the same batch
whoever runs it, and the merged features are equal to the last bit for any number of processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.scoring.extractors import Extractor
from eval.scoring.files import read_npz, write_npz
from eval.scoring.metrics import Statistics, low_rank
from eval.scoring.references import Reference
from eval.scoring.sources import Source
from eval.scoring.threads import each, interruptible
from meanflow.errors import AssetError, NumericsError
from meanflow.files import remove_leftovers, sha256_json
from meanflow.logs import progress_bar
from meanflow.precision import exact_float32
from meanflow.training.processes import DistributedContext, run_on_rank0

REFERENCE_BATCH = 64  # fixed, so that a reference does not depend on the batch its user asks for
KEPT_UNASKED = 100 * 2**20  # bytes of a reference's features or statistics that are kept beside the results


def batches(n: int, batch: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each batch of `n` samples, in order."""
    return ((start, min(start + batch, n)) for start in range(0, n, batch))


def extract_features(
    source: Source,
    extractor: Extractor,
    layers: Sequence[str],
    batch: int,
    work: Path,
    ctx: DistributedContext,
    title: str | None = None,
) -> dict[str, Tensor] | None:
    """{layer: (N, D) float32} in sample order on rank 0, None on the others.

    Each batch's features are written to `work` as they come; those that are there and whole are not computed
    again, so the folder must belong to this source, extractor and batch (see `eval.scoring.protocol.open_work`).
    `title` names the progress bar (None: no bar). Raises NumericsError for features that are not finite.
    """
    pieces = list(batches(source.n, batch))
    missing = run_on_rank0(ctx, lambda: [piece for piece in pieces if not _whole(work, piece)])

    def extract(piece: tuple[int, int]) -> int:
        features = extractor.extract(source.images(*piece))
        write_npz(_path(work, piece), {layer: features[layer].numpy() for layer in layers})
        return piece[1] - piece[0]

    bar = progress_bar(
        total=source.n,
        initial=source.n - sum(stop - start for start, stop in missing),
        desc=title,
        unit=" images",
        disable=title is None or not ctx.is_main,
    )
    mine = missing[ctx.rank :: ctx.world]
    with bar, exact_float32(), closing(each(extract, mine, extractor.device)) as counts:
        for count in counts:
            # The processes keep pace with each other: a batch here is a batch on each of them.
            bar.update(min(count * ctx.world, source.n - bar.n))
    ctx.barrier()
    return interruptible(lambda: _merge(work, pieces, layers), extractor.device) if ctx.is_main else None


def images_done(work: Path) -> int:
    """Images whose features lie in the folders of `work`: samples and reference, whole or damaged."""
    ranges = (path.stem.split("-") for path in work.glob("*/*-*.npz"))
    return sum(int(stop) - int(start) for start, stop in ranges)


def _path(work: Path, piece: tuple[int, int]) -> Path:
    return work / f"{piece[0]:08d}-{piece[1]:08d}.npz"


def _whole(work: Path, piece: tuple[int, int]) -> bool:
    """Whether a batch's file is there and undamaged (each array carries zip's checksum)."""
    path = _path(work, piece)
    if not path.exists():
        return False
    try:
        return all(len(array) == piece[1] - piece[0] for array in read_npz(path).values())
    except AssetError:
        return False


def _merge(work: Path, pieces: list[tuple[int, int]], layers: Sequence[str]) -> dict[str, Tensor]:
    files = [read_npz(_path(work, piece)) for piece in pieces]
    merged = {layer: torch.from_numpy(np.concatenate([file[layer] for file in files])) for layer in layers}
    for layer, value in merged.items():
        bad = (~value.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            raise NumericsError(
                f"features {layer!r} of {len(bad)} samples (first: {int(bad[0])}) are not finite: "
                "the extractor's weights or arithmetic are broken"
            )
    return merged


# --- of a reference's images -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prepared:
    """What the metrics need of a reference: for fid statistics, or if M < D features (M, D); for kid, prc features."""

    fid: Statistics | Tensor | None
    features: dict[str, Tensor]


@dataclass(frozen=True)
class Cache:
    """A folder of npz files, named by the hash of what they were made of. Larger ones than `limit` are not kept."""

    folder: Path
    limit: float = float("inf")  # bytes

    def read(self, name: str, arrays: Sequence[str]) -> dict[str, np.ndarray] | None:
        """The arrays under these names; None if the file is absent or damaged, and has to be made again."""
        path = self.folder / f"{name}.npz"
        try:
            file = read_npz(path) if path.exists() else {}
            return {array: file[array] for array in arrays}
        except (AssetError, KeyError):
            return None

    def write(self, name: str, arrays: dict[str, np.ndarray]) -> None:
        if sum(array.nbytes for array in arrays.values()) <= self.limit:
            path = self.folder / f"{name}.npz"
            remove_leftovers(path)
            write_npz(path, arrays)


def prepare(
    reference: Reference,
    metrics: tuple[str, ...],
    extractor: Extractor,
    cache: Cache,
    work: Path,
    ctx: DistributedContext,
    title: str | None = None,
    keep: tuple[str, ...] = ("kid", "prc"),
) -> Prepared | None:
    """What `metrics` need of the reference (for those in `keep`, features), on rank 0 (None on the others).

    Taken from `cache`, whose keys are the content (hash of the images' bytes, extractor and weights), never a name;
    else extracted in `work`.
    """
    needing = [m for m in metrics if m in keep]
    fid = "fid" in metrics and reference.statistics is None
    if not needing and not fid:
        return Prepared(reference.statistics, {}) if ctx.is_main else None
    images = reference.images
    assert images is not None
    layers = sorted({extractor.layers[m] for m in (*needing, *(["fid"] if fid else []))})
    key = sha256_json([images.digest, extractor.name, extractor.weights, layers])[:32]
    few = fid and low_rank(images.n, extractor.dims(images.shape)[extractor.layers["fid"]])

    def cached() -> Prepared | None:
        if not needing and not few:
            found = cache.read(f"{key}-statistics", ("mu", "sigma"))
            return None if found is None else Prepared(Statistics(**found), {})
        found = cache.read(f"{key}-features", layers)
        if found is None or any(len(value) != images.n for value in found.values()):
            return None
        return finish({layer: torch.from_numpy(value) for layer, value in found.items()})

    def finish(features: dict[str, Tensor]) -> Prepared:
        side: Statistics | Tensor | None = reference.statistics
        if fid:
            all_of_them = features[extractor.layers["fid"]]
            side = all_of_them if few else interruptible(lambda: Statistics.of(all_of_them), extractor.device)
        return Prepared(side, {m: features[extractor.layers[m]] for m in needing})

    found = cached() if ctx.is_main else None
    if run_on_rank0(ctx, lambda: found is not None):
        return found
    features = extract_features(images, extractor, layers, REFERENCE_BATCH, work / f"reference-{key}", ctx, title)
    if features is None:
        return None
    prepared = finish(features)
    if not needing and not few:
        cache.write(f"{key}-statistics", prepared.fid.as_dict())
    else:
        cache.write(f"{key}-features", {layer: value.numpy() for layer, value in features.items()})
    return prepared
