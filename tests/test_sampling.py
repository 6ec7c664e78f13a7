"""Sampling by the average velocity, against the closed-form flow of Gaussian data."""

import pytest
import torch
from gaussian import example

from meanflow.sampling import sample, time_grid

DATA = example()
NOISE = torch.randn(256, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
TRUTH = DATA.flow(NOISE, torch.ones(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64))


def test_one_step_equals_a_thousand_for_the_true_field():
    for steps in (1, 1000):
        assert torch.allclose(sample(DATA.average_velocity, NOISE, steps), TRUTH, atol=1e-9)


def test_uneven_grids_are_as_good():
    assert torch.allclose(sample(DATA.average_velocity, NOISE, grid=(1, 0.9, 0.2, 0)), TRUTH)


def test_the_instantaneous_velocity_needs_many_steps():
    """Euler with v converges at first order: the gap that MeanFlow closes."""
    one, hundred, two_hundred = (
        (sample(lambda z, r, t: DATA.velocity(z, t), NOISE, steps) - TRUTH).norm() for steps in (1, 100, 200)
    )
    assert one > 20 * hundred
    assert hundred / two_hundred == pytest.approx(2, rel=0.1)


def test_number_of_evaluations_and_arguments():
    calls = []

    def u(z, r, t, class_labels=None):
        calls.append((r.unique().item(), t.unique().item(), class_labels.tolist()))
        assert not torch.is_grad_enabled()
        return torch.zeros_like(z)

    sample(u, NOISE[:4], 4, class_labels=torch.arange(4))
    assert calls == [(r, r + 0.25, [0, 1, 2, 3]) for r in (0.75, 0.5, 0.25, 0.0)]


@pytest.mark.parametrize("grid", [(1,), (0, 1), (1, 0.5), (0.9, 0), (1, 0.5, 0.5, 0), (1, 0.2, 0.6, 0)])
def test_bad_grids(grid):
    with pytest.raises(ValueError, match="descends from 1 to 0"):
        sample(lambda z, r, t: z, NOISE, grid=grid)


def test_steps_must_be_positive():
    with pytest.raises(ValueError, match="steps"):
        time_grid(0)
