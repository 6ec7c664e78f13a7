"""What runs on a GPU, without one: fake tensors on device cuda, and the meta device, which no host can wait for."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from method_helpers import DIT, IMF, UNET
from running import ROOT, guided_latent_changes, tiny_config
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from eval.scoring.extractors import Options, create
from meanflow.guidance import GuidanceConfig, guided_velocity
from meanflow.jvp import dual_jvp, func_jvp, plain_operations
from meanflow.sampling import sample
from meanflow.training.batches import random_batch
from meanflow.training.config import load_config
from meanflow.training.metrics import MetricsLog, StepSums
from meanflow.training.processes import DistributedContext, GradientSum
from meanflow.training.state import BACKBONES, Ema, build_network
from meanflow.training.step import accumulate, in_training_precision, make_loss

B, N = 4, 3  # rows, and those with a tangent
META, CPU = torch.device("meta"), torch.device("cpu")
backbones = pytest.mark.parametrize("config", [UNET, DIT, IMF], ids=["unet", "dit", "imf"])
precisions = pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])


@pytest.fixture
def cuda(monkeypatch):
    """Fake tensors, made on a CUDA device that need not be there. A backward pass would need one."""
    if torch.__version__ < (2, 14) and not torch.cuda.is_available():
        pytest.skip("this PyTorch asks the driver (2.8 does)")
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)  # or autocast is disabled
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *args: True)
    with FakeTensorMode(), torch.device("cuda"):
        yield


def network_and_inputs(config):
    """On the device of the context."""
    network = BACKBONES[type(config)](config).requires_grad_(False)
    for p in network.parameters():  # as build_network does with real ones
        p.data = p.data.to(memory_format=torch.channels_last) if p.ndim == 4 else p.data
    z = torch.randn(B, config.channels, config.image_size, config.image_size).to(memory_format=torch.channels_last)
    return network, z, torch.ones(B), {"class_labels": torch.zeros(B, dtype=torch.int64)}


def train_config(precision: str, **changes):
    return replace(tiny_config().train, precision=precision, **changes)


@precisions
@backbones
def test_value_and_tangent_stay_on_the_device(cuda, config, precision):
    network, z, t, cond = network_and_inputs(config)
    u = in_training_precision(network, train_config(precision))
    value, tangent = dual_jvp(u, z, t * 0, t, (z[:N], 0.0, 1.0), cond)
    assert value.device.type == tangent.device.type == "cuda"
    assert (value.shape, tangent.shape) == (z.shape, z[:N].shape)
    assert value.dtype == tangent.dtype == torch.float32


class Layouts(TorchDispatchMode):
    """Counts convolutions by whether their input is in channels_last."""

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket.__name__ == "convolution":
            self.seen[args[0].is_contiguous(memory_format=torch.channels_last)] += 1
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize(("resampling", "convolutions"), [("conv", 216), ("matmul", 200)])
def test_no_convolution_copies_its_input_to_channels_last(cuda, resampling, convolutions):
    """F.group_norm returns the default format on a GPU: 192 of the 216 convolutions of value and tangent would copy."""
    config = load_config(ROOT / "recipes" / "cifar10.yaml", [f"model.resampling={resampling}"])
    network, z, t, _ = network_and_inputs(config.model)
    with Layouts() as layouts:
        dual_jvp(network, z, t * 0, t, (z[:N], 0.0, 1.0), {})
    assert layouts.seen == {True: convolutions}


@precisions
@backbones
def test_guidance_and_sampling_stay_on_the_device(cuda, config, precision):
    network, z, _, cond = network_and_inputs(config)
    u = in_training_precision(network.eval(), train_config(precision))
    assert sample(u, z, 2, **cond).device.type == "cuda"
    assert sample(u, z, grid=(1.0, 0.4, 0.0), **cond).shape == z.shape


def test_guided_velocity_takes_its_times_from_the_host():
    """Which rows need the network is known without waiting: on the meta device waiting is an error."""
    config = GuidanceConfig(omega_prime=2.0, kappa=0.5, t_start=0.2)
    net = build_network(tiny_config(**guided_latent_changes()), META)
    z, labels = torch.zeros(B, 4, 4, 4, device=META), torch.zeros(B, dtype=torch.int64, device=META)
    t, masked = torch.tensor([0.1, 0.5, 0.7, 0.9]), torch.tensor([False, False, True, False])
    for batched in (True, False):
        out = guided_velocity(net, z, t, z, masked, 10, config, batched, class_labels=labels)
        assert out.device == META and out.shape == z.shape


@pytest.mark.parametrize("name", ["pixels", "thumbnails"])
def test_features_are_extracted_on_the_device(cuda, name):
    extractor = create(name, Options(device="cuda"), ("fid",))
    features = extractor.forward(torch.zeros(B, 3, 16, 16, dtype=torch.uint8))
    assert {value.device.type for value in features.values()} == {"cuda"}


@precisions
@backbones
def test_the_graph_to_compile_is_made_on_the_device(cuda, config, precision):
    network, z, t, cond = network_and_inputs(replace(config, dropout=0.0) if config is UNET else config)
    u = in_training_precision(network, train_config(precision, compile="default"))

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.network = network

        def forward(self, z, t, dz, labels):
            return dual_jvp(u, z, t * 0, t, (dz, 0.0, 1.0), {"class_labels": labels})

    graph = plain_operations(Step(), (z, t, z[:N], cond["class_labels"])).graph
    kernels = [node for node in graph.nodes if node.op == "call_function"]
    assert len(kernels) > 50
    regions = [node for node in graph.nodes if "autocast" in str(node.target)]
    assert bool(regions) == (precision == "bf16")


def test_func_runs_on_the_device(cuda):
    network, z, t, cond = network_and_inputs(UNET)
    value, tangent = func_jvp(network, z, t * 0, t, (z[:N], 0.0, 1.0), cond)
    assert value.device.type == "cuda" and tangent.shape == z[:N].shape


# --- the host does not wait -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("guided", [False, True])
def test_nothing_in_a_step_waits_for_the_device(tmp_path, guided):
    """Reading a number of a meta tensor is an error, as is a copy to the CPU: a GPU would have to finish first."""
    changes = guided_latent_changes() | {"guidance__omega_prime": 2.0, "guidance__kappa": 0.5} if guided else {}
    config = tiny_config(**changes, train__batch=B, logging__flush_every=50)
    ctx = DistributedContext(0, 1, META)
    network = build_network(config, META).train()
    ema = Ema(network, config.ema)
    loss, gradients = make_loss(network, config, META, ema), GradientSum(network, ctx)
    log = MetricsLog(tmp_path / "metrics.jsonl", ctx, 50, 0.0)
    for step in range(2):
        sums = StepSums()
        accumulate(loss, [random_batch(config, B, META)] * 2, 2, 2 * B, gradients, sums)
        norm = torch.nn.utils.get_total_norm([p.grad for p in gradients.parameters])
        ema.update(step + 1)
        log.record(step + 1, B, 0.0, sums, norm)
        assert not log.due
    with pytest.raises((RuntimeError, NotImplementedError)):
        log.flush()  # reads the numbers


# --- on a GPU -------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@precisions
@pytest.mark.parametrize("compile", [None, "default", "reduce-overhead"])
def test_a_run_on_a_gpu_trains_as_on_a_cpu(train_run_on, precision, compile):
    """A few steps: eager and compiled, with micro-batches, in each precision, against float32 on the CPU."""
    expected, found = train_run_on("cpu", "fp32", None), train_run_on("cuda", precision, compile)
    assert found == pytest.approx(expected, rel={"fp32": 1e-3, "tf32": 1e-2, "bf16": 5e-2}[precision])


@pytest.fixture
def train_run_on(tmp_path):
    """`train_run_on(device, precision, compile)`: the squared errors of the first step's samples, without dropout."""

    def run(device: str, precision: str, compile: str | None) -> list[float]:
        ctx = DistributedContext(0, 1, torch.device(device))
        config = tiny_config(train__precision=precision, train__compile=compile, train__microbatch=4, model__width=16)
        network = build_network(config, ctx.device).train()
        loss, gradients = make_loss(network, config, ctx.device), GradientSum(network, ctx, kept=True)
        batches = [random_batch(config, 4, CPU) for _ in range(2)]
        batches = [replace(b, x=b.x.to(ctx.device), eps=b.eps.to(ctx.device)) for b in batches]
        sums = StepSums()
        accumulate(loss, batches, 2, 8, gradients, sums)
        norm = torch.nn.utils.get_total_norm([p.grad for p in gradients.parameters])
        return [float(sums.sums["error"]), float(norm)]

    return run
