"""Plain float32 regardless of the caller's settings, for numbers that are stored, compared or published."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Plain float32 in all threads: no TF32, no cuDNN search. The caller's settings return afterwards.

    PyTorch's convolutions use TF32 unless told otherwise, and training sets what its recipe says; torch-fidelity and
    diffusers take what they find. Newer versions (2.9) also have switches by operator. Both kinds are set, since
    reading the older kind, as PyTorch itself does, raises an error where they contradict each other.
    """
    backends = torch.backends
    operators = []
    if hasattr(backends.cudnn, "conv"):
        operators = [backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn]
        operators += [backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [operator.fp32_precision for operator in operators]
    tf32 = before[1] == "tf32" if operators else backends.cudnn.allow_tf32
    matmul, benchmark = torch.get_float32_matmul_precision(), backends.cudnn.benchmark
    try:
        _set("highest", False, False, operators, ["ieee"] * len(operators))
        yield
    finally:
        _set(matmul, tf32, benchmark, operators, before)


def _set(matmul: str, tf32: bool, benchmark: bool, operators: list, precisions: list[str]) -> None:
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = tf32, benchmark
    for operator, precision in zip(operators, precisions, strict=True):
        operator.fp32_precision = precision
