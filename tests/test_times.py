"""p(t, r): shares, marginals, and what a slice of the batch sees."""

from dataclasses import replace

import pytest
import torch
from scipy import stats

from meanflow.times import TimesConfig, sample_times

PAPER = TimesConfig("v0", "lognorm", -2.0, 2.0, None, None, 0.75, "exact")
V1 = TimesConfig("v1", "lognorm", -0.6, 1.6, -4.0, 1.6, 0.75, "exact")


def draw(config, n=20_000, seed=0):
    return sample_times(n, config, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.75, 1.0])
@pytest.mark.parametrize("n", [1, 7, 128, 1024])
def test_exact_share(ratio, n):
    t, r = draw(replace(PAPER, ratio=ratio), n)
    assert ((t > r).sum().item(), (t < r).sum().item()) == (round(ratio * n), 0)


def test_every_slice_has_its_share():
    """Processes and micro-batches take consecutive rows; none may get more than one derivative too many."""
    t, r = draw(PAPER, 1024)
    moving = (t != r).long()
    for size in (8, 100, 128, 512):
        for start in range(0, 1024 - size, 31):
            assert abs(moving[start : start + size].sum().item() - 0.75 * size) <= 1


def test_share_per_sample_varies_about_the_ratio():
    counts = [
        (lambda t, r: (t != r).sum().item())(*draw(replace(PAPER, share="per_sample"), 1000, s)) for s in range(40)
    ]
    assert len(set(counts)) > 10
    assert sum(counts) / 40_000 == pytest.approx(0.75, abs=0.01)


@pytest.mark.parametrize(("mu", "sigma"), [(-2.0, 2.0), (-0.4, 1.0)])
def test_v0_is_max_and_min_of_two_logit_normals(mu, sigma):
    t, r = draw(replace(PAPER, mu=mu, sigma=sigma, ratio=1.0))
    normal = stats.norm(mu, sigma)
    assert stats.kstest(torch.logit(t.double()).numpy(), lambda x: normal.cdf(x) ** 2).pvalue > 1e-3
    assert stats.kstest(torch.logit(r.double()).numpy(), lambda x: 1 - (1 - normal.cdf(x)) ** 2).pvalue > 1e-3


def test_uniform():
    t, r = draw(replace(PAPER, distribution="uniform", ratio=1.0))
    assert stats.kstest(t.numpy(), lambda x: x**2).pvalue > 1e-3
    assert stats.kstest(r.numpy(), lambda x: 1 - (1 - x) ** 2).pvalue > 1e-3


def test_which_rows_have_r_equal_t_is_independent_of_t():
    t, r = draw(PAPER)
    assert stats.ks_2samp(t[t == r].numpy(), t[t != r].numpy()).pvalue > 1e-3


def test_v1_masks_first_and_keeps_about_70_percent():
    t, r = draw(V1, 100_000)
    assert (t != r).float().mean().item() == pytest.approx(0.70, abs=0.02)  # reference: "about 70 %"
    assert stats.kstest(torch.logit(t.double()).numpy(), stats.norm(-0.6, 1.6).cdf).pvalue > 1e-3


@pytest.mark.parametrize("config", [PAPER, V1, replace(PAPER, distribution="uniform", share="per_sample")])
def test_range_and_repeatability(config):
    t, r = draw(config, seed=5)
    again = draw(config, seed=5)
    assert torch.equal(t, again[0]) and torch.equal(r, again[1])
    assert r.min() >= 0 and (r <= t).all() and t.max() <= 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("ratio", 1.2),
        ("ratio", -0.1),
        ("sigma", 0.0),
        ("sampler", "v2"),
        ("distribution", "normal"),
        ("share", "some"),
        ("mu_r", 1.0),
    ],
)
def test_bad_settings_name_themselves(field, value):
    with pytest.raises(ValueError, match=field):
        replace(PAPER, **{field: value})


def test_v1_needs_its_own_r():
    with pytest.raises(ValueError, match="mu_r"):
        replace(V1, mu_r=None)
