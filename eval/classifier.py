"""`bash run.sh classifier RUN`: do samples show the class asked for? A plain classifier judges (small images)."""

import sys

from eval.scoring.options import RUN, Parser, add_device, add_guidance, count, path
from meanflow.errors import run_main


def main(argv: list[str] | None = None) -> int:
    parser = Parser("classifier", __doc__)
    parser.add_argument("what", type=path, metavar="RUN", help=f"{RUN}, of a class-conditional run")
    parser.add_argument("--n", type=count, default=5000, help="samples (5000)")
    parser.add_argument("--steps", type=count, default=1, help="network evaluations a sample, NFE (1)")
    parser.add_argument("--ema", help="a decay that the run keeps, or 'weights' (the recipe's ema.eval)")
    parser.add_argument("--seed", type=int, default=0, help="of labels and noise (0)")
    add_guidance(parser)
    add_device(parser, "sample")
    args = parser.parse_args(argv)

    from eval.scoring.classifier import accuracy_file, classifier_accuracy, write_accuracy
    from meanflow.training.model import load
    from meanflow.training.run_folder import RunFolder

    model = load(args.what, args.ema, args.device)
    guidance = model.guided(args.guidance, args.interval)
    found = classifier_accuracy(model, args.n, args.steps, args.seed, guidance)
    if args.what.is_dir():
        file = accuracy_file(RunFolder(args.what), model.meta["step"], model.ema, args.steps, guidance)
        write_accuracy(file, found)
    print(
        f"classifier accuracy: {found.accuracy:.1%} of {found.samples:,} samples (NFE {found.steps}, EMA {found.ema}"
        f"{'' if guidance is None else f', guidance {guidance}'}) "
        f"are recognised as the class asked for; {found.real:.1%} of real images are (cross-validated)"
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
