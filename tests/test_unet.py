"""The U-net: its size and names, an independent plain implementation, derivatives, and what cannot be built."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from meanflow.jvp import value_and_tangent
from meanflow.objectives.meanflow import LossConfig, meanflow_loss
from unet import UNet, UNetConfig
from unet.embedding import CONDITIONINGS, SinusoidalEmbedding

PAPER = UNetConfig("unet", 32, 3, 128, (2, 2, 2), 4, (16,), 0.2, "t,t-r", 6, 0)
SMALL = UNetConfig("unet", 8, 3, 8, (1, 2), 1, (4,), 0.0, "t,t-r", 6, 0)


def small(config=SMALL, noise=0.1):
    torch.manual_seed(0)
    net = UNet(config).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.add_(noise * torch.randn_like(p))
    return net


def inputs(config=SMALL, n=3):
    g = torch.Generator().manual_seed(1)
    z = torch.randn(n, config.channels, config.image_size, config.image_size, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64)
    return z, t, t * torch.rand(n, generator=g, dtype=torch.float64)


def test_parameter_count_of_the_paper():
    with torch.device("meta"):
        net = UNet(PAPER)
        plain = UNet(replace(PAPER, augment_labels=0))
    assert sum(p.numel() for p in net.parameters()) == 55_932_419  # 55.93 M with augmentation labels
    assert sum(p.numel() for p in plain.parameters()) == 55_932_419 - 6 * 512
    assert [name for name, _ in net.named_buffers() if name in net.state_dict()] == []


def test_initialisation():
    torch.manual_seed(0)
    net = UNet(replace(PAPER, multipliers=(1, 1), width=64, attention=(16,), blocks=1))
    block = net.enc["16x16_block0"]

    def bound(weight, scale):
        receptive = weight[0, 0].numel()
        return scale * math.sqrt(6 / ((weight.shape[0] + weight.shape[1]) * receptive))

    for weight, scale in (
        (block.conv0.weight, 1.0),
        (block.conv1.weight, 1e-5),
        (block.qkv.weight, math.sqrt(0.2)),
        (block.proj.weight, 1e-5),
        (net.dec["32x32_aux_conv"].weight, 1e-5),
        (net.enc["16x16_down"].skip.weight, 1.0),
    ):
        assert weight.abs().max().item() == pytest.approx(bound(weight, scale), rel=0.01)
        assert weight.std().item() == pytest.approx(bound(weight, scale) / math.sqrt(3), rel=0.05)
    assert all(p.abs().max() == 0 for name, p in net.named_parameters() if name.endswith("bias"))
    z, t, r = inputs(replace(PAPER, multipliers=(1, 1)), n=2)
    assert net(z.float(), t.float(), r.float()).abs().max() < 1e-3  # u starts near zero


def test_embedding_is_sines_then_cosines():
    t = torch.tensor([0.3, 1.0])
    out = SinusoidalEmbedding(256)(t)
    for b, i in itertools.product(range(2), (0, 1, 64, 127)):
        angle = t[b].item() * 10000 ** (-i / 127)
        assert out[b, i].item() == pytest.approx(math.sin(angle), abs=1e-6)
        assert out[b, 128 + i].item() == pytest.approx(math.cos(angle), abs=1e-6)


def plain_unet(w, config, z, t, r, labels):
    """The network from the reference's description and the parameter names alone; no module of ours."""

    def norm(x, name):
        groups = min(32, x.shape[1] // 4)
        y = x.reshape(x.shape[0], groups, -1)
        y = (y - y.mean(2, keepdim=True)) / torch.sqrt(y.var(2, unbiased=False, keepdim=True) + 1e-6)
        return y.reshape(x.shape) * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def conv(x, name):
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)

    def resample(x, name):
        f = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype) / 8
        f = torch.outer(f, f)[None, None]
        b, c, h, v = x.shape
        if name.endswith("_down"):
            return F.conv2d(x.reshape(b * c, 1, h, v), f, padding=1)[:, :, ::2, ::2].reshape(b, c, h // 2, v // 2)
        if name.endswith("_up"):
            wide = torch.zeros(b * c, 1, 2 * h, 2 * v, dtype=x.dtype)
            wide[:, :, ::2, ::2] = x.reshape(b * c, 1, h, v)
            return F.conv2d(F.pad(wide, (2, 1, 2, 1)), 4 * f).reshape(b, c, 2 * h, 2 * v)
        return x

    def block(x, name):
        h = conv(resample(F.silu(norm(x, f"{name}.norm0")), name), f"{name}.conv0")
        h = h + (emb @ w[f"{name}.affine.weight"].T + w[f"{name}.affine.bias"])[:, :, None, None]
        h = conv(F.silu(norm(h, f"{name}.norm1")), f"{name}.conv1")
        skip = conv(resample(x, name), f"{name}.skip") if f"{name}.skip.weight" in w else x
        x = (h + skip) * 0.5**0.5
        if f"{name}.qkv.weight" in w:
            b, c, height, width = x.shape
            q, k, v = conv(norm(x, f"{name}.norm2"), f"{name}.qkv").reshape(b, 3, c, -1).unbind(1)
            weights = torch.softmax(torch.einsum("bcq,bck->bqk", q, k) / c**0.5, dim=2)
            a = torch.einsum("bqk,bck->bcq", weights, v).reshape(b, c, height, width)
            x = (conv(a, f"{name}.proj") + x) * 0.5**0.5
        return x

    dim = 2 * config.width
    freqs = 10000 ** (-torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - 1))
    parts = []
    for name in config.conditioning.split(","):
        angle = {"t": t, "r": r, "t-r": t - r}[name][:, None] * freqs
        parts += [angle.sin(), angle.cos()]
    emb = torch.cat(parts, 1) + labels @ w["map_augment.weight"].T
    for i in range(2):
        emb = F.silu(emb @ w[f"map_layer{i}.weight"].T + w[f"map_layer{i}.bias"])
    names = list(dict.fromkeys(".".join(key.split(".")[:2]) for key in w if key.startswith(("enc", "dec"))))
    x, skips = z, []
    for name in names:
        if name.endswith("_conv") and name.startswith("enc"):
            x = conv(x, name)
        elif name.startswith("enc"):
            x = block(x, name)
        elif name.endswith("aux_norm"):
            x = F.silu(norm(x, name))
        elif name.endswith("aux_conv"):
            return conv(x, name)
        else:
            x = block(torch.cat([x, skips.pop()], 1) if "_block" in name else x, name)
        if name.startswith("enc"):
            skips.append(x)


@pytest.mark.parametrize(
    "config",
    [
        SMALL,
        replace(SMALL, conditioning="t,r,t-r"),
        replace(SMALL, image_size=12, multipliers=(1, 2, 1), attention=(6,)),
    ],
)
def test_equals_an_independent_plain_implementation(config):
    net, (z, t, r) = small(config), inputs(config)
    labels = torch.randn(3, 6, dtype=torch.float64)
    net.map_time.frequencies = net.map_time.frequencies.double()
    frequencies = torch.arange(config.width, dtype=torch.float64)
    net.map_time.frequencies = 10000 ** (-frequencies / (config.width - 1))
    expected = plain_unet(net.state_dict(), config, z, t, r, labels)
    assert torch.allclose(net(z, t, r, augment_labels=labels), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_jvp_against_central_differences(conditioning):
    from meanflow.jvp import value_and_tangent

    config = replace(SMALL, conditioning=conditioning)
    net, (z, t, r) = small(config), inputs(config)
    dz = torch.randn_like(z)
    for dt, dr in ((1.0, 0.0), (0.0, 1.0), (1.0, 1.0)):
        _, tangent = value_and_tangent(net, z, t, r, (dz, dt, dr), 3, "dual", {})
        h = 1e-5
        plus, minus = (net(z + s * h * dz, t + s * h * dt, r + s * h * dr) for s in (1, -1))
        assert torch.allclose(tangent, (plus - minus) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_what_the_network_is_told_of_time(conditioning):
    net, (z, t, r) = small(replace(SMALL, conditioning=conditioning)), inputs()
    same, shifted = net(z, t, r), net(z, t + 0.1, r + 0.1)
    assert torch.equal(same, net(z, t, r))
    assert torch.allclose(same, shifted) == (conditioning == "t-r")
    assert not torch.allclose(same, net(z, t, r * 0.5))


def test_label_inputs():
    net, (z, t, r) = small(replace(SMALL, classes=4)), inputs()
    labels = torch.tensor([0, 1, 3])
    assert not torch.allclose(net(z, t, r, class_labels=labels), net(z, t, r, class_labels=labels.flip(0)))
    assert torch.equal(net(z, t, r), net(z, t, r, class_labels=torch.full((3,), 4)))  # none is the last row
    assert torch.equal(net(z, t, r), net(z, t, r, augment_labels=torch.zeros(3, 6, dtype=torch.float64)))


def test_dropout_only_in_training():
    net, (z, t, r) = small(replace(SMALL, dropout=0.5)), inputs()
    assert torch.equal(net(z, t, r), net(z, t, r))
    net.train()
    assert not torch.equal(net(z, t, r), net(z, t, r))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": 30, "multipliers": (1, 1, 1)}, "cannot be halved 2 times"),
        ({"attention": (16,)}, "attention"),
        ({"width": 7}, "width"),
        ({"width": 0}, "width"),
        ({"multipliers": ()}, "multipliers"),
        ({"multipliers": (1, 0)}, "multipliers"),
        ({"blocks": 0}, "blocks"),
        ({"dropout": 1.0}, "dropout"),
        ({"dropout": -0.1}, "dropout"),
        ({"conditioning": "t, r"}, "conditioning"),
        ({"classes": -1}, "classes"),
        ({"channels": 0}, "channels"),
    ],
)
def test_what_cannot_be_built_names_its_field(change, message):
    with pytest.raises(ValueError, match=message):
        replace(SMALL, **change)


@pytest.mark.parametrize(("width", "channels", "size"), [(2, 1, 4), (6, 2, 6), (10, 3, 20)])
def test_odd_widths_and_sizes_build_and_run(width, channels, size):
    config = UNetConfig("unet", size, channels, width, (1, 3), 1, (), 0.1, "t,r", 0, 0)
    z, t, r = inputs(config)
    assert UNet(config).double()(z, t, r).shape == z.shape


def test_compiled_and_eager_gradients_of_the_loss_are_the_same():
    """In one graph, with torch.func.jvp inside. `aot_eager` traces all of it and runs the graph as it stands."""
    torch.manual_seed(0)
    net = UNet(UNetConfig("unet", 4, 2, 4, (1,), 1, (), 0.0, "t,t-r", 0, 0))
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.1 * torch.randn_like(p))
    x, eps = torch.randn(2, 6, 2, 4, 4)
    t = torch.rand(6)
    r = torch.where(torch.arange(6) < 4, t / 2, t)

    def gradient(derivative):
        net.zero_grad()
        config = LossConfig(0.75, 1e-3, "(v, 0, 1)", "func")
        meanflow_loss(net, x, eps, t, r, config, derivative=derivative).mean.backward()
        return torch.cat([p.grad.flatten() for p in net.parameters()])

    compiled = torch.compile(value_and_tangent, backend="aot_eager", fullgraph=True, dynamic=False)
    eager, traced = gradient(value_and_tangent), gradient(compiled)
    assert (eager - traced).norm() <= 1e-4 * eager.norm()
