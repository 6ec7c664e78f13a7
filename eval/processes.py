"""Several processes of one evaluation: what they tell each other. Features themselves travel through files."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from meanflow.errors import UserError
from meanflow.training.distributed import Processes

T = TypeVar("T")


def gather(processes: Processes, value: Any) -> list:
    """`value` (picklable) of every process, in the order of their ranks, on each of them."""
    if processes.world == 1:
        return [value]
    values = [None] * processes.world
    dist.all_gather_object(values, value)
    return values


def agree(processes: Processes, value: dict, what: str) -> None:
    """Raises UserError, on every process, unless all of them hold an equal `value` (a flat dict)."""
    values = gather(processes, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            differing = sorted(k for k in {*other, *values[0]} if other.get(k) != values[0].get(k))
            raise UserError(
                f"process {rank} got other {what} than process 0 ({', '.join(differing)} differ): "
                "start all of them with one command line"
            )


def on_main(processes: Processes, work: Callable[[], T]) -> T:
    """Run `work` on process 0 while the others wait; its result, or its UserError, on all of them."""
    result, error = None, None
    if processes.is_main:
        try:
            result = work()
        except UserError as caught:
            error = caught
    if processes.world > 1:
        box = [result, error]
        dist.broadcast_object_list(box, src=0)
        result, error = box
    if error is not None:
        raise error
    return result
