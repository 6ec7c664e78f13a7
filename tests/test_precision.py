"""Exact float32 leaves the switches as it found them."""

import pytest
import torch

from meanflow.precision import exact_float32


def switches():
    backends = torch.backends
    return (
        backends.cuda.matmul.fp32_precision,
        backends.cudnn.conv.fp32_precision,
        backends.cudnn.benchmark,
        torch.get_float32_matmul_precision(),
    )


@pytest.mark.parametrize("tf32", [True, False])
def test_exact_float32_is_undone(tf32):
    benchmark = torch.backends.cudnn.benchmark
    try:
        torch.set_float32_matmul_precision("high" if tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = tf32
        set_by_training = switches()
        with pytest.raises(KeyError), exact_float32():
            assert torch.backends.cuda.matmul.fp32_precision == "ieee"
            assert torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.backends.cudnn.benchmark
            raise KeyError
        assert switches() == set_by_training
        assert torch.backends.cudnn.allow_tf32 is tf32
    finally:
        torch.set_float32_matmul_precision("highest")
        torch.backends.cudnn.allow_tf32 = True
        torch.backends.cudnn.benchmark = benchmark
