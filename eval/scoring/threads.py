"""Arithmetic in threads: with the same digits on any number of cores, and left at once when Ctrl-C is pressed.

Convolutions and matrix products differ in their last digits with the number of threads that work on one. So on a CPU
each piece of work is done by a single thread, and a process with several cores works on several pieces. It is no slower
than sharing each operation.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from queue import Empty, SimpleQueue
from typing import TypeVar

import torch
from threadpoolctl import threadpool_limits

from meanflow.errors import EXIT_INTERRUPTED

NAME = "meanflow-arithmetic"
T, R = TypeVar("T"), TypeVar("R")


def each(work: Callable[[T], R], items: Sequence[T], device: torch.device) -> Iterator[R]:
    """`work(item)` of all items: as they finish, on a CPU's threads; one after the other on a GPU.

    As many at once as PyTorch has threads (OMP_NUM_THREADS sets it, torchrun sets it to 1). After an error nothing new
    is begun; Ctrl-C, or closing the iterator, does not even wait for work that has begun.
    """
    if device.type != "cpu":
        yield from map(work, items)
        return
    waiting: SimpleQueue = SimpleQueue()
    done: SimpleQueue = SimpleQueue()
    stopped = threading.Event()
    for item in items:
        waiting.put(item)

    def serve() -> None:
        torch.set_num_threads(1)  # of this thread alone
        while not stopped.is_set():
            try:
                item = waiting.get_nowait()
            except Empty:
                return
            try:
                done.put((work(item), None))
            except BaseException as error:  # raised in the caller's thread, below
                stopped.set()
                done.put((None, error))

    count = min(torch.get_num_threads(), len(items))
    threads = [threading.Thread(target=serve, daemon=True, name=NAME) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        left = len(items)
        while left:
            try:
                result, error = done.get(timeout=0.5)  # a signal may reach another thread, and not end this waiting
            except Empty:
                continue
            if error is not None:
                raise error
            left -= 1
            yield result
    except (KeyboardInterrupt, GeneratorExit):
        stopped.set()
        exit_at_once(EXIT_INTERRUPTED)
        raise
    except BaseException:
        for thread in threads:
            thread.join()
        raise


def interruptible(work: Callable[[], R], device: torch.device) -> R:
    """`work()` in a thread, so that Ctrl-C is answered at once: numpy would only hear it after its call.

    On a single core, for reproducible digits; where features come from a GPU (`device`), on all of them.
    """

    def alone(_: None) -> R:
        if device.type != "cpu":
            return work()
        with threadpool_limits(1, user_api="blas"):
            return work()

    (result,) = each(alone, [None], torch.device("cpu"))
    return result


def exit_at_once(code: int) -> None:
    """At its end the process ends with `code` at once if a thread of `each` is still computing.

    The usual way unloads numpy's libraries while they are in use, which crashes. The last call counts.
    """
    atexit.register(_exit_if_computing, code)


def _exit_if_computing(code: int) -> None:
    if any(thread.name == NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
