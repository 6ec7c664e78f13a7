"""The networks: against their plain implementation, their derivatives, their inputs, and what cannot be built."""

from dataclasses import replace

import pytest
import torch
from method_helpers import (
    DIT,
    UNET,
    all_backbones,
    assert_close,
    backbones,
    batch,
    loss_of,
    precisions,
    small,
    with_gradient,
)
from plain_networks import plain_network

from meanflow.jvp import METHODS, checkpointed, take_jvp
from unet import UNet
from unet.embedding import CONDITIONINGS


@precisions
@pytest.mark.parametrize(
    "config",
    [
        *(replace(config, conditioning=conditioning) for config in (UNET, DIT) for conditioning in CONDITIONINGS),
        replace(UNET, image_size=12, multipliers=(1, 2, 1), attention=(6,)),
        replace(DIT, patch=4, heads=1, depth=3, channels=2),
    ],
    ids=lambda config: f"{config.kind} {config.conditioning} {config.image_size}",
)
def test_equals_a_plain_implementation(config, dtype, tolerance):
    net, b = small(config, dtype), batch(config, dtype)
    expected = plain_network(config)(net.state_dict(), config, b.x, b.r, b.t, **b.cond)
    assert_close([net(b.x, b.r, b.t, **b.cond)], [expected], tolerance)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@backbones
def test_derivative_equals_central_differences(config, conditioning, method):
    net, b, h = small(replace(config, conditioning=conditioning)), batch(config), 1e-5
    z, v, rows = b.x, b.eps, b.r != b.t
    for dr, dt in ((0.0, 1.0), (1.0, 0.0), (1.0, 1.0)):
        value, dudt = take_jvp(method)(net, (z, b.r, b.t), (v, dr, dt), rows=rows, **b.cond)
        with torch.no_grad():
            ahead, behind = (net(z + s * v, b.r + s * dr, b.t + s * dt, **b.cond) for s in (h, -h))
        assert torch.allclose(value, net(z, b.r, b.t, **b.cond), atol=1e-12)
        assert torch.allclose(dudt[rows], ((ahead - behind) / (2 * h))[rows], rtol=1e-6, atol=1e-7)
        assert not dudt[~rows].any() and not dudt.requires_grad


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
@backbones
def test_the_network_sees_exactly_the_times_of_its_conditioning(config, conditioning):
    net, b = small(replace(config, conditioning=conditioning)), batch(config)
    out, shifted, longer = (net(b.x, b.r + dr, b.t + dt) for dr, dt in ((0, 0), (0.1, 0.1), (-0.1, 0)))
    assert torch.allclose(out, shifted) == (conditioning == "t-r")
    assert not torch.allclose(out, longer)


@all_backbones
def test_no_label_is_the_null_class(config):
    """And no augmentation label is zeros."""
    net, b = small(config), batch(config)
    null = {"class_labels": torch.full((8,), 10)}
    if config is UNET:
        null["augment_labels"] = torch.zeros(8, 6, dtype=torch.float64)
    assert torch.equal(net(b.x, b.r, b.t), net(b.x, b.r, b.t, **null))
    for key, labels in b.cond.items():
        assert not torch.allclose(net(b.x, b.r, b.t), net(b.x, b.r, b.t, **{key: labels}))
    assert small(replace(config, classes=0))(b.x, b.r, b.t).shape == b.x.shape


def test_dropout_only_in_training():
    net, b = small(replace(UNET, dropout=0.5)), batch()
    assert not torch.equal(net(b.x, b.r, b.t), net(b.x, b.r, b.t))
    net.eval()
    assert torch.equal(net(b.x, b.r, b.t), net(b.x, b.r, b.t))


@all_backbones
def test_checkpointed_blocks_give_the_same_and_save_less(config):
    net, b, rows = small(config), batch(config), []

    def run_block(block, x, *inputs):
        return checkpointed(lambda x, *inputs: rows.append(x.rows) or block(x, *inputs), x, *inputs)

    def measured(**how):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.numel()) or x, lambda x: x):
            loss = loss_of(lambda *args, **cond: net(*args, **cond, **how), b)
        return with_gradient(net, loss), sum(sizes)

    (kept, size), (again, smaller) = measured(), measured(run_block=run_block)
    assert torch.equal(kept[0], again[0]) and torch.allclose(kept[1], again[1], rtol=1e-12, atol=1e-14)
    assert smaller < 0.6 * size
    blocks = len(rows) // 2
    assert rows == [5] * blocks + [0] * blocks  # tangents are computed once


@pytest.mark.parametrize(("width", "channels", "size"), [(2, 1, 4), (6, 2, 6), (10, 3, 20)])
def test_odd_widths_and_sizes_build_and_run(width, channels, size):
    config = replace(UNET, image_size=size, channels=channels, width=width, multipliers=(1, 3), attention=())
    b = batch(config)
    assert UNet(config).double()(b.x, b.r, b.t).shape == b.x.shape
