"""Exact float32 leaves the switches as it found them."""

import pytest
import torch

from meanflow.precision import exact_float32


def switches():
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return torch.get_float32_matmul_precision(), cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark


@pytest.fixture
def _restored():
    matmul, _, cudnn, benchmark = switches()
    yield
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = cudnn, benchmark


@pytest.mark.usefixtures("_restored")
@pytest.mark.parametrize("tf32", [True, False])
def test_exact_float32_is_undone(tf32):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = tf32
    set_by_training = switches()
    assert set_by_training[1:] == (tf32, tf32, tf32)
    with pytest.raises(KeyError), exact_float32():
        if hasattr(torch.backends.cuda.matmul, "fp32_precision"):
            assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"
            assert not torch.backends.cudnn.benchmark
        else:  # before PyTorch 2.9
            assert switches() == ("highest", False, False, False)
        raise KeyError
    assert switches() == set_by_training
