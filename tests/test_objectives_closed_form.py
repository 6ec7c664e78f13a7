"""Every objective against closed forms for Gaussian data, and against plain implementations that are written here.

With the marginal velocity in place of ε − x nothing is random, and at the true u the residual of an exact objective
vanishes; that of one with finite steps falls with the step.
"""

import math
from dataclasses import replace

import pytest
import torch
from gaussian import example
from method_helpers import DIT, UNET, assert_close, backbones, batch, loss_of, small, with_gradient

from meanflow.jvp import take_jvp, value_and_jvp
from meanflow.objectives import Objective
from meanflow.objectives.alphaflow import AlphaFlow
from meanflow.objectives.base import interpolate
from meanflow.objectives.consistency import Consistency
from meanflow.objectives.flowmatching import FlowMatching
from meanflow.objectives.meanflow import MeanFlow
from meanflow.objectives.shortcut import Shortcut
from meanflow.objectives.soflow import SoFlow, two_passes
from meanflow.objectives.splitmeanflow import SplitMeanFlow
from meanflow.sampling import sample
from meanflow.times import Times, mean_complement

DATA = example()
SQUARED_L2 = MeanFlow(p=0.0)
END = 1 - 1e-9  # of training
KINDS = Objective.kinds()
PLAIN_NETWORK = {"imeanflow": {"velocity": "boundary", "omega_max": 1.0}}  # u(z, r, t) alone: no other head or input
kinds = pytest.mark.parametrize("kind", KINDS)


def default(kind: str) -> Objective:
    return KINDS[kind](**PLAIN_NETWORK.get(kind, {}))


def drawn(objective, n: int = 256, seed: int = 0):
    """x, ε, r and t (float64) by the objective's own distribution, and what else it draws."""
    g = torch.Generator().manual_seed(seed)
    x = DATA.mean + DATA.std * torch.randn(n, 3, generator=g, dtype=torch.float64)
    eps = torch.randn(n, 3, generator=g, dtype=torch.float64)
    r, t = (time.double() for time in objective.sample_times(n, g))
    cond = {key: y.double() for key, y in objective.sample_cond(r, t, 0, g).items()}
    return x, eps, r, t, cond


def at_the_truth(objective, progress=END, seed=0, n=256, **change):
    """The `Loss` at the true u with the marginal velocity; `change`: of u, u → scale·u + shift."""
    x, eps, r, t, cond = drawn(objective, n, seed)
    v = DATA.velocity(interpolate(x, eps, t), t)
    scale, shift = change.get("scale", 1.0), change.get("shift", 0.0)

    def u(z, r, t, **cond):
        return scale * DATA.average_velocity(z, r, t) + shift

    jvp = take_jvp("func")
    return objective.loss(u, x, eps, r, t, v=v, jvp=jvp, progress=progress, teacher=u, **cond)


# --- what all objectives share -------------------------------------------------------------------------------------


@kinds
def test_the_true_u_is_a_stationary_point(kind):
    """The gradient by a scale and a shift of u: at the truth far smaller than near it, to the order of the steps."""
    norms = []
    for wrong in (0.0, 0.2):
        scale = torch.tensor(1.0 + wrong, dtype=torch.float64, requires_grad=True)
        shift = torch.full((3,), wrong, dtype=torch.float64, requires_grad=True)
        loss = at_the_truth(default(kind), scale=scale, shift=shift).mean
        norms.append(torch.cat([y.flatten() for y in torch.autograd.grad(loss, (scale, shift))]).norm())
    assert norms[0] < 0.05 * norms[1]


@kinds
def test_the_expected_gradient_at_the_true_u_is_zero(kind):
    """With the conditional velocity ε − x too, where no weight depends on the error: the mean over samples of
    the gradient by a shift of u, against its standard error and what a wrong u gives."""
    if kind in ("alphaflow", "consistency"):
        pytest.skip("always weighted by the error of the single sample: see the test above")
    objective = default(kind)
    objective = replace(objective, p=0.0) if "p" in vars(objective) else objective
    x, eps, r, t, cond = drawn(objective, 100_000)
    means = []
    for wrong in (0.0, 0.2):
        shift = torch.full((len(x), 3), wrong, dtype=torch.float64, requires_grad=True)

        def u(z, r, t, shift=shift, **cond):
            return DATA.average_velocity(z, r, t) + shift[: len(z)]

        loss = objective.loss(u, x, eps, r, t, jvp=take_jvp("func"), progress=END, teacher=u, **cond)
        (gradient,) = torch.autograd.grad(loss.per_sample.sum(), shift)
        means.append(gradient.mean(0))
    error = gradient.std(0) / len(x) ** 0.5
    assert (means[0].abs() < 4 * error + 0.02 * means[1].abs()).all()
    assert (means[1].abs() > 20 * error).all()


@kinds
def test_samples_of_the_true_u_have_the_datas_mean_and_covariance(kind):
    """In one step where u is a flow map; Euler's method needs many; noise added again in between changes nothing."""
    noise = torch.randn(20_000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sampler = KINDS[kind].sampler
    truth = DATA.flow(noise, torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64))
    steps = 100 if sampler == "euler" else 1
    x = sample(DATA.average_velocity, noise, steps, sampler=sampler)
    assert (x - truth).abs().max() < (0.2 if sampler == "euler" else 1e-9)
    g = torch.Generator().manual_seed(1)
    again = lambda k: torch.randn(noise.shape, generator=g, dtype=noise.dtype)  # noqa: E731
    for samples in (x, sample(DATA.average_velocity, noise, max(4, steps), sampler=sampler, noise=again)):
        assert (samples.mean(0) - DATA.mean).abs().max() < 0.03
        assert (torch.cov(samples.T) - torch.diag(DATA.std**2)).abs().max() < (0.15 if sampler == "euler" else 0.08)


# --- residuals at the truth ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective",
    [
        MeanFlow(),
        MeanFlow(tangent_velocity=0.7, time_weight=True),
        AlphaFlow(),
        SplitMeanFlow(),
        Consistency(),
        FlowMatching(),
    ],
    ids=lambda objective: objective.kind,
)
def test_exact_objectives_have_no_residual(objective):
    error = at_the_truth(objective).logged
    worst = error["error"] if "error" in error else error["error_r_eq_t"]
    assert worst.max() < 1e-16


def mean_residual(objective, progress=END) -> float:
    error, rows = at_the_truth(objective, progress).logged["error_r_lt_t"]
    return error[rows].sqrt().mean().item()


def order(residuals: list[float]) -> float:
    """p of a residual ∝ step^p, whose step is halved each time, from the last two."""
    return math.log2(residuals[-2] / residuals[-1])


def test_soflows_residual_is_of_first_order_in_its_step():
    rhos = [0.08, 0.04, 0.02, 0.01]
    residuals = [mean_residual(SoFlow(rho_start=rho, rho_end=rho)) for rho in rhos]
    assert order(residuals) == pytest.approx(1, abs=0.1)


def test_alphaflows_residual_is_of_second_order_and_so_first_beside_its_weight():
    """u − u_tgt is α(v̄ − v) and a second-order term: v̄ is the mean of the velocity over the step δ = α Δ."""
    objective, residuals = AlphaFlow(alpha_start=0.0, alpha_end=1.0, clamp=None), []
    for alpha in (0.08, 0.04, 0.02, 0.01):
        progress = 0.5 + math.log((1 - alpha) / alpha) / 25
        assert objective.alpha(progress) == pytest.approx(alpha)
        residuals.append(mean_residual(objective, progress))
    assert order(residuals) == pytest.approx(2, abs=0.15)


def test_shortcuts_residual_is_that_of_eulers_smallest_steps():
    """Two half steps of the true u are the whole step; only d = 1/64 rests on Euler steps, of first order."""
    residuals = []
    for finest in (64, 128, 256):
        loss = at_the_truth(Shortcut(finest=finest, ratio=1.0, clamp=None), n=2048)
        (error, _), (d, _) = loss.logged["error_r_lt_t"], loss.logged["d"]
        smallest = d < 3 / finest
        assert error[~smallest].max() < 1e-16
        residuals.append(error[smallest].sqrt().mean().item())
    assert order(residuals) == pytest.approx(1, abs=0.25)


# --- against each other -------------------------------------------------------------------------------------------


@backbones
def test_alpha_0_is_meanflow_bit_for_bit(config):
    net, b = small(config), batch(config)
    objective, size = AlphaFlow(), b.x[0].numel()
    assert objective.alpha(0.9) == 0
    found = with_gradient(net, loss_of(net, b, objective, progress=0.9))
    expected = with_gradient(net, loss_of(net, b, MeanFlow(p=1.0, c=1e-3 * size)))
    assert all(map(torch.equal, found, expected))


def test_alphaflow_takes_no_derivative_while_alpha_is_above_0():
    net, b, taken = small(), batch(), []

    def jvp(*args, rows, **kwargs):
        taken.append(int(rows.sum()))
        return value_and_jvp(*args, rows=rows, **kwargs)

    for progress in (0.0, 0.65, 0.9):
        taken.clear()
        loss_of(net, b, AlphaFlow(), jvp=jvp, progress=progress)
        assert taken == ([0] if progress == 0 else [0, 0] if progress == 0.65 else [5])


def test_the_schedule_of_alpha_is_a_snapped_sigmoid():
    objective = AlphaFlow(alpha_start=0.5, alpha_end=0.75)
    alphas = [objective.alpha(k / 1000) for k in range(1000)]
    assert alphas == sorted(alphas, reverse=True) and objective.alpha(0.625) == 0.5
    at_once = replace(objective, alpha_end=objective.alpha_start + 1e-3)
    assert (at_once.alpha(0.0), at_once.alpha(0.99)) == (1, 0)
    assert alphas[0] == 1 and alphas[-1] == 0
    between = [alpha for alpha in alphas if alpha not in (0, 1)]
    assert 0.005 <= min(between) < 0.006 and 0.994 < max(between) <= 0.995
    assert objective.alpha(0.6) == pytest.approx(1 - 1 / (1 + math.exp(-25 * (0.6 - 0.625) / 0.25)))


def test_alphaflow_clamps_its_target_in_guided_runs():
    net, b = small(), batch(r_eq_t=0)
    v = 30 * (b.eps - b.x)
    free = loss_of(net, b, AlphaFlow(clamp=None), v=v, progress=0.6)
    assert not torch.allclose(loss_of(net, b, AlphaFlow(), v=v, progress=0.6), free)
    unguided = [AlphaFlow().loss(net, b.x, 9 * b.eps, b.r, b.t, progress=0.6, **b.cond).per_sample for _ in range(2)]
    assert torch.equal(*unguided)
    assert torch.equal(
        unguided[0], AlphaFlow(clamp=None).loss(net, b.x, 9 * b.eps, b.r, b.t, progress=0.6, **b.cond).per_sample
    )


def test_soflow_has_meanflows_gradient_as_rho_falls():
    """To first order: the difference halves with ρ. SoFlow's gradient has half the factor, and a mean for the sum."""
    net, b = small(DIT), batch(DIT, r_eq_t=0)
    b = replace(b, r=b.r * 0.5)
    _, expected = with_gradient(net, loss_of(net, b, MeanFlow(p=0.0)))
    differences = []
    for rho in (0.008, 0.004):
        _, found = with_gradient(net, loss_of(net, b, SoFlow(rho_start=rho, rho_end=rho, p=0.0)))
        differences.append(((2 * b.x[0].numel() * found - expected).norm() / expected.norm()).item())
    assert differences[1] < 0.02 and order(differences) == pytest.approx(1, abs=0.2)


def test_the_tangents_velocity_changes_the_derivative_alone():
    """β = 0 is the paper's loss, and r = t does not notice β. The target is linear in β, so the error is quadratic."""
    net, b = small(), batch()
    errors = [loss_of(net, b, MeanFlow(p=0.0, tangent_velocity=beta)) for beta in (0.0, 0.25, 0.5, 0.75, 1.0)]
    assert torch.equal(errors[0], loss_of(net, b, SQUARED_L2))
    rows = b.r != b.t
    assert all(torch.equal(error[~rows], errors[0][~rows]) for error in errors)
    third = errors[3] - 3 * errors[2] + 3 * errors[1] - errors[0]
    assert (third[rows].abs() < 1e-9 * errors[0][rows]).all()
    assert ((errors[4] - errors[0])[rows].abs() > 1e-3 * errors[0][rows]).all()


def test_the_time_weight_has_mean_1_and_prefers_short_intervals_first():
    times = Times(ratio=0.75)
    r, t = (time.double() for time in times.sample(100_000, torch.Generator().manual_seed(5)))
    interval, rows = t - r, r != t
    assert mean_complement(times) == pytest.approx((1 - interval[rows]).mean().item(), abs=3e-3)
    assert mean_complement(Times(distribution="uniform")) == pytest.approx(2 / 3, abs=2e-3)
    objective = MeanFlow(times=times, time_weight=True)
    for progress, expected in ((0.0, (1 - interval) / mean_complement(times)), (1.0, torch.ones_like(interval))):
        weight = objective._time_weight(r, t, progress)
        assert torch.allclose(weight, expected) and weight[rows].mean().item() == pytest.approx(1, abs=5e-3)
    net, b = small(), batch()
    plain, weighted = (loss_of(net, b, MeanFlow(time_weight=on)) for on in (False, True))
    assert torch.equal(plain[b.r == b.t], weighted[b.r == b.t])
    expected = plain * (1 - (b.t - b.r)) / mean_complement(Times())
    assert torch.allclose(weighted[b.r != b.t], expected[b.r != b.t])


# --- against plain implementations, on both backbones, r = t anywhere -------------------------------


def plain_alphaflow(u, x, eps, r, t, objective, progress, v=None):
    alpha, v = objective.alpha(progress), eps - x if v is None else v
    losses = []
    for i in range(len(x)):
        xi, ei, ri, ti, vi = x[i : i + 1], eps[i : i + 1], r[i : i + 1], t[i : i + 1], v[i : i + 1]
        z = (1 - ti) * xi + ti * ei
        with torch.no_grad():
            s = ti - alpha * (ti - ri)
            target = vi if ri == ti else alpha * vi + (1 - alpha) * u(i, z - (ti - s) * vi, ri, s)
        e = ((u(i, z, ri, ti) - target) ** 2).mean()
        losses.append((1.0 if ri == ti else alpha) * e / (e.detach() + objective.c))
    return torch.stack(losses)


def plain_soflow(u, x, eps, r, t, objective, progress):
    losses, rho = [], objective.rho_start * (objective.rho_end / objective.rho_start) ** progress
    for i in range(len(x)):
        xi, ei, ri, ti = x[i : i + 1], eps[i : i + 1], r[i : i + 1], t[i : i + 1]
        z, v = (1 - ti) * xi + ti * ei, ei - xi
        out = u(i, z, ri, ti)
        if ri == ti:
            e = ((out - v) ** 2).mean()
            losses.append(e / (e.detach() + objective.c) ** objective.p)
            continue
        with torch.no_grad():
            s = torch.minimum(ti + (ri - ti) * rho, ti - 1e-4)
            z_s = z + (s - ti) * v
            delta = (z + (ri - ti) * out - z_s - (ri - s) * u(i, z_s, ri, s)) / (ti - s)
            weight = 1 / ((delta**2).mean() + objective.c) ** objective.p
        losses.append(-(out * weight * delta).mean())
    return torch.stack(losses)


def plain_splitmeanflow(u, x, eps, r, t, objective, progress, split):
    losses = []
    for i in range(len(x)):
        xi, ei, ri, ti, share = x[i : i + 1], eps[i : i + 1], r[i : i + 1], t[i : i + 1], split[i]
        z, target = (1 - ti) * xi + ti * ei, ei - xi
        if ri != ti:
            with torch.no_grad():
                s = (1 - share) * ti + share * ri
                second = u(i, z, s, ti)
                target = (1 - share) * u(i, z - (ti - s) * second, ri, s) + share * second
        losses.append(((u(i, z, ri, ti) - target) ** 2).sum())
    return torch.stack(losses)


def plain_shortcut(u, x, eps, r, t, objective, progress):
    losses = []
    for i in range(len(x)):
        xi, ei, ri, ti = x[i : i + 1], eps[i : i + 1], r[i : i + 1], t[i : i + 1]
        z, target = (1 - ti) * xi + ti * ei, ei - xi
        if ri != ti:
            half = (ti - ri) / 2
            with torch.no_grad():
                first = u(i, z, ti if half == 1 / 128 else ti - half, ti)
                middle = ti - half
                second = u(i, z - half * first, middle if half == 1 / 128 else ri, middle)
                target = ((first + second) / 2).clamp(-4, 4)
        losses.append(((u(i, z, ri, ti) - target) ** 2).mean())
    return torch.stack(losses)


def plain_flowmatching(u, x, eps, r, t, objective, progress):
    each = [
        ((u(i, (1 - t[i]) * x[[i]] + t[i] * eps[[i]], t[[i]], t[[i]]) - eps[i] + x[i]) ** 2).sum()
        for i in range(len(x))
    ]
    return torch.stack(each)


PLAIN = [
    (AlphaFlow(), plain_alphaflow, 0.0),
    (AlphaFlow(), plain_alphaflow, 0.66),
    (SoFlow(), plain_soflow, 0.3),
    (SoFlow(p=0.75, c=1e-3, rho_start=1.0, rho_end=0.1), plain_soflow, 0.0),
    (SplitMeanFlow(), plain_splitmeanflow, 0.0),
    (Shortcut(), plain_shortcut, 0.0),
    (FlowMatching(), plain_flowmatching, 0.0),
    (MeanFlow(tangent_velocity=0.7, time_weight=True), None, 0.4),
    (Consistency(), None, 0.03),
    (Consistency(rho_warmup=0.0), None, 0.0),
]


@pytest.mark.parametrize(
    ("config", "dtype", "tolerance"), [(UNET, torch.float32, 1e-5), (DIT, torch.float64, 1e-10)], ids=["unet", "dit"]
)
@pytest.mark.parametrize(("objective", "plain", "progress"), PLAIN, ids=[f"{o.kind}-{p}" for o, _, p in PLAIN])
def test_equals_its_plain_form(objective, plain, progress, config, dtype, tolerance):
    net, b = small(config, dtype), batch(config, dtype)
    if objective.kind == "shortcut":  # on its own grid, d = 1/64 and a longer one
        d = torch.tensor([1 / 64, 1 / 4, 1, 1 / 2, 1 / 8], dtype=dtype)
        rows = b.r != b.t
        b.t[rows] = torch.tensor([5 / 64, 3 / 4, 1, 1, 1 / 8], dtype=dtype)
        b.r[rows] = b.t[rows] - d
    extra = objective.sample_cond(b.r, b.t, 0, torch.Generator().manual_seed(2))
    extra = {key: y.to(dtype) for key, y in extra.items()}
    found = with_gradient(net, loss_of(net, b, objective, progress=progress, teacher=net, **extra))
    if plain is None:
        expected = loss_of(net, b, objective, plain=True, progress=progress)
    else:

        def u(i, z, r, t):
            return net(z, r, t, **{key: y[i : i + 1] for key, y in b.cond.items()})

        expected = plain(u, b.x, b.eps, b.r, b.t, objective, progress, *extra.values())
    expected = with_gradient(net, expected)
    if objective.kind == "soflow" and dtype == torch.float32:
        tolerance = 3e-4  # the plain form divides a difference of two nearly equal f by t − l
    assert_close(found, expected, tolerance)


# --- what is particular ---------------------------------------------------------------------------------------------


def test_the_times_of_shortcuts_are_dyadic():
    r, t = Shortcut().sample_times(8000, torch.Generator().manual_seed(0))
    d, rows = t - r, r != t
    assert rows.sum() == 1000 and (t > 0).all() and (t <= 1).all() and (r >= 0).all()
    assert torch.equal(t[~rows] * 128, (t[~rows] * 128).round()) and len(t[~rows].unique()) == 128
    steps, counts = d[rows].unique(return_counts=True)
    assert steps.tolist() == [2.0**-k for k in range(6, -1, -1)]
    assert counts.min() > 100  # of about 143
    assert torch.equal(t[rows] / d[rows], (t[rows] / d[rows]).round())


def test_the_times_of_soflow():
    objective = SoFlow(ratio=0.5)
    r, t = objective.sample_times(20_000, torch.Generator().manual_seed(0))
    rows = r != t
    assert rows.sum() == 10_000 and (t[rows] - r[rows] > 0.9e-4).all() and (r >= 0).all() and (t <= 1).all()
    logit = t[rows].double().logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((0.2, 0.8), abs=0.03)
    logit = t[~rows].double().logit()
    assert (logit.mean().item(), logit.std().item()) == pytest.approx((-0.2, 1.0), abs=0.03)
    assert SoFlow(rho_start=1.0, rho_end=0.01).rho(0.5) == pytest.approx(0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_both_passes_of_soflow_have_the_same_dropout_masks(checkpointing):
    """At equal inputs the two outputs are equal to the bit, in every order of samples, also recomputed ones."""
    from meanflow.training.step import RUN_BLOCK

    net = small(replace(UNET, dropout=0.5), torch.float32).train()
    b = batch(UNET, torch.float32)
    z = interpolate(b.x, b.eps, b.t)
    run_block = RUN_BLOCK["blocks" if checkpointing else None]

    def u(*args, **kwargs):
        return net(*args, run_block=run_block, **kwargs)

    for order in (torch.arange(8), torch.argsort((b.r == b.t).int(), stable=True)):
        cond = {key: y[order] for key, y in b.cond.items()}
        zs, ts = (z[order], z[order]), (b.t[order], b.t[order])
        out, again = two_passes(u, zs, b.r[order], ts, **cond)
        rows = b.r[order] != b.t[order]
        assert torch.equal(out[rows], again[rows]) and not again[~rows].any() and not again.requires_grad
        assert not torch.equal(out[rows], u(z[order], b.r[order], b.t[order], **cond)[rows])
    out.sum().backward()


def test_consistency_warms_its_tangent_up():
    objective = Consistency(rho_warmup=0.2)
    assert [objective.rho(progress) for progress in (0.0, 0.1, 0.2, 0.9)] == [0, 0.5, 1, 1]
    r, t = objective.sample_times(50, torch.Generator().manual_seed(0))
    assert not r.any() and len(t.unique()) == 50


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MeanFlow(tangent_velocity=1.5), "tangent_velocity must be"),
        (lambda: AlphaFlow(alpha_start=0.8, alpha_end=0.5), "alpha_start < alpha_end"),
        (lambda: AlphaFlow(c=0.0), "c must be > 0"),
        (lambda: AlphaFlow(clamp=-1.0), "clamp must be"),
        (lambda: SoFlow(rho_start=0.1, rho_end=0.2), "rho_start ≥ rho_end"),
        (lambda: SoFlow(ratio=2.0), "ratio must be"),
        (lambda: SplitMeanFlow(times=Times(ratio=0.75)), r"times.ratio must be 0.5 at most"),
        (lambda: SplitMeanFlow(p=-1.0), "p must be"),
        (lambda: Shortcut(finest=100), "finest must be a power of two"),
        (lambda: Shortcut(teacher_ema=1.0), "teacher_ema must be"),
        (lambda: Consistency(rho_warmup=2.0), "rho_warmup must be"),
        (lambda: FlowMatching(c=0.0), "c must be"),
        (lambda: Shortcut().loss(None, torch.zeros(1, 2), torch.zeros(1, 2), torch.zeros(1), torch.ones(1)), "teacher"),
    ],
)
def test_impossible_settings_name_themselves(make, message):
    with pytest.raises(ValueError, match=message):
        make()
