"""Guidance in the target (Eqs. 19–21) against closed forms: class-conditional Gaussians, whose velocities are known."""

import itertools
from dataclasses import replace

import pytest
import torch
from gaussian import Gaussian
from method_helpers import loss_of, perturbed
from running import guided_latent_changes, tiny_config

from meanflow.guidance import GuidanceConfig, drop_labels, guided_velocity
from meanflow.objectives.base import interpolate
from meanflow.objectives.meanflow import MeanFlow
from meanflow.times import Times
from meanflow.training.batches import random_batch
from meanflow.training.state import build_network
from meanflow.training.step import make_loss

NULL = 2
CPU = torch.device("cpu")


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
        marginal, null = self.marginal(z, t), labels == NULL
        conditional = self.conditional(z, t, torch.where(null, 0, labels))
        return torch.where(null[:, None], marginal, scale * conditional + (1 - scale) * marginal)

    def network(self, scale, calls=None):
        """u(z, r, t | c) = v^cfg, as a network that is trained to the end has it where r = t."""

        def u(z, r, t, class_labels):
            assert torch.equal(r, t)
            if calls is not None:
                assert not torch.is_grad_enabled()
                calls.append(class_labels.tolist())
            return self.guided(z, t, class_labels, scale)

        return u


def draw(n=64):
    g = torch.Generator().manual_seed(0)
    z = torch.randn(n, 3, generator=g, dtype=torch.float64)
    t = torch.rand(n, generator=g, dtype=torch.float64)
    return Classes(), z, t, torch.randint(2, (n,), generator=g)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 0.92])
def test_target_velocity_is_v_cfg(kappa, batched):
    """With v(z, t | c) for its mean ε − x and a network at its goal, Eq. (21) gives v^cfg of scale ω′, whatever κ.
    The loss at r = t is then zero."""
    classes, z, t, labels = draw()
    v, u = classes.conditional(z, t, labels), classes.network(2.5)
    config, mask = GuidanceConfig(2.5, kappa), torch.zeros(64, dtype=torch.bool)
    found = guided_velocity(u, z, t, v, mask, NULL, config, batched, class_labels=labels)
    assert torch.allclose(found, classes.guided(z, t, labels, 2.5), atol=1e-12)
    x, eps = z - t[:, None] * v, z + (1 - t[:, None]) * v  # that z_t and ε − x are these
    for target, vanishes in ((found, True), (None, False)):
        loss = MeanFlow(p=0.0).loss(u, x, eps, t, t, v=target, class_labels=labels).per_sample
        assert (loss.max() < 1e-20) == vanishes


@pytest.mark.parametrize("batched", [False, True])
def test_a_scale_that_fades_is_soflows_guided_velocity(batched):
    """m (v + d(t) (w − 1) (v − v_∅)) + (1 − m) v̂ with m = 1 − κ; d is 1 up to 0.8 and 0 at t = 1."""
    classes, z, t, labels = draw()
    t[:2] = torch.tensor([1.0, 0.8])
    v, u, w, m = z.sin(), classes.network(2.5), 3.0, 0.25
    config, mask = GuidanceConfig(w, 1 - m, fade_from=0.8), torch.zeros(64, dtype=torch.bool)
    found = guided_velocity(u, z, t, v, mask, NULL, config, batched, class_labels=labels)
    own, null = (u(z, t, t, y) for y in (labels, torch.full_like(labels, NULL)))
    tau = (1 - t) / 0.2
    d = torch.where(t > 0.8, 1 - torch.exp(-0.025 * tau / (1 - tau)), 1.0)[:, None]
    assert d.min() == 0 and ((d > 0) & (d < 1)).any()
    assert torch.allclose(found, m * (v + d * (w - 1) * (v - null)) + (1 - m) * own, atol=1e-12)


@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize(
    ("config", "passes"),
    [
        (GuidanceConfig(), []),
        (GuidanceConfig(2.0), [[NULL] * 4]),
        (GuidanceConfig(2.0, 0.25), [[0, 1, 0, 1], [NULL] * 4]),
        (GuidanceConfig(2.0, 0.5, t_end=0.5), [[0, 1], [NULL] * 2]),
        (GuidanceConfig(2.0, t_start=0.2, t_end=0.7), [[NULL] * 2]),  # both included
        (GuidanceConfig(1.0, 0.5), [[0, 1, 0, 1]]),
    ],
)
def test_passes_are_made_for_those_that_need_them(config, passes, batched):
    """The last two of six samples are unconditional. ω = 1, κ = 0 needs no pass; 1 − ω − κ = 0 none for ∅."""
    (classes, z, *_), calls = draw(6), []
    t = torch.tensor([0.1, 0.2, 0.7, 0.8, 0.3, 1.0], dtype=torch.float64)
    labels, mask = torch.tensor([0, 1, 0, 1, 0, 1]), torch.arange(6) > 3
    v, u = classes.conditional(z, t, labels), classes.network(2.0, calls)
    found = guided_velocity(u, z, t, v, mask, NULL, config, batched, class_labels=labels)
    assert calls == ([[*itertools.chain(*passes)]] if batched and passes else passes)
    untouched = mask | (t < config.t_start) | (t > config.t_end)
    assert torch.equal((found == v).all(1), untouched if passes else torch.ones(6, dtype=torch.bool))


@pytest.mark.parametrize("r_eq_t", [0, 3, 40, 100])
def test_official_drops_fall_on_r_equal_t_first(r_eq_t):
    t = torch.rand(100)
    r = torch.where(torch.arange(100) < r_eq_t, t, t / 2)
    for seed in range(20):
        number = int((torch.rand(100, generator=torch.Generator().manual_seed(seed)) < 0.2).sum())
        found = drop_labels(r, t, GuidanceConfig(label_drop=0.2), torch.Generator().manual_seed(seed))
        assert int(found.sum()) == number
        assert int((found & (r == t)).sum()) == min(number, r_eq_t)


def test_independent_drops_fall_anywhere_with_their_probability():
    r, t = Times().sample(40_000, torch.Generator().manual_seed(0))
    found = drop_labels(r, t, GuidanceConfig(unconditional_rows="any"), torch.Generator().manual_seed(1))
    for group in (r == t, r != t):
        assert found[group].float().mean() == pytest.approx(0.1, abs=0.008)
    assert not drop_labels(r, t, GuidanceConfig(label_drop=0.0), torch.Generator()).any()


def small_loss(**guidance):
    """A guided config, a network as after training, the loss, a batch, and its labels with the null class."""
    config = tiny_config(**guided_latent_changes())
    config = replace(config, guidance=replace(config.guidance, **guidance))
    network = perturbed(build_network(config, CPU)).train()
    b = random_batch(config, 12, CPU)
    assert b.unconditional.any()
    masked = torch.where(b.unconditional, config.model.classes, b.cond["class_labels"])
    return network, make_loss(network, config, CPU), b, masked, config


def test_no_guidance_is_the_unguided_loss_bit_for_bit():
    """ω = 1, κ = 0: the same as guidance: null on labels that were dropped alike."""
    network, loss, b, masked, config = small_loss(label_drop=0.3)
    unguided = loss_of(network, replace(b, cond={"class_labels": masked}), config.objective)
    assert torch.equal(loss(b).per_sample, unguided)


@pytest.mark.parametrize("kappa", [0.0, 0.5])
def test_the_loss_takes_the_guided_velocity_as_tangent_and_target(kappa):
    """Against the specification with v replaced: Eq. (21), and Eq. (19), ω (ε − x) + (1 − ω) u, where κ = 0."""
    network, loss, b, masked, config = small_loss(omega_prime=3.0, kappa=kappa, label_drop=0.3)
    labels, v, z = b.cond["class_labels"], b.eps - b.x, interpolate(b.x, b.eps, b.t)
    with torch.no_grad():
        conditional, null = (network(z, b.t, b.t, y) for y in (labels, torch.full_like(labels, config.model.classes)))
    guided = 1.5 * v + 0.5 * conditional + (1 - 1.5 - 0.5) * null if kappa else 3 * v + (1 - 3) * null
    v = torch.where(b.unconditional[:, None, None, None], v, guided)
    expected = config.objective.plain(network, b.x, b.eps, b.r, b.t, v=v, class_labels=masked)
    found = loss(b)
    assert torch.allclose(found.per_sample, expected, rtol=1e-4)
    found.mean.backward()
    assert all(p.grad is not None for p in network.parameters())


def test_the_guiding_network_is_in_evaluation_mode_and_training_mode_returns():
    network, loss, b, *_ = small_loss(omega_prime=2.0, label_drop=0.3)
    modes = []
    network.register_forward_hook(lambda module, *_: modes.append((module.training, torch.is_grad_enabled())))
    loss(b)
    assert modes == [(False, False), (True, True)] and network.training


def test_table_4_is_consistent():
    """ω′, ω and κ as Table 4 prints them."""
    for omega_prime, omega, kappa in ((2.0, 1.0, 0.5), (2.5, 0.2, 0.92)):
        assert GuidanceConfig(omega_prime, kappa).omega == pytest.approx(omega, rel=1e-12)
