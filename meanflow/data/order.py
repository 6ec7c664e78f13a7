"""The order of training: an endless stream of epoch permutations, addressed by position.

Position p of the stream is image p mod n of epoch p // n. A batch is a range of positions, so the order is a
function of (n, seed) alone: it does not know how many processes share the batch, nor where a run was resumed.
"""

from functools import lru_cache

import torch

from meanflow.random import generator


@lru_cache(maxsize=2)  # a batch that crosses an epoch's border needs two
def _permutation(n: int, seed: int, epoch: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def epoch_order(n: int, seed: int, epoch: int) -> torch.Tensor:
    """The order in which `epoch` (0, 1, …) visits n images: a permutation, int64 (n,), on the CPU."""
    return _permutation(n, seed, epoch).clone()


def batch_indices(n: int, seed: int, start: int, count: int) -> torch.Tensor:
    """Image numbers at positions start … start + count − 1 of the stream, int64 (count,), on the CPU.

    Args:
        n: images in the data set, at least 1.
        seed: the run's seed.
        start: first position, at least 0: images seen before this batch.
        count: how many; may cross any number of epoch borders.
    """
    if n < 1 or start < 0 or count < 0:
        raise ValueError(f"batch_indices needs n ≥ 1, start ≥ 0, count ≥ 0, not {n}, {start}, {count}")
    end = start + count
    parts = [torch.empty(0, dtype=torch.int64)]
    for epoch in range(start // n, -(-end // n)):
        first = epoch * n
        parts.append(_permutation(n, seed, epoch)[max(start - first, 0) : min(end - first, n)])
    return torch.cat(parts)
