"""What a step costs on a GPU, counted without one: layout copies, kernels, shapes, activations; and micro-batches."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from method_helpers import UNET, assert_close, batch, loss_of, small, with_gradient
from running import ROOT, guided_latent_changes, tiny_config

import unet.layers
from meanflow.dual import Dual
from meanflow.errors import ConfigError, IncompleteError
from meanflow.jvp import PARTS, _padded, _ValueAndTangent, dual_jvp, plain_operations, rounded_rows, value_and_jvp
from meanflow.random import generator
from meanflow.training import costs, microbatch
from meanflow.training.batches import random_batch
from meanflow.training.compiling import mode_of_step
from meanflow.training.config import RunConfig, load_config
from meanflow.training.costs import LiveBytes, StepMemory, step_launches, step_memory
from meanflow.training.loop import train
from meanflow.training.microbatch import with_last_microbatch, with_microbatch
from meanflow.training.run_folder import RunFolder
from meanflow.training.setup import set_up
from meanflow.training.state import build_network
from meanflow.training.step import in_training_precision, make_loss

META, CPU = torch.device("meta"), torch.device("cpu")


def recipe_of(name: str, *overrides: str) -> RunConfig:
    return load_config(ROOT / "recipes" / f"{name}.yaml", overrides)


def meta_loss(config: RunConfig):
    return make_loss(build_network(config, META).train(), config, META)


# --- layout -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_the_norm_of_gpus_is_that_of_the_kernel(monkeypatch, dtype, tolerance):
    """Values, gradients and tangents of the whole U-net."""
    net, b, found = small(UNET, dtype), batch(UNET, dtype), []
    for kernel in (True, False):
        monkeypatch.setattr(unet.layers, "has_kernel", lambda x, kernel=kernel: kernel)
        torch.manual_seed(5)
        primals, tangents = (b.x, b.r, b.t), (b.eps - b.x, 0.0, 1.0)
        dudt = value_and_jvp(net, primals, tangents, rows=b.r != b.t, **b.cond)[1]
        torch.manual_seed(5)
        found.append([dudt, *with_gradient(net, loss_of(net, b))])
    assert_close(*found, tolerance * 50)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-12)])
def test_resampling_by_matrices_is_that_by_convolutions(dtype, tolerance):
    """Values, gradients and tangents, for both directions; the memory format stays."""
    for resample, side in (("down", 8), ("up", 4), ("down", 2)):
        forms = [unet.layers.Conv(6, 4, 3, resample, side=given).to(dtype) for given in (0, side)]
        forms[1].load_state_dict(forms[0].state_dict())
        torch.manual_seed(1)
        x, dx = (torch.randn(3, 6, side, side, dtype=dtype).to(memory_format=torch.channels_last) for _ in range(2))
        found = []
        for form in forms:
            y = form(Dual(x.requires_grad_(), dx[:2]))
            weights = torch.linspace(-1, 1, y.value.numel(), dtype=dtype).view(y.shape)
            found.append([y.value, y.tangent, *torch.autograd.grad((y.value * weights).sum(), [x, form.weight])])
            assert y.value.is_contiguous(memory_format=torch.channels_last) or y.shape[2] == 1
        assert_close(*found, tolerance)


# --- kernels and shapes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "images", "most", "mode"),
    [("cifar10", 128, 5400, "default"), ("imagenet_b4", 32, 1800, "reduce-overhead")],
)
def test_kernels_of_a_step_and_the_mode_that_follows(name, images, most, mode):
    """About 5,180 and 1,750. Ten microseconds each are half a U-net's step on an H100, and more than all of a DiT's."""
    config = recipe_of(name)
    assert 0.8 * most < step_launches(config, images) < most
    assert mode_of_step(config, images) == mode


def test_launches_are_neither_views_nor_allocations():
    x = torch.zeros(4, 4, device=META)
    with costs.Launches() as launches:
        (x.t()[:2].reshape(-1) + torch.empty_like(x).flatten()[:8]).sum()
    assert launches.count == 3  # the copy that reshape makes, the addition, the sum


def test_rows_with_a_derivative_come_in_few_shapes():
    """Where their number varies: v1 times over 200 steps."""
    times = recipe_of("cifar10_v1").objective
    counts = {int((r != t).sum()) for r, t in (times.sample_times(128, generator(0, "t", k)) for k in range(200))}
    assert len(counts) > 15
    assert len({rounded_rows(n, 128) for n in counts}) <= 3
    assert {rounded_rows(n, 10) for n in range(11)} == {0, 2, 4, 6, 8, 10} and PARTS == 8


def test_rows_that_fill_up_a_shape_change_nothing():
    b, shapes, net = batch(UNET, r_eq_t=3), [], small(UNET)

    def seen(u, z, r, t, tangents, cond):
        shapes.append(len(tangents[0]))
        return dual_jvp(u, z, r, t, tangents, cond)

    on_meta = [y.to(META) for y in (b.x, b.eps)]
    value_and_jvp(net.to(META), (on_meta[0], b.r, b.t), (on_meta[1], 0.0, 1.0), rows=b.r != b.t, take=seen)
    assert shapes == [rounded_rows(5, 8)]
    net = small(UNET).eval()
    few = dual_jvp(net, b.x, b.r, b.t, (b.eps[:5], 0.0, 1.0), b.cond)
    more = dual_jvp(net, b.x, b.r, b.t, (_padded(b.eps, 5, 7), 0.0, 1.0), b.cond)
    assert_close([more[0], more[1][:5]], few, 1e-12)


# --- compiled graphs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_only_bf16_puts_regions_into_a_graph_to_compile(precision):
    """Each change of autocast or of the grad mode is one, and the time of an export grows with their square: with
    193 of them it took 85 s for the recipe's network."""
    config = tiny_config(train__precision=precision, train__compile="default", model__width=4)
    network, b = build_network(config, CPU), random_batch(config, 2, CPU)
    module = _ValueAndTangent(network, in_training_precision(network, config.train), 0.0, 1.0)
    nodes = plain_operations(module, (b.x, b.r, b.t, b.eps[:1], {})).graph.nodes
    regions = Counter(str(node.target) for node in nodes if "wrap" in str(node.target))
    blocks = sum(isinstance(m, unet.layers.Block) for m in network.modules())
    assert regions == ({"wrap_with_autocast": blocks} if precision == "bf16" else {})


# --- memory -------------------------------------------------------------------------------------------------------


def kept_per_image(config: RunConfig) -> float:
    """Bytes that wait for the backward pass."""
    loss, kept = meta_loss(config), []
    for images in (64, 128):
        with LiveBytes() as live:
            out = loss(random_batch(config, images, META))
            kept.append(live.now)
        del out
    return (kept[1] - kept[0]) / 64


@pytest.mark.parametrize(("how", "low", "high"), [("null", 120, 130), ("cheap", 45, 70), ("blocks", 20, 40)])
def test_activations_of_the_cifar10_network(how, low, high):
    config = recipe_of("cifar10", "train.precision=fp32", f"train.activation_checkpointing={how}")
    assert low < kept_per_image(config) / 1e6 < high


def test_live_bytes_are_what_is_alive():
    with LiveBytes() as live:
        x = torch.zeros(1000, device=META)
        y = x + 1
        del y
        z = x.view(10, 100).t()
        assert live.now == 4000 and live.peak == 8000
        del x, z
        assert live.now == 0 and live.peak == 8000


def test_the_memory_of_a_step_is_near_what_a_cpu_holds(alone):
    """The same count on real tensors."""
    config = tiny_config(model__width=16, model__image_size=8, train__batch=64)
    state_network, b = build_network(config, CPU).train(), random_batch(config, 64, CPU)
    loss = make_loss(state_network, config, CPU)
    with LiveBytes() as live:
        loss(b).mean.backward()
    assert live.peak == pytest.approx(step_memory(config).peak * 64, rel=0.25)


# --- micro-batches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("usable", "expected"), [(None, 8), (1e9, 8), (1000 + 8 * 50, 8), (1000 + 7 * 50, 4), (1060, 1)]
)
def test_the_largest_micro_batch_that_fits(monkeypatch, alone, usable, expected):
    monkeypatch.setattr(microbatch, "usable_memory", lambda device: usable)
    monkeypatch.setattr(microbatch, "step_memory", lambda config: StepMemory(1000, 50.0))
    found = with_microbatch(tiny_config(train__microbatch="auto"), alone)
    assert found.train.microbatch == expected
    assert with_microbatch(tiny_config(train__microbatch=3), alone).train.microbatch == 3


def test_a_network_that_cannot_be_counted_gets_the_whole_batch(monkeypatch, alone, logged):
    monkeypatch.setattr(microbatch, "step_memory", lambda config: torch.zeros(1, device=META).item())
    assert with_microbatch(tiny_config(train__microbatch="auto"), alone).train.microbatch == 8
    assert "memory cannot be counted (" in logged.text and "all 8 images" in logged.text


@pytest.mark.parametrize("changes", [{"train__jvp": "func"}, {"train__precision": "bf16"}, guided_latent_changes()])
def test_every_kind_of_step_is_counted(changes):
    assert step_memory(tiny_config(**changes)).peak > 1000


def test_a_network_that_does_not_fit_is_refused(monkeypatch, alone):
    monkeypatch.setattr(microbatch, "usable_memory", lambda device: 1e4)
    with pytest.raises(ConfigError, match=r"one image.*activation_checkpointing=blocks"):
        with_microbatch(tiny_config(train__microbatch="auto"), alone)


def test_the_number_is_kept_for_the_run(launch, recipe, tmp_path):
    file, run = recipe(train__microbatch="auto", train__steps=2), tmp_path / "run"
    launch("run", file, "--out", run).wait()
    kept = load_config(run / "config.yaml")
    assert kept.train.microbatch == 8  # all of them: a computer's memory is large enough
    config = load_config(file)
    assert with_last_microbatch(config, kept) == replace(config, train=replace(config.train, microbatch=8))
    assert with_last_microbatch(config, None) == config


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried …"), RuntimeError("… can't allocate memory: you tried")]
)
def test_out_of_memory_is_one_line_that_names_the_setting(tmp_path, alone, error):
    config, run = tiny_config(train__microbatch=4), RunFolder(tmp_path)
    training = set_up(config, run, alone)

    def fails(batch):
        raise error

    training.loss = fails
    with pytest.raises(IncompleteError, match=r"microbatch is 4.*--set train.microbatch=2.*checkpointing=cheap"):
        train(training)
    training.loss = lambda batch: 1 / 0
    with pytest.raises(ZeroDivisionError):
        train(training)


def test_until_it_is_decided_auto_is_the_whole_batch():
    for setting, expected in (("auto", 8), (None, 8), (3, 3), (9, 8)):
        assert tiny_config(train__microbatch=setting).train.images_at_once(8) == expected
