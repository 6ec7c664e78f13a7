"""Exact float32 leaves the switches as it found them, whichever kind of switch set them."""

import pytest
import torch

from meanflow.precision import exact_float32

BACKENDS = torch.backends
by_operator = pytest.mark.skipif(not hasattr(BACKENDS.cudnn, "conv"), reason="this PyTorch has no switch by operator")


def older_switches():
    """Reading them raises where those by operator contradict them."""
    return torch.get_float32_matmul_precision(), BACKENDS.cuda.matmul.allow_tf32, BACKENDS.cudnn.allow_tf32


def newer_switches():
    if not hasattr(BACKENDS.cudnn, "conv"):
        return []
    operators = (
        BACKENDS.cuda.matmul,
        BACKENDS.cudnn.conv,
        BACKENDS.cudnn.rnn,
        BACKENDS.mkldnn.matmul,
        BACKENDS.mkldnn.conv,
    )
    return [operator.fp32_precision for operator in operators]


@pytest.fixture(autouse=True)
def _restored():
    """These switches are the process's; other tests run in it too."""
    matmul, newer, benchmark = torch.get_float32_matmul_precision(), newer_switches(), BACKENDS.cudnn.benchmark
    yield
    torch.set_float32_matmul_precision(matmul)
    BACKENDS.cudnn.allow_tf32, BACKENDS.cudnn.benchmark = True, benchmark
    if newer:
        BACKENDS.cuda.matmul.fp32_precision, BACKENDS.mkldnn.matmul.fp32_precision = newer[0], newer[3]


@pytest.mark.parametrize("tf32", [True, False])
def test_exact_float32_is_undone(tf32):
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    BACKENDS.cudnn.allow_tf32 = BACKENDS.cudnn.benchmark = tf32
    before = older_switches(), newer_switches(), BACKENDS.cudnn.benchmark
    with pytest.raises(KeyError), exact_float32():
        assert older_switches() == ("highest", False, False) and not BACKENDS.cudnn.benchmark
        assert set(newer_switches()) <= {"ieee"}
        raise KeyError
    assert (older_switches(), newer_switches(), BACKENDS.cudnn.benchmark) == before


@by_operator
def test_switches_by_operator_are_left_as_they_were():
    BACKENDS.cudnn.conv.fp32_precision = "ieee"  # cuDNN's other switch, of RNNs, still says tf32
    before = newer_switches()
    with exact_float32():
        assert older_switches() == ("highest", False, False)
    assert newer_switches() == before
