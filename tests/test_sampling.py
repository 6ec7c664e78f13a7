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


def test_noise_added_again_follows_the_grid():
    """Consistency models know r = 0 alone: x = z − t u(z, 0, t), then (1 − r) x + r ε with the ε that is given."""
    asked, times = [], []

    def u(z, r, t):
        times.append((r.unique().item(), t.unique().item()))
        return DATA.average_velocity(z, r, t)

    def noise(k):
        asked.append(k)
        return torch.full_like(NOISE, float(k))

    found = sample(u, NOISE, grid=(1, 0.5, 0.25, 0), sampler="renoise", noise=noise)
    assert asked == [1, 2] and times == [(0, 1), (0, 0.5), (0, 0.25)]
    x = DATA.average_velocity
    one, zero = torch.ones(256, dtype=torch.float64), torch.zeros(256, dtype=torch.float64)
    z = 0.5 * (NOISE - x(NOISE, zero, one)) + 0.5 * 1
    z = 0.75 * (z - 0.5 * x(z, zero, 0.5 * one)) + 0.25 * 2
    assert torch.allclose(found, z - 0.25 * x(z, zero, 0.25 * one))
    assert len({sample(u, NOISE, 2, sampler="renoise").sum().item() for _ in range(2)}) == 2


def test_euler_asks_for_the_velocity():
    times = []
    sample(lambda z, r, t: times.append((r[0].item(), t[0].item())) or z, NOISE, 2, sampler="euler")
    assert times == [(1, 1), (0.5, 0.5)]
    with pytest.raises(ValueError, match="sampler must be one of flow_map"):
        sample(lambda z, r, t: z, NOISE, sampler="heun")
