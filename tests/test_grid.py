"""Grids: their shape, their pixels, and what stands beside their rows."""

import numpy as np
import pytest
import torch

from eval.sampling.grid import class_names, columns_of, grid, row_labels


@pytest.mark.parametrize(
    ("n", "columns", "shape"), [(1, None, (1, 1)), (5, None, (3, 2)), (7, 4, (4, 2)), (3, 9, (3, 1))]
)
def test_it_has_the_columns_asked_for(n, columns, shape):
    width, height = grid(torch.zeros(n, 1, 8, 8, dtype=torch.uint8), columns_of(n, columns)).size
    assert (width // 64, height // 64) == shape


def test_it_shows_single_pixels():
    images = torch.randint(256, (3, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture = np.array(grid(images, columns=2))
    scale, side = 8, 16 * 8 + 2
    assert picture.shape == (2 * side + 2, 2 * side + 2, 3)
    for k, image in enumerate(images):
        y, x = (2 + i * side for i in divmod(k, 2))
        enlarged = image.permute(1, 2, 0).numpy().repeat(scale, 0).repeat(scale, 1)
        assert np.array_equal(picture[y : y + 16 * scale, x : x + 16 * scale], enlarged), k


@pytest.mark.parametrize("channels", [1, 3])
def test_captions_stand_left_of_their_rows(channels):
    images = torch.full((4, channels, 16, 16), 200, dtype=torch.uint8)
    plain, named = np.array(grid(images, 2)), np.array(grid(images, 2, ["cat", ""]))
    margin = named.shape[1] - plain.shape[1]
    assert margin > 0 and np.array_equal(named[:, margin:], plain)
    top, bottom = named[: 8 * 16, :margin], named[8 * 16 + 4 :, :margin]
    assert (top < 100).any() and (bottom == 255).all()


def test_rows_take_classes_from_all_over_their_range():
    assert row_labels(6, 2, 1000).tolist() == [0, 0, 333, 333, 666, 666]
    assert row_labels(6, 2, 2).tolist() == [0, 0, 1, 1, 0, 0]
    assert row_labels(100, 10, 10).tolist() == [k // 10 for k in range(100)]


def test_imagenet_classes_are_named():
    numbers = [f"n{k:08d}" for k in range(1000)]
    assert class_names(numbers)[0] == "tench" and class_names(numbers)[207] == "golden retriever"
    assert class_names(numbers[:10]) == numbers[:10]
