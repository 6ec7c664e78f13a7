"""Guidance in the target (Eqs. 19–21) against closed forms: class-conditional Gaussians, whose velocities are known."""

from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from meanflow.training.network import build_network
from running import guided_latent_changes, tiny_config

from meanflow.guidance import GuidanceConfig, drop_labels, guided_velocity
from meanflow.objectives.meanflow import LossConfig, interpolate, meanflow_loss
from meanflow.times import TimesConfig, sample_times
from meanflow.training.estimate import random_batch
from meanflow.training.step import make_loss

NULL = 2
NONE = GuidanceConfig(1.0, 0.0, 1.0, 0.0, 1.0, 0.1, "official")
SQUARED_L2 = LossConfig(p=0.0, c=1e-3, tangent="(v, 0, 1)", jvp="dual")


def guidance(omega_prime=2.0, kappa=0.0, t_start=0.0, t_end=1.0, label_drop=0.1, dropped="official"):
    omega = (1 - kappa) * omega_prime
    return GuidanceConfig(omega_prime, kappa, omega, t_start, t_end, label_drop, dropped)


class Classes:
    """Two Gaussian classes, equally likely: v(z, t | c), v(z, t), and v^cfg of scale ω′, Eq. (13)."""

    def __init__(self):
        means = torch.tensor([[0.7, -0.3, 0.1], [-0.4, 0.9, 0.0]], dtype=torch.float64)
        std = torch.tensor([0.5, 0.8, 0.3], dtype=torch.float64)
        self.of_class = [Gaussian(mean, std) for mean in means]

    def conditional(self, z, t, labels):
        both = torch.stack([g.velocity(z, t) for g in self.of_class])
        return both[labels, torch.arange(len(z))]

    def marginal(self, z, t):
        """Σ_c p(c | z_t) v(z, t | c)."""
        logits = []
        for g in self.of_class:
            mean, std = g.moments(t)
            logits.append((-0.5 * ((z - mean) / std) ** 2 - std.log()).sum(1))
        p = torch.softmax(torch.stack(logits), 0)
        return sum(p[c, :, None] * g.velocity(z, t) for c, g in enumerate(self.of_class))

    def guided(self, z, t, labels, scale):
        marginal = self.marginal(z, t)
        own = self.conditional(z, t, torch.where(labels == NULL, 0, labels))
        return torch.where((labels == NULL)[:, None], marginal, scale * own + (1 - scale) * marginal)


def draw(n=64, seed=0):
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64)
    return z, t, torch.randint(2, (n,), generator=g)


def network_of(classes, scale, calls=None):
    """u(z, t, t | c) = v^cfg, as a network that is trained to the end has it."""

    def u(z, t, r, class_labels):
        assert torch.equal(t, r) and not torch.is_grad_enabled()
        if calls is not None:
            calls.append(class_labels)
        return classes.guided(z, t, class_labels, scale)

    return u


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.92])
def test_target_velocity_is_v_cfg(kappa, together):
    """With v(z, t | c) for its mean ε − x and a network at its goal, Eq. (21) gives v^cfg of scale ω′, whatever κ."""
    classes, (z, t, labels) = Classes(), draw()
    v, keep = classes.conditional(z, t, labels), torch.zeros(64, dtype=torch.bool)
    u = network_of(classes, scale=2.5)
    found = guided_velocity(u, z, t, v, keep, NULL, guidance(2.5, kappa), together, class_labels=labels)
    assert torch.allclose(found, classes.guided(z, t, labels, 2.5), atol=1e-12)


def test_loss_vanishes_on_the_guided_field_where_r_is_t():
    classes, (x, t, labels) = Classes(), draw()
    eps = torch.randn(64, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    z, keep = interpolate(x, eps, t), torch.zeros(64, dtype=torch.bool)
    own = classes.conditional(z, t, labels)
    u = network_of(classes, 3.0)
    v = guided_velocity(u, z, t, own, keep, NULL, guidance(3.0, 0.5), False, class_labels=labels)

    def network(z, t, r, class_labels):
        return classes.guided(z, t, class_labels, 3.0)

    loss = meanflow_loss(network, x, eps, t, t, SQUARED_L2, v, class_labels=labels)
    assert loss.weighted.max() < 1e-20
    unguided = meanflow_loss(network, x, eps, t, t, SQUARED_L2, own, class_labels=labels)
    assert unguided.mean > 1e-2


@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (NONE, []),
        (guidance(2.0), [[NULL] * 4]),
        (guidance(2.0, 0.25), [[0, 1, 0, 1], [NULL] * 4]),
        (guidance(2.0, 0.5, t_end=0.5), [[0, 1], [NULL] * 2]),
        (guidance(1.0, 0.5), [[0, 1, 0, 1]]),
    ],
)
def test_passes_are_made_for_those_that_need_them(config, passes):
    """Six samples: one outside every interval below 1, one dropped. ω = 1 needs no pass; 1 − ω − κ = 0 none for ∅."""
    classes, calls = Classes(), []
    z, _, _ = draw(6)
    t = torch.tensor([0.1, 0.2, 0.7, 0.8, 0.3, 1.0], dtype=torch.float64)
    labels, dropped = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 0, 0, 0, 1, 1]).bool()
    v = classes.conditional(z, t, labels)
    found = guided_velocity(network_of(classes, 2.0, calls), z, t, v, dropped, NULL, config, False, class_labels=labels)
    assert [call.tolist() for call in calls] == passes
    untouched = dropped | (t > config.t_end)
    assert torch.equal(found[untouched], v[untouched])
    assert torch.equal(found, v) == (config == NONE)


@pytest.mark.parametrize("still", [0, 3, 40, 100])
def test_official_drops_fall_on_r_equal_t_first(still):
    t = torch.rand(100)
    r = torch.where(torch.arange(100) < still, t, t / 2)
    for seed in range(20):
        counted = int((torch.rand(100, generator=torch.Generator().manual_seed(seed)) < 0.2).sum())
        found = drop_labels(t, r, guidance(label_drop=0.2), torch.Generator().manual_seed(seed))
        of_still = int((found & (t == r)).sum())
        assert int(found.sum()) == counted
        assert of_still == min(counted, int((t == r).sum()))


def test_independent_drops_fall_anywhere_with_their_probability():
    times = TimesConfig("v0", "lognorm", -0.4, 1.0, None, None, 0.25, "exact")
    t, r = sample_times(40_000, times, torch.Generator().manual_seed(0))
    found = drop_labels(t, r, guidance(dropped="independent"), torch.Generator().manual_seed(1))
    for group in (t == r, t != r):
        assert found[group].float().mean() == pytest.approx(0.1, abs=0.008)
    assert not drop_labels(t, r, guidance(label_drop=0.0), torch.Generator()).any()


def small_loss(**changes):
    changes = {**guided_latent_changes(), **changes}
    config = tiny_config(**changes)
    network = build_network(config, torch.device("cpu"))
    with torch.no_grad():
        for i, p in enumerate(network.parameters()):
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    network.train()
    batch = random_batch(config, 12, torch.device("cpu"))
    return config, network, make_loss(network, config, torch.device("cpu")), batch


def test_no_guidance_is_the_unguided_loss_bit_for_bit():
    """ω = 1, κ = 0: the same as guidance: null on labels that were dropped alike."""
    config, network, loss, batch = small_loss(guidance__label_drop=0.3)
    assert batch.dropped.any()
    labels = torch.where(batch.dropped, config.model.classes, batch.cond["class_labels"])
    plain = meanflow_loss(network, batch.x, batch.eps, batch.t, batch.r, config.loss, class_labels=labels)
    assert torch.equal(loss(batch).weighted, plain.weighted)


def test_the_loss_takes_the_guided_velocity_as_tangent_and_target():
    """Against Algorithm 1 with v replaced, written down plainly with torch.func.jvp."""
    changes = {"guidance__omega_prime": 3.0, "guidance__omega": 1.5, "guidance__kappa": 0.5}
    config, network, loss, batch = small_loss(**changes)
    found = loss(batch)
    labels, null = batch.cond["class_labels"], torch.full_like(batch.cond["class_labels"], config.model.classes)
    z = interpolate(batch.x, batch.eps, batch.t)
    with torch.no_grad():
        own, none = network(z, batch.t, batch.t, labels), network(z, batch.t, batch.t, null)
    v = batch.eps - batch.x
    guided = 1.5 * v + 0.5 * own + (1 - 1.5 - 0.5) * none
    v = torch.where(batch.dropped[:, None, None, None], v, guided)
    asked = torch.where(batch.dropped, null, labels)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, dudt = torch.func.jvp(
            lambda z, t, r: network(z, t, r, asked),
            (z, batch.t, batch.r),
            (v, torch.ones_like(batch.t), torch.zeros_like(batch.r)),
        )
    error = (u - (v - (batch.t - batch.r)[:, None, None, None] * dudt).detach()).square().sum((1, 2, 3))
    assert torch.allclose(found.squared_error, error, rtol=1e-4)
    network.zero_grad()
    found.mean.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_guiding_network_is_in_evaluation_mode_and_training_mode_returns():
    modes = []
    changes = {"guidance__omega_prime": 2.0, "guidance__omega": 2.0}
    _, network, loss, batch = small_loss(**changes)
    network.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    loss(batch)
    assert modes == [(False, False), (True, True)] and network.training


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"omega": 1.9}, "omega"),
        ({"kappa": 1.0}, "kappa"),
        ({"omega_prime": 0.0}, "omega_prime"),
        ({"t_start": 0.6, "t_end": 0.5}, "t_start"),
        ({"t_end": 1.5}, "t_end"),
        ({"label_drop": 1.0}, "label_drop"),
        ({"dropped": "some"}, "dropped"),
    ],
)
def test_contradictions_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        replace(guidance(2.0), **change)


def test_table_4_is_consistent():
    """ω′, ω and κ as Table 4 prints them."""
    for omega_prime, omega, kappa in ((2.0, 1.0, 0.5), (2.5, 0.2, 0.92)):
        assert GuidanceConfig(omega_prime, kappa, omega, 0.0, 1.0, 0.1, "official").omega == omega
