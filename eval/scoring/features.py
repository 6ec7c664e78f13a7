"""Features of a source of images, extracted batch by batch by any number of processes, and resumable.

Batch k is the samples [kB, (k+1)B), the last one shortened to end at N: the partition depends on N and B
alone. Process `rank` of `world` takes the batches with k mod world = rank, whole, so every convolution sees
the same batch whoever runs it, and the merged features are equal to the last bit for any number of processes.
"""

from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from eval.scoring.extractors import Extractor
from eval.scoring.files import NpzFile, write_npz
from eval.scoring.sources import Source
from eval.scoring.workers import each
from meanflow.errors import AssetError, NumericsError
from meanflow.logs import progress_bar
from meanflow.precision import exact_float32
from meanflow.training.processes import DistributedContext, run_on_rank0


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
    """{layer: (N, D) float32} in sample order on process 0, None on the others.

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
            # The processes keep pace with each other: one's batch stands for a batch of each.
            bar.update(min(count * ctx.world, source.n - bar.n))
    ctx.barrier()
    if not ctx.is_main:
        return None
    return _merge(work, pieces, layers)


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
        file = NpzFile(path)
        return all(len(file[name]) == piece[1] - piece[0] for name in file.names)
    except AssetError:
        return False


def _merge(work: Path, pieces: list[tuple[int, int]], layers: Sequence[str]) -> dict[str, Tensor]:
    files = [NpzFile(_path(work, piece)) for piece in pieces]
    merged = {layer: torch.from_numpy(np.concatenate([file[layer] for file in files])) for layer in layers}
    for layer, value in merged.items():
        bad = (~value.isfinite().all(dim=1)).nonzero().flatten()
        if len(bad):
            raise NumericsError(
                f"features {layer!r} of {len(bad)} samples (first: {int(bad[0])}) are not finite: "
                "the extractor's weights or arithmetic are broken"
            )
    return merged
