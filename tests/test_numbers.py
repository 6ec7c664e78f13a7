"""The same numbers: every fast path of the step against `eval.bench`'s plain one (one full-batch torch.func.jvp)."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from meanflow.training.network import build_network
from running import guided_latent_changes, tiny_config

from eval.benchmark.steps import plain_loss, plain_tangent, separate_tangent
from meanflow.dual import value_of
from meanflow.jvp import JVPS
from meanflow.training.estimate import random_batch
from meanflow.training.step import make_loss

UNET = {"model__attention": [4], "model__multipliers": [1, 2], "model__dropout": 0.2}
DIT = guided_latent_changes()
CPU = torch.device("cpu")


def case(changes, dtype=torch.float32, batch=8, seed=0, **more):
    """A config without guidance, a network as after training (nothing is zero), and a batch."""
    config = replace(tiny_config(**{**changes, **more}, train__batch=batch, seed=seed), guidance=None)
    network = build_network(replace(config, seed=0), CPU).to(dtype).train()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.1 * torch.randn_like(p))
    micro = random_batch(config, batch, CPU)
    cond = {key: y.to(dtype) if y.is_floating_point() else y for key, y in micro.cond.items()}
    x, eps, t, r = (y.to(dtype) for y in (micro.x, micro.eps, micro.t, micro.r))
    return config, network, replace(micro, x=x, eps=eps, t=t, r=r, cond=cond)


def loss_and_gradient(network, loss, batch):
    network.zero_grad()
    torch.manual_seed(5)  # of dropout
    out = loss(batch)
    out.mean.backward()
    return out.weighted.detach(), torch.cat([p.grad.flatten() for p in network.parameters()])


def plain(network, config, batch, tangent=plain_tangent):
    return loss_and_gradient(network, lambda batch: plain_loss(tangent, network, batch, config.loss), batch)


def assert_close(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() <= tolerance * b.norm()


@pytest.fixture
def masks_by_position(monkeypatch):
    """Dropout masks that do not depend on the memory format, which the plain step changes on its way."""

    def dropout(x, p, training):
        return x * torch.empty(x.shape, dtype=x.dtype).bernoulli_(1 - p).div_(1 - p) if training and p else x

    monkeypatch.setattr(F, "dropout", dropout)


@pytest.mark.parametrize("changes", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("way", ["dual", "dual, recomputed"])
def test_dual_numbers_equal_the_plain_step_with_the_same_dropout_masks(
    masks_by_position, changes, dtype, tolerance, way
):
    recomputed = {"train__activation_checkpointing": way.endswith("recomputed")}
    config, network, batch = case(changes, dtype, **recomputed)
    ours = loss_and_gradient(network, make_loss(network, config, CPU), batch)
    assert_close(ours, plain(network, config, batch), tolerance)
    network.eval()  # the masks were there
    assert changes is DIT or not torch.allclose(ours[0], plain(network, config, batch)[0], rtol=1e-4)


@pytest.mark.parametrize("changes", [{**UNET, "model__dropout": 0.0}, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
def test_ways_that_split_the_batch_equal_the_plain_step(changes, dtype, tolerance):
    """Their dropout masks are others, since the rows with r = t go through the network apart."""
    for jvp in JVPS:
        config, network, batch = case(changes, dtype, train__jvp=jvp)
        expected = plain(network, config, batch)
        assert_close(loss_and_gradient(network, make_loss(network, config, CPU), batch), expected, tolerance)
    assert_close(plain(network, config, batch, separate_tangent), expected, tolerance)


def test_micro_batches_add_up_to_the_plain_step():
    config, network, batch = case({**UNET, "model__dropout": 0.0}, torch.float64)
    loss, parts = make_loss(network, config, CPU), []
    for rows in (slice(0, 8, 2), slice(1, 8, 2)):
        cond = {key: y[rows] for key, y in batch.cond.items()}
        part = replace(batch, x=batch.x[rows], eps=batch.eps[rows], t=batch.t[rows], r=batch.r[rows], cond=cond)
        parts.append(loss_and_gradient(network, loss, part)[1])
    expected = plain(network, config, batch)[1]
    assert (sum(parts) / 2 - expected).norm() <= 1e-10 * expected.norm()


@pytest.mark.parametrize("changes", [{"model__dropout": 0.2}, DIT], ids=["unet", "dit"])
def test_bf16_is_near_float32_and_unbiased(changes):
    """Over 64 batches: how far off it is, and that being off has no direction."""
    away, loss_off, along = [], [], []
    for k in range(64):
        config, network, batch = case(changes, seed=k, train__precision="bf16")
        exact = loss_and_gradient(network, make_loss(network, tiny_like(config, "fp32"), CPU), batch)
        rough = loss_and_gradient(network, make_loss(network, config, CPU), batch)
        away.append([((a - b).norm() / b.norm()).item() for a, b in zip(rough, exact, strict=True)])
        loss_off.append((rough[0].mean() / exact[0].mean() - 1).item())
        along.append(((rough[1] @ exact[1]) / (exact[1] @ exact[1]) - 1).item())
    assert 0 < torch.tensor(away).mean(0).max() <= 3e-2
    for off in map(torch.tensor, (loss_off, along)):
        assert off.mean().abs() <= 3 * off.std() / 64**0.5 + 1e-3


@pytest.mark.parametrize("changes", [UNET, DIT], ids=["unet", "dit"])
@pytest.mark.parametrize("still", [False, True])
def test_bf16_rounds_neither_the_conditioning_nor_what_the_network_returns(changes, still):
    config, network, batch = case(changes, train__precision="bf16")
    embedded, returned, embed = [], [], network.embed

    def watched(*args):
        embedded.append(embed(*args))
        return embedded[-1]

    network.embed = watched
    network.register_forward_hook(lambda module, args, out: returned.append(out))
    for precision in ("fp32", "bf16"):
        r = batch.t if still else batch.r
        make_loss(network, tiny_like(config, precision), CPU)(replace(batch, r=r))
    assert torch.equal(*map(value_of, embedded))
    for out in returned:
        assert all(part.dtype == torch.float32 for part in ([out.value, out.tangent] if not still else [out]))
    assert not torch.equal(*map(value_of, returned))  # but bf16 it was


def tiny_like(config, precision):
    return replace(config, train=replace(config.train, precision=precision))
