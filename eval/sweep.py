"""`bash run.sh sweep RUN`: what guidance does, chosen after training: a picture of distance and accuracy against ω."""

import argparse

from eval.scoring.options import Parser, add_device, count, interval, path, scales
from meanflow.errors import UserError, run_main

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("sweep", __doc__.partition(": ")[2])
    parser.add_argument("run", type=path, metavar="RUN", help="run folder whose network takes guidance as an input")
    shown = ",".join(f"{scale:g}" for scale in SCALES)
    help_ = f"scales ω, two or more, comma-separated (the recipe's eval.guidance, else {shown})"
    parser.add_argument("--guidance", type=scales, help=help_)
    parser.add_argument(
        "--interval", type=interval, metavar="T_MIN,T_MAX", help="t in which it holds (the recipe's sample.interval)"
    )
    parser.add_argument("--n", type=count, help="samples of each scale (the recipe's eval.samples)")
    parser.add_argument("--steps", type=count, default=1, help="network evaluations a sample, NFE (1)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    add_device(parser)
    args = parser.parse_args(argv)
    if args.guidance is not None and len(args.guidance) < 2:
        raise UserError(f"--guidance {args.guidance[0]:g}: give two or more scales to compare")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    from eval.scoring.sweep import Choice, sweep  # here: PyTorch and matplotlib take seconds to import
    from meanflow.training.config import load_config
    from meanflow.training.processes import leaving_distributed, start_distributed
    from meanflow.training.run_folder import RunFolder

    run = RunFolder(args.run)
    if not run.config_file.is_file():
        raise UserError(f"{args.run}: is no run folder (it has no config.yaml)")
    config = load_config(run.config_file)
    choice = Choice(args.guidance or config.eval.guidance or SCALES, args.interval, args.n, args.steps, args.ema)
    with leaving_distributed():
        ctx = start_distributed(args.device)
        if sweep(run, config, ctx, choice) is not None:
            print(f"distance and accuracy against guidance → {run.path / 'guidance.png'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_main(main))
