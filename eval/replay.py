"""`bash run.sh replay FILE`: compute once more the step at which a run stopped for its numbers.

Such a run leaves FILE, RUN/failures/STEP.json, with the seeds and images of that step's batch, and STEP.pt beside it
with the weights before it. Any checkpoint's JSON will do as well: then it is the step after it. The batch is made
for every process of the run and the step computed by one, without an update.
"""

import argparse
import math
from itertools import chain
from typing import TYPE_CHECKING

from eval.scoring.options import Parser, add_device, path
from meanflow.errors import AssetError, ConfigError, run_main
from meanflow.logs import log

if TYPE_CHECKING:
    from torch import device, nn

    from meanflow.training.checkpoint import Checkpoint

SHOWN = 10  # lines of each list


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("replay", __doc__.partition(": ")[2])
    parser.add_argument("file", type=path, metavar="FILE", help="RUN/failures/STEP.json, or a checkpoint's JSON")
    add_device(parser)
    args = parser.parse_args(argv)
    args.file = args.file.with_suffix(".pt")
    if not args.file.is_file():
        raise AssetError(f"{args.file}: no such file")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from meanflow.training.checkpoint import load_checkpoint  # here: PyTorch takes seconds to import
    from meanflow.training.processes import start_distributed

    device = start_distributed(args.device).device
    finite = replay(load_checkpoint(args.file), str(args.file), device)
    log.info("all of it is finite" if finite else "it is not finite here either")
    return 0


def replay(checkpoint: "Checkpoint", where: str, device: "device") -> bool:
    """Compute the step after `checkpoint`, log its numbers and where they are not finite; True if all of them are.

    Raises AssetError or ConfigError if the weights or the images are not those of the run.
    """
    from torch.nn.utils import get_total_norm

    from meanflow.training.batches import BatchStream
    from meanflow.training.config import config_from_tree
    from meanflow.training.metrics import StepSums
    from meanflow.training.processes import DistributedContext, GradientSum
    from meanflow.training.setup import describe, open_data
    from meanflow.training.state import copy_strictly, fresh_state
    from meanflow.training.step import accumulate, configure_numerics, make_loss

    config = config_from_tree(checkpoint.meta["config"], where)
    failure, done = checkpoint.meta.get("failure", {}), checkpoint.meta["step"]
    configure_numerics(config.train)
    alone, rows = DistributedContext(0, 1, device), []
    dataset = open_data(config, alone)
    if describe(dataset)["sha256"] != checkpoint.meta["data"]["sha256"]:
        raise ConfigError(f"{where}: the data are other images now than those of the run")
    state = fresh_state(config, device)
    network = state.network
    copy_strictly(dict(network.named_parameters()), checkpoint.model, f"{where}: weights")
    if (teacher := config.objective.teacher_decay) is not None:
        copy_strictly(state.ema.averages[teacher], checkpoint.ema.get(repr(teacher), {}), f"{where}: EMA {teacher}")
    network.train()
    log.info(f"step {done + 1:,} of {where}" + (f", which failed with {failure['what']}" if failure else ""))

    world = failure.get("processes", 1)
    streams = [BatchStream(dataset, config, DistributedContext(rank, world, device)) for rank in range(world)]
    compute, sums = make_loss(network, config, device, state.ema), StepSums()
    gradients = GradientSum(network, alone, kept=config.train.compile is not None)

    def loss(batch):
        out = compute(batch)
        rows.extend(zip(batch.r.tolist(), batch.t.tolist(), out.per_sample.tolist(), strict=True))
        return out

    batches = chain.from_iterable(stream.micro_batches(done) for stream in streams)
    accumulate(loss, batches, world * streams[0].micro_steps, config.train.batch, gradients, sums)
    norm = get_total_norm([p.grad for p in gradients.parameters if p.grad is not None])
    means = {name: total.item() / sums.counts[name] for name, total in sums.sums.items() if sums.counts[name]}
    log.info(f"loss {means.pop('loss')}, gradient norm {norm.item()}")
    for name, value in means.items():
        log.info(f"{name} {value}")
    return _name_bad(network, rows) and bool(norm.isfinite())


def _name_bad(network: "nn.Module", rows: list[tuple[float, float, float]]) -> bool:
    """Log which weights, samples and gradients are not finite; True if none is."""
    named = list(network.named_parameters())
    bad = {
        "weights": [name for name, p in named if not p.isfinite().all()],
        "samples": [f"r {r:.6g}, t {t:.6g}: loss {x}" for r, t, x in rows if not math.isfinite(x)],
        "gradients": [name for name, p in named if p.grad is not None and not p.grad.isfinite().all()],
    }
    for what, items in bad.items():
        if items:
            log.info(f"{what} that are not finite ({len(items)} of {len(rows) if what == 'samples' else len(named)}):")
            for item in items[:SHOWN]:
                log.info(f"  {item}")
    return not any(bad.values())


if __name__ == "__main__":
    raise SystemExit(run_main(main))
