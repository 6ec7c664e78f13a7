"""EDM augmentation against its geometry: exact cases, and analytic functions to interpolation error."""

import math

import numpy as np
import pytest
import torch
from running import tiny_config

from meanflow.data import Dataset
from meanflow.data.augment import DELAY, SYM6, AugmentDraw, _from_parameters, apply, draw
from meanflow.random import generator
from meanflow.training.batches import ImageFeed


def make_draw(n=1, flip=0.0, a=0.0, b=0.0, theta=0.0, x=0.0, y=0.0, warped=True, anisotropy="appendix") -> AugmentDraw:
    """n equal draws with chosen parameters."""
    normal = torch.tensor([[a, b, x, y]], dtype=torch.float32).expand(n, 4)
    flips, theta = (torch.full((n,), float(value)) for value in (flip, theta))
    return _from_parameters(flips, normal, theta, torch.full((n,), warped), anisotropy)


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test images")) * 2 - 1


def ramp(x, y):
    """Linear, which the filter reproduces exactly."""
    return (0.3 * x - 0.5 * y) / 30


def bump(x, y):
    """A smooth, lopsided function: an elongated, tilted, off-centre Gaussian, 3 to 6 pixels wide."""
    x, y = x - 2.0, y + 1.5
    u, v = (x + 0.5 * y) / 6, (y - 0.3 * x) / 3.5
    return torch.exp(-(u**2 + v**2) / 2)


def test_filter_is_an_orthonormal_symlet_with_six_vanishing_moments():
    h = torch.tensor(SYM6, dtype=torch.float64)
    taps = torch.arange(12, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    for lag in range(6):
        assert (h[2 * lag :] * h[: 12 - 2 * lag]).sum().item() == pytest.approx(float(lag == 0), abs=1e-11)
    for moment in range(6):
        assert ((-1) ** taps * ((taps - 5.5) / 5.5) ** moment * h).sum().item() == pytest.approx(0, abs=1e-11)
    # Among the filters with these properties the symlet is the least skewed: energy sits at its middle.
    assert 5 < DELAY < 6 and (h[3:9] ** 2).sum() > 0.98


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 8, 8), (2, 2, 9, 14), (1, 1, 2, 3)])
def test_identity_and_flip_through_the_warp(shape):
    images = noise(*shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # does not reach the warp
        assert torch.allclose(apply(images, make_draw(shape[0]))[0], images, atol=1e-6, rtol=0)
    assert torch.allclose(apply(images, make_draw(shape[0], flip=1))[0], images.flip(-1), atol=1e-6, rtol=0)


def test_without_a_warp_images_are_equal_to_the_bit():
    images = noise(4, 3, 16, 12)
    out, labels = apply(images, draw(4, 0.0, False, "official", generator(0, "t")))
    assert torch.equal(out, images) and out.data_ptr() != images.data_ptr()
    assert torch.equal(labels, torch.zeros(4, 6))
    out, labels = apply(images, make_draw(4, flip=1, warped=False))
    assert torch.equal(out, images.flip(-1)) and torch.equal(labels[:, 0], torch.ones(4))


@pytest.mark.parametrize("height, width, right, down", [
    (32, 32, 5, 0), (32, 32, 0, -7), (16, 32, -3, 4), (8, 8, 3, -2),
    (8, 8, 11, -9), (8, 16, -30, 45), (4, 4, 17, 17),  # reflected more than once
])  # fmt: skip
def test_whole_pixel_shift(height, width, right, down):
    images = noise(2, 3, height, width)
    out, _ = apply(images, make_draw(2, x=8 * right / width, y=8 * down / height))
    padded = np.pad(images, ((0, 0), (0, 0), (50, 50), (50, 50)), "reflect")
    want = padded[:, :, 50 - down : 50 - down + height, 50 - right : 50 - right + width]
    assert np.allclose(out, want, atol=1e-5)


@pytest.mark.parametrize("anisotropy, sense", [("appendix", 1), ("official", -1)])
@pytest.mark.parametrize("function, tolerance", [(ramp, 2e-6), (bump, 6e-3)])
@pytest.mark.parametrize("a, b, theta, x, y", [
    (1.0, 0, 0, 0, 0), (-1.5, 0, 0, 0, 0), (2.0, 0, 0, 0, 0), (0, 0, 0, 0.33, -0.47), (-0.8, 1.0, 0.7, 0.6, -0.9),
    (0, 1.0, 0, 0, 0), (0, 1.0, math.pi / 2, 0, 0), (0, 1.5, 0.6, 0, 0), (0, -1.2, 2.5, 0, 0), (0, 0.8, -2.0, 0, 0),
])  # fmt: skip
def test_flip_then_scale_then_anisotropy_then_shift(a, b, theta, x, y, function, tolerance, anisotropy, sense):
    """The stretch lies along θ or, as the official release has it, along −θ, with the same labels."""
    offset = torch.arange(48, dtype=torch.float64) - 23.5  # pixels from the centre
    py, px = torch.meshgrid(offset, offset, indexing="ij")
    image = function(px, py)
    warp = make_draw(flip=1, a=a, b=b, theta=theta, x=x, y=y, anisotropy=anisotropy)
    out, labels = apply(image.float()[None, None], warp)
    qx, qy = px - 6 * x, py - 6 * y  # undo the shift by eighths of the width first …
    cos, sin, s = math.cos(sense * theta), math.sin(sense * theta), 2 ** (0.2 * b)
    along, across = (cos * qx + sin * qy) / s, (cos * qy - sin * qx) * s  # … then the anisotropy …
    qx, qy = cos * along - sin * across, sin * along + cos * across
    want = function(-qx / 2 ** (0.2 * a), qy / 2 ** (0.2 * a))  # … then the scale, and the flip last
    inner = (slice(16, 32), slice(16, 32))
    assert (out[0, 0].double() - want)[inner].abs().max() < tolerance
    assert (want - image.flip(-1))[inner].abs().max() > 0.015  # the tolerance can tell them apart
    assert labels[0].tolist() == pytest.approx([1, a, b * math.cos(theta), b * math.sin(theta), x, y], abs=1e-6)


def test_border_is_a_mirror():
    """A periodic function that is even about the outer pixels has no border: the warp is right everywhere."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")

    def wave(x, y):
        return torch.cos(2 * math.pi / 31 * x) * torch.cos(math.pi / 31 * y)

    out, _ = apply(wave(x, y)[None, None], make_draw(a=-3.0, x=1.3, y=-2.1))  # shrunk: all borders show
    c, s = 15.5, 2**-0.6
    want = wave((x - c - 1.3 * 4) / s + c, (y - c + 2.1 * 4) / s + c)
    assert (out[0, 0] - want).abs().max() < 1e-2
    extreme, _ = apply(noise(3, 1, 8, 8), make_draw(3, a=-6.0, b=6.0, theta=1.0, x=5.0, y=-5.0))
    assert extreme.isfinite().all() and extreme.abs().max() < 2


def test_probabilities_and_distributions():
    n, p = 40_000, 0.12
    many = draw(n, p, True, "appendix", generator(0, "many"))
    flip, a, cos, sin, x, y = many.labels.T
    assert set(flip.tolist()) == {0.0, 1.0} and flip.mean().item() == pytest.approx(0.5, abs=0.012)
    drawn = torch.stack([a != 0, (cos != 0) | (sin != 0), x != 0], 1).float()
    assert drawn.mean(0).tolist() == pytest.approx([p] * 3, abs=0.008)
    assert torch.equal(x != 0, y != 0)  # one coin for both
    assert torch.equal(many.warped, drawn.any(1))
    assert many.warped.float().mean().item() == pytest.approx(1 - (1 - p) ** 3, abs=0.01)  # independent
    assert (drawn[:, 0] * drawn[:, 1]).mean().item() == pytest.approx(p * p, abs=0.004)
    for value in (a[a != 0], x[x != 0], y[y != 0]):
        assert value.mean().item() == pytest.approx(0, abs=0.05) and value.std().item() == pytest.approx(1, abs=0.05)
    strength, angle = torch.hypot(cos, sin)[drawn[:, 1] > 0], torch.atan2(sin, cos)[drawn[:, 1] > 0]
    assert (strength**2).mean().item() == pytest.approx(1, abs=0.08)
    assert (torch.histc(angle, 4, -math.pi, math.pi) / len(angle)).tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_the_official_anisotropy_on_the_same_draws():
    """Half of the axes are turned, the other way; the others stay upright. All else is equal."""
    old, new = (draw(4000, 0.5, True, kind, generator(1, "kinds")) for kind in ("appendix", "official"))
    a, b, sin = new.labels[:, 1:4].double().T  # b wherever sin θ = 0
    upright = sin == 0
    assert upright[old.labels[:, 3] != 0].double().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(new.labels[:, [0, 1, 4, 5]], old.labels[:, [0, 1, 4, 5]])
    assert torch.equal(new.warped, old.warped) and torch.equal(new.labels[~upright], old.labels[~upright])
    mirror = torch.tensor([[1.0, -1.0], [-1.0, 1.0]], dtype=torch.float64)  # diag(1, −1) on both sides
    assert torch.allclose(new.inverse[~upright], old.inverse[~upright] * mirror, rtol=1e-12)
    assert torch.allclose(b[upright].abs(), old.labels[upright, 2:4].double().norm(dim=1), rtol=1e-6)
    diagonal = torch.diag_embed(torch.stack([2 ** (-0.2 * (a + b)), 2 ** (-0.2 * (a - b))], 1))
    assert torch.allclose(new.inverse[upright], diagonal[upright], rtol=1e-12)
    assert torch.equal(new.inverse[~new.warped], torch.eye(2).double().expand(int((~new.warped).sum()), 2, 2))


def test_runs_without_the_newer_settings_see_the_images_that_they_saw():
    """Against numbers computed when "appendix" was all there was."""
    random = generator(0, "stored")
    stored = draw(6, 0.5, True, "appendix", random)
    out, _ = apply((torch.arange(216).view(6, 1, 6, 6) * 37 % 101) / 50 - 1, stored)
    assert torch.rand(1, generator=random).item() == pytest.approx(0.7690015, abs=1e-7)
    assert stored.labels[4].tolist() == pytest.approx([0, 1.0250967, 1.6367007, -0.4490898, -0.4003442, 1.1981512])
    assert stored.inverse[4].flatten().tolist() == pytest.approx([1.0688041, -0.1051329, -0.1051329, 0.7144959])
    pixels = [0.1140102, -0.4579947, 0.4402435, 0.5587291, -0.7640407, -0.12]
    assert out[:, 0, 2, 3].tolist() == pytest.approx(pixels, abs=1e-6)


def test_switches_do_not_move_the_other_draws():
    on, off = (draw(300, 0.3, flip, "appendix", generator(0, "s")) for flip in (True, False))
    assert torch.equal(on.labels[:, 1:], off.labels[:, 1:]) and off.labels[:, 0].sum() == 0
    g, h = generator(0, "s"), generator(0, "s")
    none, every = draw(300, 0.0, False, "appendix", g), draw(300, 1.0, True, "appendix", h)
    assert not none.warped.any() and (every.labels[:, 1:] != 0).all()
    assert torch.equal(g.get_state(), h.get_state())


def test_the_unlabelled_flip_mirrors_half_of_the_images_independently_of_labels():
    images = torch.randint(0, 256, (2000, 1, 8, 8), dtype=torch.uint8, generator=generator(0, "uint8"))
    rows = torch.arange(2000)

    def batch(step, **data):
        config = tiny_config(model__augment_labels=6 if data.get("data__flip") else 0, **data)
        feed = ImageFeed(Dataset(images, None, ()), config, torch.device("cpu"))
        return feed.step(step, rows, slice(0, 2000))(rows)

    plain, nothing = batch(3)
    hidden, untold = batch(3, data__flip_unlabelled=True)
    mirrored = (hidden != plain).flatten(1).any(1)
    assert nothing == untold == {} and mirrored.float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert torch.equal(hidden, torch.where(mirrored[:, None, None, None], plain.flip(-1), plain))
    assert torch.equal(batch(3, data__flip_unlabelled=True)[0], hidden)  # a function of the step …
    assert not torch.equal(batch(4, data__flip_unlabelled=True)[0], hidden)  # … and another at the next
    both, told = batch(3, data__flip_unlabelled=True, data__flip=True)
    label = told["augment_labels"][:, 0].bool()
    assert torch.equal(told["augment_labels"], batch(3, data__flip=True)[1]["augment_labels"])
    assert torch.equal(both, torch.where((mirrored ^ label)[:, None, None, None], plain.flip(-1), plain))
    assert mirrored[label].float().mean().item() == pytest.approx(0.5, abs=0.06)


def test_a_sample_depends_on_its_draw_only():
    images, whole = noise(64, 3, 16, 16), draw(64, 0.5, True, "official", generator(0, "slices"))
    together, labels = apply(images, whole)
    for part in (slice(32, 64), torch.tensor([3, 60, 8]), *(slice(k, k + 1) for k in range(64))):
        out, part_labels = apply(images[part], whole.select(part))
        assert torch.equal(out, together[part]) and torch.equal(part_labels, labels[part])


def test_types_shapes_and_no_gradient():
    images, drawn = noise(6, 3, 8, 8).requires_grad_(), draw(6, 0.9, True, "appendix", generator(0, "m"))
    before = images.detach().clone()
    out, labels = apply(images, drawn)
    assert out.dtype == labels.dtype == torch.float32
    assert out.shape == images.shape and labels.shape == (6, 6)
    assert not out.requires_grad and torch.equal(images, before)
    assert out.device == labels.device == images.device
    assert len(drawn) == 6 and len(drawn.select(torch.tensor([1, 2]))) == 2
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(apply(last, drawn)[0], out, atol=1e-6)
    with pytest.raises(ValueError, match="draw is for 6"):
        apply(images[:5], drawn)
