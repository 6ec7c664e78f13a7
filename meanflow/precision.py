"""Arithmetic that does not depend on what the caller set: what is stored, compared or published uses no TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Plain float32 in all threads: no TF32, no cuDNN search. The caller's settings return afterwards.

    PyTorch's convolutions use TF32 by default, training sets what its recipe says, and torch-fidelity and diffusers
    set nothing.
    """
    switches = [*_precision_switches(), (torch.backends.cudnn, "benchmark", False)]
    before = [getattr(part, name) for part, name, _ in switches]
    try:
        for part, name, exact in switches:
            setattr(part, name, exact)
        yield
    finally:
        for (part, name, _), value in zip(switches, before, strict=True):
            setattr(part, name, value)


def _precision_switches() -> list[tuple[object, str, str | bool]]:
    """(where, attribute, its value for plain float32)."""
    cuda, cudnn, mkldnn = torch.backends.cuda, torch.backends.cudnn, torch.backends.mkldnn
    if not hasattr(cuda.matmul, "fp32_precision"):  # before PyTorch 2.9
        return [(cuda.matmul, "allow_tf32", False), (cudnn, "allow_tf32", False)]
    return [(part, "fp32_precision", "ieee") for part in (cuda.matmul, cudnn.conv, mkldnn.matmul, mkldnn.conv)]
