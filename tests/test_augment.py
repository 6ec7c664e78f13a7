"""EDM augmentation against its geometry: exact cases, and analytic functions to interpolation error."""

import math

import pytest
import torch

from meanflow.data.augment import DELAY, SYM6, AugmentDraw, _inverse_linear, apply, draw
from meanflow.random import generator


def make_draw(n=1, flip=0.0, a=0.0, b=0.0, theta=0.0, x=0.0, y=0.0, warped=True) -> AugmentDraw:
    """n equal draws with chosen parameters, the labels as the module's docstring lists them."""
    row = [flip, a, b * math.cos(theta), b * math.sin(theta), x, y]
    one = [torch.tensor([float(v)], dtype=torch.float64) for v in (a, b, theta)]
    return AugmentDraw(
        labels=torch.tensor([row]).expand(n, 6),
        inverse=_inverse_linear(*one).expand(n, 2, 2),
        warped=torch.full((n,), warped),
    )


def noise(*shape, seed=0):
    return torch.rand(*shape, generator=generator(seed, "test images")) * 2 - 1


def reflect(position: int, size: int) -> int:
    """Index of a pixel outside 0 … size − 1 after mirroring at the outer pixels' centres, by walking."""
    step = 1
    at = 0
    for _ in range(abs(position)):
        if size > 1 and not 0 <= at + step < size:
            step = -step
        at += step
    return at


def shift_by_index(images, right, down):
    height, width = images.shape[-2:]
    rows = [reflect(k - down, height) for k in range(height)]
    columns = [reflect(k - right, width) for k in range(width)]
    return images[:, :, rows][:, :, :, columns]


def coordinates(size):
    """Pixel offsets (x, y) from the centre, float64 (size, size) each."""
    offset = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
    y, x = torch.meshgrid(offset, offset, indexing="ij")
    return x, y


def bump(x, y):
    """A smooth, lopsided function: an elongated, tilted, off-centre Gaussian, 3 to 6 pixels wide."""
    x, y = x - 2.0, y + 1.5
    u, v = (x + 0.5 * y) / 6, (y - 0.3 * x) / 3.5
    return torch.exp(-(u**2 + v**2) / 2)


# The filter


def test_filter_is_an_orthonormal_symlet_with_six_vanishing_moments():
    h = torch.tensor(SYM6, dtype=torch.float64)
    taps = torch.arange(12, dtype=torch.float64)
    assert h.sum().item() == pytest.approx(math.sqrt(2), abs=1e-12)
    for lag in range(6):
        assert (h[2 * lag :] * h[: 12 - 2 * lag]).sum().item() == pytest.approx(float(lag == 0), abs=1e-11)
    for moment in range(6):
        value = ((-1) ** taps * ((taps - 5.5) / 5.5) ** moment * h).sum().item()
        assert value == pytest.approx(0, abs=1e-11)
    # Among the filters with these properties the symlet is the least skewed: energy sits at its middle.
    assert 5 < DELAY < 6
    assert (h[3:9] ** 2).sum() > 0.98


# Exact cases


@pytest.mark.parametrize("shape", [(3, 3, 32, 32), (2, 1, 8, 8), (2, 2, 9, 14), (1, 1, 2, 3)])
def test_identity_through_the_warp(shape):
    images = noise(*shape)
    out, _ = apply(images, make_draw(shape[0]))
    assert torch.allclose(out, images, atol=1e-6, rtol=0)


def test_undrawn_images_are_untouched_to_the_bit():
    images = noise(4, 3, 16, 16)
    out, labels = apply(images, draw(4, 0.0, False, generator(0, "t")))
    assert torch.equal(out, images)
    assert out.data_ptr() != images.data_ptr()
    assert torch.equal(labels, torch.zeros(4, 6))


def test_pure_flip_is_torch_flip_to_the_bit():
    images = noise(2, 3, 16, 12)
    out, labels = apply(images, make_draw(2, flip=1, warped=False))
    assert torch.equal(out, images.flip(-1))
    assert torch.equal(labels[:, 0], torch.ones(2))
    through_the_warp, _ = apply(images, make_draw(2, flip=1))
    assert torch.allclose(through_the_warp, images.flip(-1), atol=1e-6)


@pytest.mark.parametrize("size, right, down", [
    (32, 5, 0), (32, 0, -7), (16, -3, 4), (8, 3, -2),
    (8, 11, -9), (8, -30, 45), (4, 17, 17),  # reflected more than once
])  # fmt: skip
def test_whole_pixel_shift(size, right, down):
    images = noise(2, 3, size, size)
    out, _ = apply(images, make_draw(2, x=8 * right / size, y=8 * down / size))
    assert torch.allclose(out, shift_by_index(images, right, down), atol=1e-5)


def test_shift_moves_content_right_and_down_by_eighths():
    images = torch.zeros(1, 1, 16, 32)
    images[0, 0, 5, 9] = 1
    out, _ = apply(images, make_draw(x=1.0, y=2.0))  # 1/8 of 32 to the right, 2/8 of 16 down
    assert out[0, 0, 9, 13] == pytest.approx(1, abs=1e-5)
    assert out.sum() == pytest.approx(1, abs=1e-4)


def test_whole_pixel_shifts_compose():
    images = noise(1, 1, 16, 16)
    middle = (..., slice(5, 11), slice(5, 11))  # where reflection at either step plays no part
    once, _ = apply(images, make_draw(x=0.5))
    twice, _ = apply(once, make_draw(x=1.0))
    assert torch.allclose(twice[middle], apply(images, make_draw(x=1.5))[0][middle], atol=1e-5)


# Geometry on analytic functions. The linear ramp is exact: the filter reproduces polynomials.


@pytest.mark.parametrize("a, b, theta, x, y", [
    (1.0, 0, 0, 0, 0), (-0.5, 0, 0, 0, 0), (0, 1.0, 0.0, 0, 0), (0, -0.8, 2.2, 0, 0),
    (0, 0, 0, 0.37, -0.21), (0.6, 0.7, -1.1, 0.3, 0.2),
])  # fmt: skip
def test_ramp(a, b, theta, x, y):
    size = 48
    px, py = coordinates(size)
    ramp = ((0.3 * px - 0.5 * py) / 30).float()[None, None]
    out, _ = apply(ramp, make_draw(a=a, b=b, theta=theta, x=x, y=y))
    qx, qy = (c - s * size / 8 for c, s in ((px, x), (py, y)))
    cos, sin, s = math.cos(theta), math.sin(theta), 2 ** (0.2 * b)
    along, across = cos * qx + sin * qy, -sin * qx + cos * qy
    along, across = along / s / 2 ** (0.2 * a), across * s / 2 ** (0.2 * a)
    qx, qy = cos * along - sin * across, sin * along + cos * across
    want = (0.3 * qx - 0.5 * qy) / 30
    inner = slice(14, 34)
    assert torch.allclose(out[0, 0, inner, inner].double(), want[inner, inner], atol=2e-6)


@pytest.mark.parametrize("a", [-1.5, -0.4, 0.7, 2.0])
def test_scale_enlarges_a_bump(a):
    x, y = coordinates(40)
    out, _ = apply(bump(x, y).float()[None, None], make_draw(a=a))
    s = 2 ** (0.2 * a)
    want = bump(x / s, y / s)
    inner = slice(8, 32)
    assert (out[0, 0].double() - want)[inner, inner].abs().max() < 4e-3
    assert (want - bump(x, y))[inner, inner].abs().max() > 0.04  # the tolerance can tell them apart


@pytest.mark.parametrize("b, theta", [(1.0, 0.0), (1.0, math.pi / 2), (1.5, 0.6), (-1.2, 2.5), (0.8, -2.0)])
def test_anisotropy_stretches_along_its_angle(b, theta):
    x, y = coordinates(40)
    out, labels = apply(bump(x, y).float()[None, None], make_draw(b=b, theta=theta))
    s = 2 ** (0.2 * b)
    along, across = math.cos(theta) * x + math.sin(theta) * y, math.cos(theta) * y - math.sin(theta) * x
    along, across = along / s, across * s
    want = bump(math.cos(theta) * along - math.sin(theta) * across,
                math.sin(theta) * along + math.cos(theta) * across)  # fmt: skip
    inner = slice(8, 32)
    assert (out[0, 0].double() - want)[inner, inner].abs().max() < 4e-3
    assert (want - bump(x, y))[inner, inner].abs().max() > 0.04
    assert labels[0, 2:4].tolist() == pytest.approx([b * math.cos(theta), b * math.sin(theta)])


def test_order_is_flip_then_scale_then_anisotropy_then_shift():
    x, y = coordinates(40)
    draw_all = make_draw(flip=1, a=-0.8, b=1.0, theta=0.7, x=0.6, y=-0.9)
    out, _ = apply(bump(x, y).float()[None, None], draw_all)
    qx, qy = x - 0.6 * 5, y + 0.9 * 5  # undo the shift first …
    cos, sin, s = math.cos(0.7), math.sin(0.7), 2**0.2
    along, across = (cos * qx + sin * qy) / s, (cos * qy - sin * qx) * s  # … then the anisotropy …
    qx, qy = cos * along - sin * across, sin * along + cos * across
    want = bump(-qx / 2**-0.16, qy / 2**-0.16)  # … then the scale, and the flip last
    assert (out[0, 0].double() - want)[8:32, 8:32].abs().max() < 6e-3


def test_fractional_shift_of_a_bump():
    x, y = coordinates(40)
    out, _ = apply(bump(x, y).float()[None, None], make_draw(x=0.33, y=-0.47))
    want = bump(x - 0.33 * 5, y + 0.47 * 5)
    assert (out[0, 0].double() - want)[6:34, 6:34].abs().max() < 4e-3


def test_border_is_a_mirror():
    """A periodic function that is even about the outer pixels has no border: the warp is right everywhere."""
    size = 32
    y, x = torch.meshgrid(torch.arange(size) * 1.0, torch.arange(size) * 1.0, indexing="ij")
    k = 2 * math.pi / (2 * (size - 1))

    def wave(x, y):
        return torch.cos(2 * k * x) * torch.cos(k * y)

    out, _ = apply(wave(x, y)[None, None], make_draw(a=-3.0, x=1.3, y=-2.1))  # shrunk: all borders show
    c, s = (size - 1) / 2, 2**-0.6
    want = wave((x - c - 1.3 * 4) / s + c, (y - c + 2.1 * 4) / s + c)
    assert (out[0, 0] - want).abs().max() < 1e-2


def test_extreme_draws_stay_finite():
    images = noise(3, 1, 8, 8)
    out, _ = apply(images, make_draw(3, a=-6.0, b=6.0, theta=1.0, x=5.0, y=-5.0))
    assert out.isfinite().all() and out.abs().max() < 2


# The draw


def test_probabilities_and_distributions():
    n, p = 40_000, 0.12
    many = draw(n, p, True, generator(0, "many"))
    flip, a, cos, sin, x, y = many.labels.T
    assert set(flip.tolist()) == {0.0, 1.0}
    assert flip.mean().item() == pytest.approx(0.5, abs=0.012)
    drawn = torch.stack([a != 0, (cos != 0) | (sin != 0), x != 0], 1).float()
    assert drawn.mean(0).tolist() == pytest.approx([p] * 3, abs=0.008)
    assert torch.equal(x != 0, y != 0)  # one coin for both
    assert torch.equal(many.warped, drawn.any(1))
    assert many.warped.float().mean().item() == pytest.approx(1 - (1 - p) ** 3, abs=0.01)  # independent
    both = (drawn[:, 0] * drawn[:, 1]).mean().item()
    assert both == pytest.approx(p * p, abs=0.004)
    for value in (a[a != 0], x[x != 0], y[y != 0]):
        assert value.mean().item() == pytest.approx(0, abs=0.05)
        assert value.std().item() == pytest.approx(1, abs=0.05)
    strength = torch.hypot(cos, sin)[drawn[:, 1] > 0]
    assert (strength**2).mean().item() == pytest.approx(1, abs=0.08)
    angle = torch.atan2(sin, cos)[drawn[:, 1] > 0]
    quarters = torch.histc(angle, 4, -math.pi, math.pi) / len(angle)
    assert quarters.tolist() == pytest.approx([0.25] * 4, abs=0.03)


def test_drawn_labels_describe_the_drawn_map():
    many = draw(500, 0.5, True, generator(1, "maps"))
    a, cos, sin = many.labels[:, 1].double(), many.labels[:, 2].double(), many.labels[:, 3].double()
    area = torch.linalg.det(many.inverse)
    assert torch.allclose(area, 2 ** (-0.4 * a), rtol=1e-6)
    # The stretched axis, and its strength up to sign (b, θ) = (−b, θ + π), follow from the labels.
    b = torch.hypot(cos, sin)
    axis = torch.stack([cos, sin], 1) / b.clamp_min(1e-12)[:, None]
    along = (many.inverse @ axis[..., None])[..., 0]
    ratio = (along * axis).sum(1) * 2 ** (0.2 * a)
    signs = torch.log2(ratio[b > 0]) / (-0.2 * b[b > 0])
    assert torch.allclose(signs.abs(), torch.ones_like(signs), atol=1e-4)
    # … a sign that the labels leave open, in every direction, since θ covers the full circle.
    assert (signs[cos[b > 0] > 0] > 0).double().mean().item() == pytest.approx(0.5, abs=0.15)
    assert torch.allclose(along[b > 0], axis[b > 0] * (axis * along).sum(1, keepdim=True)[b > 0], atol=1e-6)
    plain = (a == 0) & (b == 0)
    assert torch.equal(many.inverse[plain], torch.eye(2, dtype=torch.float64).expand(int(plain.sum()), 2, 2))


def test_flip_off_and_p_zero_and_one():
    assert draw(200, 0.5, False, generator(0, "x")).labels[:, 0].sum() == 0
    assert not draw(200, 0.0, True, generator(0, "x")).warped.any()
    assert (draw(200, 1.0, True, generator(0, "x")).labels[:, 1:] != 0).all()


def test_switches_do_not_move_the_other_draws():
    on, off = (draw(300, 0.3, flip, generator(0, "s")) for flip in (True, False))
    assert torch.equal(on.labels[:, 1:], off.labels[:, 1:])
    g, h = generator(0, "s"), generator(0, "s")
    draw(300, 0.0, False, g), draw(300, 1.0, True, h)
    assert torch.equal(g.get_state(), h.get_state())


def test_a_sample_depends_on_its_own_draw_only():
    images, whole = noise(64, 3, 16, 16), draw(64, 0.5, True, generator(0, "slices"))
    together, labels = apply(images, whole)
    for part in (slice(0, 1), slice(5, 6), slice(32, 64), torch.tensor([3, 60, 8])):
        out, part_labels = apply(images[part], whole.select(part))
        assert torch.equal(out, together[part])
        assert torch.equal(part_labels, labels[part])
    alone = torch.cat([apply(images[k : k + 1], whole.select(slice(k, k + 1)))[0] for k in range(64)])
    assert torch.equal(alone, together)


# Manners


def test_types_shapes_and_no_gradient():
    images = noise(6, 3, 8, 8).requires_grad_()
    drawn = draw(6, 0.9, True, generator(0, "m"))
    out, labels = apply(images, drawn)
    assert out.dtype == labels.dtype == torch.float32
    assert out.shape == images.shape and labels.shape == (6, 6)
    assert not out.requires_grad
    assert out.device == labels.device == images.device
    assert len(drawn) == 6 and len(drawn.select(torch.tensor([1, 2]))) == 2
    with pytest.raises(ValueError, match="draw is for 6"):
        apply(images[:5], drawn)


def test_input_is_not_written_to():
    images = noise(8, 1, 8, 8)
    before = images.clone()
    apply(images, draw(8, 1.0, True, generator(0, "m")))
    assert torch.equal(images, before)


def test_channels_last_gives_the_same():
    images, drawn = noise(8, 3, 16, 16), draw(8, 0.5, True, generator(0, "c"))
    last = images.contiguous(memory_format=torch.channels_last)
    assert torch.allclose(apply(last, drawn)[0], apply(images, drawn)[0], atol=1e-6)


def test_autocast_does_not_reach_the_warp():
    images = noise(2, 3, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = apply(images, make_draw(2))
    assert torch.allclose(out, images, atol=1e-6)
