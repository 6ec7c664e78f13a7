"""The same numbers: each way of computing a step's loss against the objective's specification, `Objective.plain`."""

import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from method_helpers import assert_close, loss_of, perturbed, precisions, selected, with_gradient
from running import guided_latent_changes, tiny_config

from eval.benchmark.steps import separate_jvp
from meanflow.data import Dataset
from meanflow.dual import value_of
from meanflow.jvp import value_and_jvp
from meanflow.training.batches import BatchStream, random_batch
from meanflow.training.processes import DistributedContext
from meanflow.training.state import build_network
from meanflow.training.step import make_loss

UNET = {"model__attention": [4], "model__multipliers": [1, 2]}
DIT = guided_latent_changes()
CPU = torch.device("cpu")
backbones = pytest.mark.parametrize("changes", [UNET, DIT], ids=["unet", "dit"])


def case(changes, dtype=torch.float32, size=8, seed=0, **more):
    """A config without guidance, a network as after training, and a batch."""
    config = replace(tiny_config(**{**changes, **more}, seed=seed), guidance=None)
    network = perturbed(build_network(replace(config, seed=0), CPU).to(dtype).train())
    b = random_batch(config, size, CPU)
    cond = {key: y.to(dtype) if y.is_floating_point() else y for key, y in b.cond.items()}
    x, eps, r, t = (y.to(dtype) for y in (b.x, b.eps, b.r, b.t))
    return config, network, replace(b, x=x, eps=eps, r=r, t=t, cond=cond)


def ours(network, config, b, **train):
    """Losses and gradient by `make_loss`, under other settings of `train`, such as precision."""
    torch.manual_seed(5)  # of dropout
    config = replace(config, train=replace(config.train, **train))
    return with_gradient(network, make_loss(network, config, CPU)(b).per_sample)


def plain(network, config, b):
    torch.manual_seed(5)
    return with_gradient(network, loss_of(network, b, config.objective, plain=True))


@pytest.mark.parametrize("checkpointing", [None, "cheap", "blocks"])
@precisions
@backbones
def test_dual_numbers_equal_the_plain_step_with_the_same_dropout_masks(
    monkeypatch, changes, dtype, tolerance, checkpointing
):
    def dropout(x, p, training):  # its masks do not depend on the memory format, which the plain step changes
        return x * torch.empty(x.shape, dtype=x.dtype).bernoulli_(1 - p).div_(1 - p) if training and p else x

    monkeypatch.setattr(F, "dropout", dropout)
    changes = {**changes, "model__dropout": 0.2} if changes is UNET else changes
    config, network, b = case(changes, dtype)
    found = ours(network, config, b, activation_checkpointing=checkpointing)
    assert_close(found, plain(network, config, b), tolerance)
    network.eval()  # the masks were there
    assert changes is DIT or not torch.allclose(found[0], plain(network, config, b)[0], rtol=1e-4)


@pytest.mark.parametrize("way", ["func", "separate"])
@precisions
@backbones
def test_every_derivative_equals_the_plain_step(changes, dtype, tolerance, way):
    config, network, b = case(changes, dtype)
    if way == "separate":
        jvp = functools.partial(value_and_jvp, take=separate_jvp)
        found = with_gradient(network, loss_of(network, b, config.objective, jvp=jvp))
    else:
        found = ours(network, config, b, jvp=way)
    assert_close(found, plain(network, config, b), tolerance)


def test_micro_batches_add_up_to_the_plain_step():
    config, network, b = case(UNET, torch.float64)
    parts = [ours(network, config, selected(b, slice(k, 8, 2)))[1] for k in range(2)]
    assert_close([sum(parts) / 2], [plain(network, config, b)[1]], 1e-10)


@pytest.mark.parametrize("changes", [{"model__dropout": 0.2}, DIT], ids=["unet", "dit"])
def test_bf16_is_near_float32_and_unbiased(changes):
    """Over 64 batches: how far off it is, and that being off has no direction."""
    away, loss_off, along = [], [], []
    for k in range(64):
        config, network, b = case(changes, seed=k)
        exact, rough = (ours(network, config, b, precision=precision) for precision in ("fp32", "bf16"))
        away.append([((a - b).norm() / b.norm()).item() for a, b in zip(rough, exact, strict=True)])
        loss_off.append((rough[0].mean() / exact[0].mean() - 1).item())
        along.append(((rough[1] @ exact[1]) / (exact[1] @ exact[1]) - 1).item())
    assert 0 < torch.tensor(away).mean(0).max() <= 3e-2
    for off in map(torch.tensor, (loss_off, along)):
        assert off.mean().abs() <= 3 * off.std() / 64**0.5 + 1e-3


@pytest.mark.parametrize("flow_matching", [False, True])
@backbones
def test_bf16_rounds_neither_the_conditioning_nor_what_the_network_returns(changes, flow_matching):
    config, network, b = case(changes)
    embedded, returned, embed = [], [], network.embed
    network.embed = lambda *args: embedded.append(embed(*args)) or embedded[-1]
    network.register_forward_hook(lambda module, args, out: returned.append(out))
    for precision in ("fp32", "bf16"):
        ours(network, config, replace(b, r=b.t) if flow_matching else b, precision=precision)
    assert torch.equal(*map(value_of, embedded))
    for out in returned:
        assert all(part.dtype == torch.float32 for part in ([out] if flow_matching else [out.value, out.tangent]))
    assert not torch.equal(*map(value_of, returned))  # but bf16 it was


def test_dropout_masks_belong_to_a_step_a_process_and_a_micro_batch():
    """No two of these share a mask, and a step that is computed again has the same."""
    config = tiny_config(model__dropout=0.5, train__microbatch=2, objective__times__ratio=0.0)
    network, images = build_network(config, CPU).train(), torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    loss, masks = make_loss(network, config, CPU), []
    network.dec["8x8_block0"].conv1.register_forward_pre_hook(lambda module, args: masks.append(args[0] == 0))
    for step, rank in [(0, 0), (0, 1), (1, 0), (1, 1), (0, 0), (1, 1)]:
        stream = BatchStream(Dataset(images, None, ()), config, DistributedContext(rank, 2, CPU))
        for b in stream.micro_batches(step):
            loss(b)
    assert len(masks) == 12 and all(0.3 < mask.float().mean() < 0.7 for mask in masks)
    assert not any(torch.equal(a, b) for i, a in enumerate(masks[:8]) for b in masks[:i])
    assert all(map(torch.equal, masks[8:], masks[:2] + masks[6:8]))
