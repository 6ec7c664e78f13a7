"""Arithmetic that is the same whoever calls: what is stored, compared or published must not depend on TF32."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def exact_float32() -> Iterator[None]:
    """Plain float32 in all threads: no TF32, no cuDNN search. What was set before is set again after.

    PyTorch's convolutions use TF32 unless told otherwise, and training sets what its recipe says; torch-fidelity and
    diffusers take what they find.
    """
    backends = torch.backends
    switches = [backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv]
    before = [switch.fp32_precision for switch in switches]
    benchmark = backends.cudnn.benchmark
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        backends.cudnn.benchmark = False
        yield
    finally:
        backends.cudnn.benchmark = benchmark
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
