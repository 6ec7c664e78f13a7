"""Two gloo processes against one: the same gradients, weights and metrics for the same global batch.

The pair of processes is started once and runs every scene; the tests compare what it left in files.
"""

import signal
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch
from guided_helpers import GUIDED
from running import (
    comparable_metrics,
    gradients_of_step,
    in_processes,
    newest,
    steps_of,
    tiny_config,
    train_run,
    write_images,
)
from stress.ranks import LABELLED

from meanflow.errors import UserError
from meanflow.training import processes
from meanflow.training.divergence import Guard
from meanflow.training.processes import (
    DistributedContext,
    GradientSum,
    leaving_distributed,
    run_on_rank0,
    start_distributed,
    stop_distributed,
)
from meanflow.training.run_folder import RunFolder
from meanflow.training.step import update

# Adam divides by the gradient's size, so rounding in a gradient near zero becomes a whole step; a large eps keeps
# the comparison one of arithmetic.
SMOOTH = {"optim__eps": 1.0, "optim__lr": 1.0, "optim__warmup_steps": 3, "train__steps": 4, "train__batch": 12}
LABELS = {**LABELLED, **SMOOTH, "train__microbatch": None, "checkpoint__every": 2}
SCENES = {
    "plain": SMOOTH,
    "labels": LABELS,
    "accumulation": {**LABELS, "train__microbatch": 4},
    "per-sample": {**SMOOTH, "objective__times__stratified": False, "objective__times__ratio": 0.3},
    "guidance as an input": {**SMOOTH, **GUIDED, "train__batch": 12, "train__microbatch": 4},
    "flow matching": {**SMOOTH, "objective__times__ratio": 0.0, "train__microbatch": 5},
}


def scene(name: str, images: Path, **changes):
    tree = {**SCENES[name], **changes}
    return tiny_config(**tree, **({"data__path": str(images)} if "model__channels" in tree else {}))


class Odd(torch.nn.Module):
    """Parameters in another memory format, without gradients, and with one on a single process."""

    def __init__(self):
        super().__init__()
        numbers = torch.Generator().manual_seed(0)
        self.conv = torch.nn.Conv2d(3, 5, 3)
        self.narrow = torch.nn.Conv2d(1, 2, 1)
        self.never = torch.nn.Parameter(torch.ones(7))
        self.sometimes = torch.nn.Parameter(torch.ones(4))
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        for p in self.parameters():
            p.data.copy_(torch.randn(p.shape, generator=numbers))
        self.to(memory_format=torch.channels_last)

    def loss(self, rank: int, part: int) -> torch.Tensor:
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(10 * rank + part))
        loss = self.conv(x).square().sum() + self.narrow(x[:, :1]).sum() * (rank + 1)
        return loss + (self.sometimes.sum() * 3 if rank == 0 and part == 1 else 0)


def odd_gradients(rank_parts: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    module = Odd()
    sum(module.loss(rank, part) for rank, part in rank_parts).backward()
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in module.named_parameters()}


# --- what the pair does ----------------------------------------------------------------------------------------


def play(images: Path, ctx: DistributedContext, folder: Path) -> dict:
    found = {"ctx": (ctx.rank, ctx.world), "any": [ctx.any(ctx.rank == 1), ctx.any(True), ctx.any(False)]}

    def run(name: str, config, evaluate=None) -> int | UserError:
        try:
            return train_run(config, RunFolder(folder / name), ctx, evaluate)
        except UserError as error:
            return error

    for name in SCENES:
        found[f"gradients {name}"] = gradients_of_step(scene(name, images), ctx, 1, times=2)
        found[name] = run(name, scene(name, images))

    module, found["odd"] = Odd(), []
    processes.BUCKET_BYTES, usual = 24, processes.BUCKET_BYTES  # several buckets even for this one
    total = GradientSum(module, ctx)
    found["buckets"] = len(total.buckets)
    for _ in range(2):
        total.zero()
        module.loss(ctx.rank, 0).backward()
        total.arm()
        module.loss(ctx.rank, 1).backward()
        total.finish()
        found["odd"].append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
    processes.BUCKET_BYTES = usual

    def stop_one(run, config, state, ctx) -> None:
        if state.step == 3 and ctx.rank == 1:
            signal.raise_signal(signal.SIGINT)

    def spoil_one(run, config, state, ctx) -> None:
        if state.step == 2 and ctx.rank == 1:
            with torch.no_grad():
                next(state.network.parameters()).view(-1)[0] = float("nan")

    found["stopped"] = run("stopped", scene("plain", images, train__steps=50, eval__every=1), stop_one)
    found["spoilt"] = run("spoilt", scene("plain", images, train__steps=50, eval__every=2), spoil_one)
    found["uneven"] = run("uneven", scene("plain", images, train__batch=13))
    return found


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("pair")
    return folder, in_processes(2, partial(play, images), folder)


@pytest.fixture(scope="module")
def single(tmp_path_factory, images):
    """The same scene by one process, made when asked for: its run folder."""
    folder = tmp_path_factory.mktemp("single")

    def single(name: str) -> Path:
        if not (folder / name).exists():
            train_run(scene(name, images), RunFolder(folder / name), DistributedContext(0, 1, torch.device("cpu")))
        return folder / name

    return single


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], to: float = 3e-6) -> None:
    assert one.keys() == two.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    for name in one:
        torch.testing.assert_close(
            two[name] / scale, one[name] / scale, rtol=0, atol=to, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- comparisons -----------------------------------------------------------------------------------------------


def test_they_know_who_they_are(pair):
    assert [(found["ctx"], found["any"]) for found in pair[1]] == [((rank, 2), [True, True, False]) for rank in (0, 1)]


@pytest.mark.parametrize("name", SCENES)
def test_gradients_are_those_of_one_process(pair, images, alone, name):
    expected = gradients_of_step(scene(name, images), alone, 1)
    first, second = (found[f"gradients {name}"] for found in pair[1])
    assert max(float(value.abs().max()) for value in expected.values()) > 0.01
    assert_close(expected, first)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", SCENES)
def test_weights_averages_and_metrics_are_those_of_one_process(pair, single, name):
    assert [found[name] for found in pair[1]] == [0, 0]
    one, two = single(name), pair[0] / name
    a, b = newest(one), newest(two)
    assert_close(a.model, b.model)
    assert_close(a.ema["0.9"], b.ema["0.9"])
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(*({name: values[key] for name, values in c.optimizer.items()} for c in (a, b)))
    for x, y in zip(comparable_metrics(one), comparable_metrics(two), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert (x[key] is None and y[key] is None) or x[key] == pytest.approx(y[key], rel=1e-5), key


def test_parameters_without_a_gradient_and_other_memory_formats(pair):
    """Some never have one, some on one process only: the sum is that of one process, and nobody waits."""
    expected = odd_gradients([(rank, part) for rank in range(2) for part in range(2)])
    for found in pair[1]:
        assert found["buckets"] > 2
        for sums in found["odd"]:
            assert "frozen" not in sums and not sums["never"].any() and (sums["sometimes"] == 3).all()
            assert_close({name: expected[name] for name in sums}, sums)


def test_a_signal_to_one_process_stops_both_at_one_step(pair):
    main, other = (found["stopped"] for found in pair[1])
    assert other == 130 and main in (130, 143)
    assert newest(pair[0] / "stopped").meta["step"] == 4 == steps_of(pair[0] / "stopped")[-1]
    assert (pair[0] / "log").read_text().count("stopped and saved at step 4 of 50") == 1


def test_a_bad_number_on_one_process_stops_both(pair):
    """The bad gradient reaches all of them with the sum, so all skip the update and name the same step."""
    first, second = (found["spoilt"] for found in pair[1])
    assert first.exit_code == 4 and str(first).startswith("step 3: ") and str(first) == str(second)
    kept = newest(pair[0] / "spoilt")
    assert kept.meta["step"] == 2 and all(torch.isfinite(value).all() for value in kept.model.values())
    assert steps_of(pair[0] / "spoilt") == [1, 2]


def test_a_batch_that_does_not_divide_is_refused_by_all(pair):
    for found in pair[1]:
        assert "train.batch 13 does not divide by 2 processes" in str(found["uneven"])


# --- one process -----------------------------------------------------------------------------------------------


def test_one_process_needs_no_launcher(monkeypatch, alone):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ctx = start_distributed("cpu")
    assert (ctx.rank, ctx.world, ctx.is_main) == (0, 1, True) and not DistributedContext(1, 2, ctx.device).is_main
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert ctx.all_reduce(x) is x and (x == 1).all() and not ctx.any(False) and run_on_rank0(ctx, lambda: 3) == 3
    ctx.barrier()
    stop_distributed()


def test_a_step_waits_for_minutes_and_preparation_for_an_hour(monkeypatch):
    """NCCL needs to know its device, or the first barrier guesses it."""
    asked = []
    monkeypatch.setattr(processes.dist, "init_process_group", lambda **how: asked.append(how))
    monkeypatch.setattr(processes.dist, "new_group", lambda **how: asked.append(how) or "the steps' group")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: asked.append(device))
    for name, value in {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    ctx, device = start_distributed("cuda"), torch.device("cuda", 1)
    assert (ctx.rank, ctx.world, ctx.device, ctx.group) == (3, 4, device, "the steps' group")
    patient = {"backend": "nccl", "device_id": device, "timeout": processes.PATIENT_TIMEOUT}
    assert asked == [device, patient, {"timeout": processes.TIMEOUT}]
    reduced = []
    monkeypatch.setattr(processes.dist, "all_reduce", lambda x, group: reduced.append(group))
    ctx.all_reduce(torch.ones(1))
    assert reduced == ["the steps' group"] and processes.TIMEOUT < processes.PATIENT_TIMEOUT


def test_a_gpu_that_is_not_there_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="3 or more on this machine, and PyTorch sees 2"):
        start_distributed("cuda")


@pytest.mark.parametrize(
    ("backend", "error", "expected"),
    [("nccl", None, ["destroy"]), ("nccl", MemoryError, ["abort"]), ("gloo", MemoryError, ["destroy"])],
)
def test_a_process_that_fails_does_not_wait_for_its_peers(monkeypatch, backend, error, expected):
    joined, done = [True], []

    def leave(how):
        joined[0] = False
        done.append(how)

    monkeypatch.setattr(processes.dist, "is_initialized", lambda: joined[0])
    monkeypatch.setattr(processes.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(processes.dist, "destroy_process_group", lambda: leave("destroy"))
    monkeypatch.setattr(processes, "_abort_process_group", lambda: leave("abort"))
    with pytest.raises(error) if error else nullcontext(), leaving_distributed():
        if error:
            raise error
    assert done == expected


def test_kept_gradients_stay_where_they_are_and_add_up(alone):
    """What a CUDA graph needs: micro-batches are added to memory that is not its own."""
    module, found = Odd(), []
    for kept in (False, True):
        total = GradientSum(module, alone, kept)
        for _ in range(2):
            total.zero()
            where = module.conv.weight.grad
            for _ in range(2):
                module.loss(1, 0).backward()
            assert module.conv.weight.grad is where or not kept
        found.append(module.conv.weight.grad.clone())
    assert torch.equal(*found) and found[0].abs().sum() > 0


def test_one_process_has_no_gradient_where_there_is_none(alone):
    """Adam skips such a parameter: it has no moments and no decay."""
    module = Odd()
    total = GradientSum(module, alone)
    total.zero()
    total.arm()
    module.loss(1, 0).backward()
    total.finish()
    assert module.never.grad is None and module.sometimes.grad is None and module.conv.weight.grad is not None
    before = module.never.detach().clone()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=torch.tensor(1.0), fused=True)
    assert torch.isfinite(update(optimizer, total.parameters, tiny_config().optim, 0, Guard(None, alone.device)))
    assert torch.equal(module.never, before)
