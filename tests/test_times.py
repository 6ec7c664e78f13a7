"""p(r, t): fractions, marginals, and what a part of the batch sees."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from meanflow.times import Times

PAPER = Times(mu=-2.0, sigma=2.0, ratio=0.75)  # CIFAR-10
V1 = Times(sampler="v1", mu=-0.6, sigma=1.6, mu_r=-4.0, sigma_r=1.6, ratio=0.75)


def draw(times, n=20_000, seed=0):
    return times.sample(n, torch.Generator().manual_seed(seed))


def assert_distributed(values, distribution):
    assert stats.kstest(values.double().numpy(), distribution).pvalue > 1e-3


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("n", [1, 7, 128, 1024])
def test_a_stratified_batch_has_its_fraction_exactly(ratio, n):
    r, t = draw(replace(PAPER, ratio=ratio), n)
    assert ((r < t).sum().item(), (r > t).sum().item()) == (round(ratio * n), 0)


def test_so_has_every_part_of_it_to_within_one():
    """Processes and micro-batches take consecutive rows; none may get more than one derivative too many."""
    r, t = draw(PAPER, 1024)
    for size in (8, 100, 128, 512):
        found = (r != t).unfold(0, size, 31).sum(1)
        assert (found - 0.75 * size).abs().max() <= 1


def test_drawn_for_each_sample_the_fraction_varies_about_the_ratio():
    times = replace(PAPER, stratified=False)
    counts = [int(r.ne(t).sum()) for r, t in (draw(times, 1000, seed) for seed in range(40))]
    assert len(set(counts)) > 10
    assert sum(counts) / 40_000 == pytest.approx(0.75, abs=0.01)
    assert times.varying_rows and V1.varying_rows and not PAPER.varying_rows


@pytest.mark.parametrize(("mu", "sigma"), [(-2.0, 2.0), (-0.4, 1.0)])
def test_v0_is_max_and_min_of_two_logit_normals(mu, sigma):
    r, t = draw(Times(mu=mu, sigma=sigma, ratio=1.0))
    normal = stats.norm(mu, sigma)
    assert_distributed(torch.logit(t.double()), lambda x: normal.cdf(x) ** 2)
    assert_distributed(torch.logit(r.double()), lambda x: 1 - (1 - normal.cdf(x)) ** 2)


def test_uniform():
    r, t = draw(Times(distribution="uniform", ratio=1.0))
    assert_distributed(t, lambda x: x**2)
    assert_distributed(r, lambda x: 1 - (1 - x) ** 2)


def test_which_rows_have_r_equal_t_is_independent_of_t():
    r, t = draw(PAPER)
    assert stats.ks_2samp(t[t == r].numpy(), t[t != r].numpy()).pvalue > 1e-3


def test_v1_masks_first_and_keeps_about_70_percent():
    r, t = draw(V1, 100_000)
    assert (t != r).float().mean().item() == pytest.approx(0.70, abs=0.02)  # reference: "about 70 %"
    assert_distributed(torch.logit(t.double()), stats.norm(-0.6, 1.6).cdf)
    r, _ = draw(replace(V1, mu=99.0, ratio=1.0))  # t = 1: r is not cut off
    assert_distributed(torch.logit(r.double()), stats.norm(-4.0, 1.6).cdf)


@pytest.mark.parametrize("times", [PAPER, V1, Times(distribution="uniform", stratified=False)])
def test_range_and_repeatability(times):
    r, t = draw(times, seed=5)
    assert all(map(torch.equal, draw(times, seed=5), (r, t)))
    assert r.min() >= 0 and (r <= t).all() and t.max() <= 1
