"""Two gloo processes against one: the same gradients, weights and metrics for the same global batch.

The pair of processes is started once and plays every scene; the tests compare what it left in files.
"""

import os
import signal
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from meanflow.training.guard import Guard
from running import comparable_metrics, context, read_metrics, steps_of, tiny_config, write_images

from meanflow.data import load_dataset
from meanflow.errors import UserError
from meanflow.training import distributed
from meanflow.training.batches import BatchStream
from meanflow.training.checkpoint import list_checkpoints, load_checkpoint
from meanflow.training.loop import train
from meanflow.training.metrics import StepSums
from meanflow.training.processes import (
    DistributedContext,
    GradientSum,
    leaving_distributed,
    start_distributed,
    stop_distributed,
)
from meanflow.training.run_folder import RunFolder
from meanflow.training.state import fresh_state
from meanflow.training.step import accumulate, make_loss, update

# Adam divides by the gradient's size, so rounding in a gradient near zero becomes a whole step; a large eps keeps
# the comparison one of arithmetic.
SMOOTH = {"optim__eps": 1.0, "optim__lr": 1.0, "optim__warmup_steps": 3, "train__steps": 4, "train__batch": 12}
LABELLED = {
    **SMOOTH,
    "model__channels": 3,
    "model__classes": 2,
    "model__augment_labels": 6,
    "model__multipliers": [1, 2],
    "model__attention": [4],
    "data__augment_p": 0.5,
    "data__anisotropy": "official",
    "data__flip": True,
    "data__flip_unlabelled": True,
    "optim__clip": 0.5,
}
SCENES = {
    "plain": SMOOTH,
    "labels": LABELLED,
    "accumulation": {**LABELLED, "train__microbatch": 4},
    "per-sample shares": {**SMOOTH, "objective__times__share": "per_sample", "objective__times__ratio": 0.3},
    "flow matching": {**SMOOTH, "objective__times__ratio": 0.0, "train__microbatch": 5},
}


def scene(name: str, images: Path, **changes):
    settings = {**SCENES[name], **changes}
    if settings.get("model__channels") == 3:
        settings["data__path"] = str(images)
    return tiny_config(**settings)


def gradients_of(config, ctx: DistributedContext) -> dict[str, torch.Tensor]:
    """The gradient of step 1 of a fresh network, twice in a row (the second time buckets are used again)."""
    state = fresh_state(config, ctx.device)
    total, loss = GradientSum(state.network, ctx), make_loss(state.network, config, ctx.device)
    stream = BatchStream(load_dataset(config.data, 8, config.model.channels), config, ctx)
    for _ in range(2):
        sums = StepSums(ctx.device, False)
        accumulate(loss, stream.micro_batches(1), stream.micro_steps, config.train.batch, total, sums)
    return {name: p.grad.clone() for name, p in state.network.named_parameters()}


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


def play(rank: int, port: int, folder: Path, images: Path) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    ctx = start_distributed("cpu")
    found = {"processes": (ctx.rank, ctx.world), "gradients": {}, "weights": {}}

    def run(config, name: str, hook=None) -> int:
        place, said = RunFolder(folder / name), []
        if ctx.is_main:
            place.open_for(config)
        code = train(config, place, ctx, said.append, hook)
        found[f"said {name}"] = said
        return code

    for name in SCENES:
        found["gradients"][name] = gradients_of(scene(name, images), ctx)
        found[f"code {name}"] = run(scene(name, images), name)

    found["odd"] = []
    module = Odd()
    distributed.BUCKET_BYTES, usual = 24, distributed.BUCKET_BYTES  # several buckets even for this one
    total = GradientSum(module, ctx)
    found["buckets"] = len(total.buckets)
    for _ in range(2):
        total.zero()
        module.loss(rank, 0).backward()
        total.arm()
        module.loss(rank, 1).backward()
        total.finish()
        found["odd"].append({name: p.grad.clone() for name, p in module.named_parameters() if p.requires_grad})
    distributed.BUCKET_BYTES = usual

    dropout = {"model__dropout": 0.3, "train__microbatch": 4, "train__steps": 5}
    run(scene("labels", images, **dropout), "unbroken")
    for steps in (1, 3, 5):
        run(scene("labels", images, **{**dropout, "train__steps": steps}), "resumed")
    run(scene("plain", images, train__steps=2), "two then one")

    def stop_one(run, config, state, ctx) -> None:
        if state.step == 3 and ctx.rank == 1:
            signal.raise_signal(signal.SIGINT)

    found["stopped"] = run(scene("plain", images, train__steps=50, eval__every=1), "stopped", stop_one)

    def spoil_one(run, config, state, ctx) -> None:
        if state.step == 2 and ctx.rank == 1:
            with torch.no_grad():
                next(state.network.parameters()).view(-1)[0] = float("nan")

    try:
        run(scene("plain", images, train__steps=50, eval__every=2), "spoilt", spoil_one)
    except UserError as error:
        found["spoilt"] = str(error), error.exit_code
    found["any"] = [ctx.any(rank == 1), ctx.any(True), ctx.any(False)]
    try:
        run(scene("plain", images, train__batch=13), "uneven")
    except UserError as error:
        found["uneven"] = str(error)
    stop_distributed()
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, images):
    folder = tmp_path_factory.mktemp("pair")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    players = [context.Process(target=play, args=(rank, port, folder, images), daemon=True) for rank in range(2)]
    for player in players:
        player.start()
    for player in players:
        player.join(120)
    codes = [player.exitcode for player in players]
    for player in players:
        player.kill()
    assert codes == [0, 0]
    return folder, [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def single(tmp_path_factory, images):
    """The same scenes by one process, made when asked for."""
    folder, alone = tmp_path_factory.mktemp("single"), DistributedContext(0, 1, torch.device("cpu"))

    def single(name: str, **changes) -> RunFolder:
        run, config = RunFolder(folder / f"{name}{changes}"), scene(name, images, **changes)
        if not run.path.exists():
            run.open_for(config)
            train(config, run, alone, lambda line: None)
        return run

    return single


def weights(run: RunFolder):
    return load_checkpoint(list_checkpoints(run.checkpoints)[-1])


def assert_close(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor], to: float = 1e-6) -> None:
    assert one.keys() == two.keys()
    scale = max(float(value.abs().max()) for value in one.values())
    for name in one:
        torch.testing.assert_close(
            two[name] / scale, one[name] / scale, rtol=0, atol=to, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- comparisons -----------------------------------------------------------------------------------------------


def test_they_know_who_they_are(pair):
    assert [found["processes"] for found in pair[1]] == [(0, 2), (1, 2)]
    assert [found["any"] for found in pair[1]] == [[True, True, False]] * 2


@pytest.mark.parametrize("name", SCENES)
def test_gradients_are_those_of_one_process(pair, images, alone, name):
    expected = gradients_of(scene(name, images), alone)
    assert max(float(value.abs().max()) for value in expected.values()) > 0.01
    for found in pair[1]:
        assert_close(expected, found["gradients"][name])


@pytest.mark.parametrize("name", SCENES)
def test_weights_averages_and_metrics_are_those_of_one_process(pair, single, name):
    assert [found[f"code {name}"] for found in pair[1]] == [0, 0]
    one, two = single(name), RunFolder(pair[0] / name)
    a, b = weights(one), weights(two)
    assert_close(a.model, b.model)
    assert_close(a.ema["0.9"], b.ema["0.9"])
    for key in ("exp_avg", "exp_avg_sq"):
        assert_close(*({name: values[key] for name, values in c.optimizer.items()} for c in (a, b)))
    for x, y in zip(comparable_metrics(one.path), comparable_metrics(two.path), strict=True):
        assert x.keys() == y.keys()
        for key in x:
            assert (x[key] is None and y[key] is None) or x[key] == pytest.approx(y[key], rel=1e-5), key


def test_both_processes_hold_the_same_gradients_to_the_bit(pair):
    first, second = (found["gradients"] for found in pair[1])
    for name in SCENES:
        assert all(torch.equal(first[name][key], second[name][key]) for key in first[name])


def test_parameters_without_a_gradient_and_other_memory_formats(pair):
    """Some never have one, some on one process only: the sum is that of one process, and nobody waits."""
    expected = odd_gradients([(rank, part) for rank in range(2) for part in range(2)])
    for found in pair[1]:
        assert found["buckets"] > 2
        for sums in found["odd"]:
            assert "frozen" not in sums and not sums["never"].any() and (sums["sometimes"] == 3).all()
            assert_close({name: expected[name] for name in sums}, sums)


def test_two_processes_resume_bit_equal(pair):
    unbroken, resumed = (RunFolder(pair[0] / name) for name in ("unbroken", "resumed"))
    assert steps_of(resumed.path) == [1, 2, 3, 4, 5]
    a, b = weights(unbroken), weights(resumed)
    assert all(torch.equal(a.model[name], b.model[name]) for name in a.model)
    assert comparable_metrics(unbroken.path) == comparable_metrics(resumed.path)


def test_a_run_of_two_processes_continues_on_one(pair, single, images, alone):
    run = RunFolder(pair[0] / "two then one")
    train(scene("plain", images), run, alone, lambda line: None)
    assert_close(weights(single("plain")).model, weights(run).model)
    assert steps_of(run.path) == [1, 2, 3, 4]


def test_a_signal_to_one_process_stops_both_at_one_step(pair):
    run, (main, other) = RunFolder(pair[0] / "stopped"), pair[1]
    assert other["stopped"] == 130 and main["stopped"] in (130, 143)
    assert main["said stopped"][-1].startswith("stopped and saved at step 4 of 50")
    assert other["said stopped"] == []
    assert weights(run).meta["step"] == 4 == steps_of(run.path)[-1]


def test_a_bad_number_on_one_process_stops_both(pair):
    """The bad gradient reaches all of them with the sum, so all skip the update and say the same step."""
    (message, code), other = (found["spoilt"] for found in pair[1])
    assert code == 4 and message.startswith("step 3: ") and other == (message, code)
    kept = weights(RunFolder(pair[0] / "spoilt"))
    assert kept.meta["step"] == 2 and all(torch.isfinite(value).all() for value in kept.model.values())
    assert [line["step"] for line in read_metrics(pair[0] / "spoilt" / "metrics.jsonl")] == [1, 2]


def test_a_batch_that_does_not_divide_is_refused_by_all(pair):
    for found in pair[1]:
        assert "train.batch 13 does not divide by 2 processes" in found["uneven"]


def test_one_process_needs_no_launcher(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    ctx = start_distributed("cpu")
    assert (ctx.rank, ctx.world, ctx.is_main) == (0, 1, True)
    assert not torch.distributed.is_initialized()
    x = torch.ones(2)
    assert ctx.all_reduce(x) is x and (x == 1).all() and not ctx.any(False)
    ctx.barrier()
    stop_distributed()


@pytest.mark.parametrize(
    ("backend", "error", "expected"),
    [("nccl", None, ["farewell"]), ("nccl", MemoryError, ["abort"]), ("gloo", MemoryError, ["farewell"])],
)
def test_a_process_that_fails_does_not_wait_for_its_peers(monkeypatch, backend, error, expected):
    joined, done = [True], []

    def leave(how):
        joined[0] = False
        done.append(how)

    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: joined[0])
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: leave("farewell"))
    monkeypatch.setattr(distributed, "_abort_process_group", lambda: leave("abort"))
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
    config = tiny_config().optim
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=torch.tensor(1.0), fused=True)
    assert torch.isfinite(update(optimizer, total.parameters, config, 0, Guard(None, alone.device)))
    assert torch.equal(module.never, before)
