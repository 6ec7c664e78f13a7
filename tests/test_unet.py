"""The U-net of the paper: its number of parameters and its initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from method_helpers import batch

from unet import UNet, UNetConfig

PAPER = UNetConfig("unet", 32, 3, 128, (2, 2, 2), 4, (16,), 0.2, augment_labels=6)


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        net, without_labels = UNet(PAPER), UNet(replace(PAPER, augment_labels=0))
    assert sum(p.numel() for p in net.parameters()) == 55_932_419  # 55.93 M with augmentation labels
    assert sum(p.numel() for p in without_labels.parameters()) == 55_932_419 - 6 * 512
    assert net.state_dict().keys() == dict(net.named_parameters()).keys()  # no buffers in checkpoints


def test_initialisation():
    torch.manual_seed(0)
    config = replace(PAPER, multipliers=(1, 1), width=64, blocks=1)
    net = UNet(config)
    block = net.enc["16x16_block0"]
    for weight, scale in (
        (block.conv0.weight, 1.0),
        (block.conv1.weight, 1e-5),
        (block.qkv.weight, math.sqrt(0.2)),
        (block.proj.weight, 1e-5),
        (net.dec["32x32_aux_conv"].weight, 1e-5),
        (net.enc["16x16_down"].skip.weight, 1.0),
    ):
        fan_in, fan_out = weight[0].numel(), weight[:, 0].numel()
        bound = scale * math.sqrt(6 / (fan_in + fan_out))  # Xavier, uniform
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.01)
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not any(p.any() for name, p in net.named_parameters() if name.endswith("bias"))
    b = batch(config, torch.float32, n=2)
    assert net(b.x, b.r, b.t).abs().max() < 1e-3  # u starts near zero
