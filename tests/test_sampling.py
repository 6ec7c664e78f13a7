"""Sampling by the average velocity, against the closed-form flow of Gaussian data."""

import pytest
import torch
from gaussian import example

from meanflow.sampling import sample, time_grid


def noise(n=256):
    return torch.randn(n, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_one_step_equals_a_thousand_for_the_true_field():
    data, z = example(), noise()
    one = sample(data.average_velocity, z, time_grid(1))
    thousand = sample(data.average_velocity, z, time_grid(1000))
    truth = data.flow(z, torch.ones(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64))
    assert torch.allclose(one, truth, atol=1e-12)
    assert torch.allclose(thousand, truth, atol=1e-9)


def test_uneven_grids_are_as_good():
    data, z = example(), noise()
    assert torch.allclose(sample(data.average_velocity, z, (1, 0.9, 0.2, 0)), sample(data.average_velocity, z, (1, 0)))


def test_the_instantaneous_velocity_needs_many_steps():
    """Euler with v converges at first order: the gap that MeanFlow closes."""
    data, z = example(), noise()
    truth = sample(data.average_velocity, z, time_grid(1))

    def error(n):
        return (sample(lambda z, t, r: data.velocity(z, t), z, time_grid(n)) - truth).norm()

    errors = [error(n) for n in (1, 100, 200)]
    assert errors[0] > 20 * errors[1]
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.1)


def test_number_of_evaluations_and_arguments():
    calls = []

    def u(z, t, r, class_labels=None):
        calls.append((t.unique().item(), r.unique().item(), class_labels))
        return torch.zeros_like(z)

    sample(u, noise(4), time_grid(4), class_labels=torch.arange(4))
    assert [(t, r) for t, r, _ in calls] == [(1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.25, 0.0)]
    assert all(torch.equal(labels, torch.arange(4)) for *_, labels in calls)


@pytest.mark.parametrize("grid", [(1,), (0, 1), (1, 0.5), (0.9, 0), (1, 0.5, 0.5, 0), (1, 0.2, 0.6, 0)])
def test_bad_grids(grid):
    with pytest.raises(ValueError, match="descends from 1 to 0"):
        sample(lambda z, t, r: z, noise(2), grid)


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps"):
        time_grid(0)
