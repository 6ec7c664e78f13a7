"""The distributed context: ranks, what they exchange, and the sum of their gradients.

There is no DistributedDataParallel here. Its reducer prepares itself in the wrapper's `forward`, which a JVP of the
network has to bypass; gradients then stay unsynchronised without any error (PyTorch issues 102197, 182661). Instead
hooks on the parameters themselves fire when a gradient is complete, however the network was called, and start the
all-reduce of a bucket while the backward pass goes on.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import _abort_process_group

from meanflow.errors import IncompleteError, UserError

BUCKET_BYTES = 25 * 2**20
# For how long processes wait for each other: everywhere but in steps one may be preparing data or scoring alone; in a
# step they differ by what compiling takes.
PATIENT_TIMEOUT, TIMEOUT = timedelta(hours=1), timedelta(minutes=10)
AFTER_RANK0_S = 3.0  # an error of rank 0 ends the others so much later
T = TypeVar("T")


@dataclass(frozen=True)
class DistributedContext:
    """This process's rank, the number of processes and the device. Without a launcher `world` is 1.

    group: for what is exchanged in every step, where waiting means that a process is lost; see TIMEOUT.
    """

    rank: int
    world: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def all_reduce(self, x: Tensor) -> Tensor:
        """Sum over processes, in place."""
        if self.world > 1:
            dist.all_reduce(x, group=self.group)
        return x

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true on any process; every process must call it."""
        return bool(self.all_reduce(torch.tensor(float(flag), device=self.device)) > 0)

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start_distributed(device: str | None = None) -> DistributedContext:
    """Connect to the processes that torchrun started (environment RANK, WORLD_SIZE, LOCAL_RANK), if it did.

    `device`: "cpu" or "cuda"; by default CUDA where there is one. Raises UserError if there is no such device, and
    IncompleteError if the other processes cannot be reached.
    """
    kind = device or ("cuda" if torch.cuda.is_available() else "cpu")
    world, local = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("LOCAL_RANK", 0))
    where = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
    if kind == "cuda" and local >= (gpus := torch.cuda.device_count()):
        raise UserError(
            f"--device cuda needs a GPU for each process, {local + 1} or more on this machine, and PyTorch sees {gpus}"
        )
    group = None
    if kind == "cuda":
        torch.cuda.set_device(where)
    if world > 1:
        try:
            if not dist.is_initialized():
                how = {"backend": "nccl", "device_id": where} if kind == "cuda" else {"backend": "gloo"}
                dist.init_process_group(**how, timeout=PATIENT_TIMEOUT)
            group = dist.new_group(timeout=TIMEOUT)
        except RuntimeError as error:
            raise IncompleteError(_not_connected(error)) from error
    return DistributedContext(int(os.environ.get("RANK", 0)), world, where, group)


def _not_connected(error: RuntimeError) -> str:
    """By default torchrun keeps one store for all restarts; processes then find addresses of those that have ended."""
    line = f"this process cannot connect to the others ({str(error).splitlines()[0]}); the same command continues"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        line += "; for torchrun's restarts set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
    return line


def stop_distributed() -> None:
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def leaving_distributed() -> Iterator[None]:
    """Destroys the process group that `start_distributed` made inside.

    After an error NCCL's is aborted instead: destroying it first waits for all queued work, with ranks that may be
    waiting for this one, and the error would appear half an hour later (PyTorch pull request 141510).
    """
    try:
        yield
    except BaseException:
        if dist.is_available() and dist.is_initialized() and dist.get_backend() == "nccl":
            _abort_process_group()
        stop_distributed()
        raise
    stop_distributed()


@contextmanager
def lost_ranks_explained(ctx: DistributedContext) -> Iterator[None]:
    """Raises IncompleteError where a collective fails because another process has ended."""
    try:
        yield
    except RuntimeError as error:  # gloo's are of this type
        if ctx.world == 1 or not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        raise IncompleteError(
            f"process {ctx.rank} lost another process, whose own message says why; the same command continues"
        ) from error


def gather(ctx: DistributedContext, value: Any) -> list:
    """`value` (picklable) of every process, in the order of their ranks, on each of them."""
    if ctx.world == 1:
        return [value]
    values = [None] * ctx.world
    dist.all_gather_object(values, value)
    return values


def assert_same_on_all_ranks(ctx: DistributedContext, value: dict, what: str) -> None:
    """Raises UserError, on every process, unless all of them hold an equal `value` (a flat dict)."""
    values = gather(ctx, value)
    for rank, other in enumerate(values):
        if other != values[0]:
            differing = sorted(k for k in {*other, *values[0]} if other.get(k) != values[0].get(k))
            raise UserError(
                f"process {rank} got other {what} than process 0 ({', '.join(differing)} differ): "
                "start all of them with the same command line"
            )


def run_on_rank0(ctx: DistributedContext, work: Callable[[], T]) -> T:
    """Run `work` on rank 0 while the others wait; returns its result, or raises its UserError, on all of them."""
    result, error = None, None
    if ctx.is_main:
        try:
            result = work()
        except UserError as caught:
            error = caught
    if ctx.world > 1:
        box = [result, error]
        dist.broadcast_object_list(box, src=0)
        result, error = box
    if error is not None:
        if not ctx.is_main:  # a launcher reports the process that ends first, and shows what rank 0 printed
            time.sleep(AFTER_RANK0_S)
        raise error
    return result


class GradientSum:
    """Sums gradients over processes, in buckets that overlap with the backward pass.

    Each parameter's `.grad` is a view into a flat bucket, in the parameter's own memory format. Use, per step:
    `zero()`, `backward()` of all micro-batches but the last, `arm()`, the last `backward()`, `finish()`.
    With one process it only zeroes gradients: to None, or, if they are to be `kept`, in place. A CUDA graph needs
    `kept` to accumulate micro-batches, since the memory that it returned itself is overwritten when it runs again.
    """

    def __init__(self, network: nn.Module, ctx: DistributedContext, kept: bool = False):
        self.world, self.group = ctx.world, ctx.group
        self.parameters = [p for p in network.parameters() if p.requires_grad]
        self.buckets: list[Tensor] = []
        if self.world == 1:
            if kept:
                for p in self.parameters:
                    p.grad = torch.zeros_like(p)
                self.buckets = [p.grad for p in self.parameters]
            return
        self.armed, self.works = False, []
        self.members: list[int] = []  # parameters in each bucket
        self.bucket_of: dict[Tensor, int] = {}
        group: list[Tensor] = []
        for parameter in reversed(self.parameters):  # gradients complete from the output backwards
            group.append(parameter)
            if sum(p.numel() * p.element_size() for p in group) >= BUCKET_BYTES:
                self._add_bucket(group)
                group = []
        if group:
            self._add_bucket(group)
        for parameter in self.parameters:
            parameter.register_post_accumulate_grad_hook(self._gradient_ready)

    def _add_bucket(self, group: list[Tensor]) -> None:
        bucket = torch.zeros(sum(p.numel() for p in group), dtype=group[0].dtype, device=group[0].device)
        offset = 0
        for p in group:
            p.grad = bucket[offset : offset + p.numel()].as_strided(p.shape, p.stride(), offset)
            offset += p.numel()
            self.bucket_of[p] = len(self.buckets)
        self.buckets.append(bucket)
        self.members.append(len(group))

    def zero(self) -> None:
        if self.buckets:
            torch._foreach_zero_(self.buckets)
        else:
            for p in self.parameters:
                p.grad = None

    def arm(self) -> None:
        """The next backward pass is the step's last: reduce each bucket when its gradients are complete."""
        if self.world > 1:
            self.armed, self.waiting, self.works = True, list(self.members), []

    def _gradient_ready(self, parameter: Tensor) -> None:
        if self.armed:
            self.waiting[self.bucket_of[parameter]] -= 1
            self._launch(until=self.waiting)

    def _launch(self, until: list[int]) -> None:
        """Start reductions strictly in bucket order, the same on every process."""
        while len(self.works) < len(self.buckets) and until[len(self.works)] == 0:
            self.works.append(dist.all_reduce(self.buckets[len(self.works)], group=self.group, async_op=True))

    def finish(self) -> None:
        """Wait for all reductions; parameters that had no gradient count as zero."""
        if self.world > 1:
            self._launch(until=[0] * len(self.buckets))
            for work in self.works:
                work.wait()
            self.armed = False
