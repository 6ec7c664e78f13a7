"""`bash run.sh toy2d`: Figures 2 and 3, computed on a mixture in the plane whose v is known.

Trains u(z, r, t) with the kit's objective, then writes `toy2d.png` and `numbers.json`: how far u is from the truth, and
what one step and many make of it and of the instantaneous velocity v.
"""

import argparse
import time
from pathlib import Path

from eval.scoring.options import Parser, add_set, path
from meanflow.errors import run_main, write_errors_named


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("toy2d", __doc__.partition(": ")[2])
    parser.add_argument("recipe", type=path, help="recipes/figures/toy2d.yaml, which bash run.sh toy2d gives by itself")
    add_set(parser)
    parser.add_argument("--out", type=path, help="folder for the picture and the numbers (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print settings, size and speed, and stop")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    import torch  # here, as the rest: it takes seconds to import

    from eval.toy.measure import closing_table, distances, errors, in_float64
    from eval.toy.mixture import Mixture
    from eval.toy.plot import draw
    from eval.toy.train import Toy2dConfig, Training
    from meanflow.files import write_json
    from meanflow.training import settings
    from meanflow.training.config import config_to_yaml
    from meanflow.training.state import count_parameters

    config = settings.load(Toy2dConfig, args.recipe, args.set)
    out = args.out or Path("runs") / args.recipe.stem
    torch.set_num_threads(1)  # small tensors gain nothing from more, and sums come out the same
    mixture = Mixture(config.mixture)
    training = Training(config, mixture)
    if args.dry_run:
        seconds = training.seconds_a_step()
        size = f"{count_parameters(training.network):,} parameters, {1000 * seconds:.1f} ms a step"
        print(config_to_yaml(config), f"{size}, about {config.train.steps * seconds:.0f} s of training", sep="\n")
        return 0
    with write_errors_named(out):  # known before the training rather than after
        out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    u = in_float64(training.run())
    trained = time.perf_counter()
    numbers = {
        "error": errors(u, mixture, config.measure, config.seed),
        "distance": distances(u, mixture, config.measure, config.seed, config.objective.sampler),
        "torch": torch.__version__,
        "config": settings.to_tree(config),
    }
    draw(u, mixture, config, numbers, out / "toy2d.png")
    write_json(out / "numbers.json", numbers)
    print(closing_table(numbers))
    print(f"\ntrained in {trained - start:.0f} s, measured and drawn in {time.perf_counter() - trained:.0f} s")
    print(f"picture   {out / 'toy2d.png'}\nnumbers   {out / 'numbers.json'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
