"""Batches in parallel on a CPU, each on one thread.

Convolutions and matrix products differ in their last digits with the number of threads that share one, so a batch
is always computed by a single thread, and a process with several cores works on several batches. The results then
do not depend on how many cores or processes there are, and it is no slower than sharing each operation.
"""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

T = TypeVar("T")
R = TypeVar("R")


def each(work: Callable[[T], R], items: Iterable[T], device: torch.device) -> Iterator[R]:
    """`work(item)` of all items: as they finish, on a CPU's threads; one after the other on a GPU.

    As many at once as PyTorch has threads (OMP_NUM_THREADS sets it, torchrun sets it to 1). An error, or closing
    the iterator, cancels what has not begun.
    """
    if device.type != "cpu":
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(torch.get_num_threads(), initializer=torch.set_num_threads, initargs=(1,))
    try:
        for future in as_completed([pool.submit(work, item) for item in items]):
            yield future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """A single thread for PyTorch's and numpy's arithmetic, for the same reason; as before afterwards.

    Where the features come from a GPU (`device`) they have no such promise to keep, and all threads are used.
    """
    if device.type != "cpu":
        yield
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1, user_api="blas"):
            yield
    finally:
        torch.set_num_threads(threads)
