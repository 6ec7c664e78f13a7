"""ADM's centre crop, against a computation that does without Pillow."""

import numpy as np
import pytest
from PIL import Image

from meanflow.data.images import centre_crop


def resampled(pixels: np.ndarray, length: int, kernel, support: float) -> np.ndarray:
    """The first axis brought to `length` by the textbook's filter, widened where it shrinks, rounded to 8 bits."""
    scale = len(pixels) / length
    widened = max(scale, 1.0)
    result = np.empty((length, *pixels.shape[1:]))
    for k in range(length):
        centre = (k + 0.5) * scale
        taps = np.arange(
            max(int(centre - support * widened + 0.5), 0), min(int(centre + support * widened + 0.5), len(pixels))
        )
        weights = kernel((taps + 0.5 - centre) / widened)
        result[k] = np.tensordot(weights / weights.sum(), pixels[taps].astype(float), 1)
    return np.clip(np.floor(result + 0.5), 0, 255)


def box(x):
    return ((x > -0.5) & (x <= 0.5)).astype(float)


def cubic(x):
    x = np.abs(x)
    near, far = 1.5 * x**3 - 2.5 * x**2 + 1, -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def plain_crop(pixels: np.ndarray, size: int) -> np.ndarray:
    """ADM's crop of (H, W, 3), written from its description."""

    def resize(pixels, height, width, *kernel):
        across = resampled(pixels.swapaxes(0, 1), width, *kernel).swapaxes(0, 1)
        return resampled(across, height, *kernel)

    while min(pixels.shape[:2]) >= 2 * size:
        pixels = resize(pixels, pixels.shape[0] // 2, pixels.shape[1] // 2, box, 0.5)
    short = min(pixels.shape[:2])
    pixels = resize(pixels, round(pixels.shape[0] * size / short), round(pixels.shape[1] * size / short), cubic, 2.0)
    top, left = (pixels.shape[0] - size) // 2, (pixels.shape[1] - size) // 2
    return pixels[top : top + size, left : left + size]


@pytest.mark.parametrize(
    "height, width", [(16, 16), (17, 31), (31, 20), (33, 47), (80, 64), (131, 67), (9, 12), (16, 40)]
)
def test_the_crop_against_a_plain_computation(height, width):
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = np.array(centre_crop(Image.fromarray(pixels), 16)).astype(float)
    assert found.shape == (16, 16, 3)
    assert np.abs(found - plain_crop(pixels, 16)).max() <= 1  # Pillow computes with fixed point


def test_an_image_of_the_right_size_is_left_alone():
    pixels = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    assert (np.array(centre_crop(Image.fromarray(pixels), 16)) == pixels).all()
