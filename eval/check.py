"""`bash run.sh check [RECIPE]`: is this machine right for training, and which settings are fastest on it?

Five minutes on a GPU, three on two CPU cores: what the machine is, the tests that need a GPU, derivatives against
torch.func, a run that is killed and continued, two processes against one, and the speed of the recipe's training step
with different settings; then the settings to use. Something that fails is reported, and the rest goes on. Exit code 1
if anything failed.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

from eval.scoring.options import Parser, add_device, add_out, add_set, check_out, count
from meanflow.errors import UserError, run_main

DEFAULT = "cifar10"
RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser("check", __doc__.partition(": ")[2])
    parser.add_argument("recipe", nargs="?", default=DEFAULT, help=f"a recipe's name or file ({DEFAULT})")
    add_set(parser)
    parser.add_argument(
        "--batch", type=count, help="images a step while timing (128 on a GPU, on a CPU as many as take a second)"
    )
    parser.add_argument("--compile", action="store_true", help="on a CPU too, time compiled steps, which takes longer")
    parser.add_argument("--seconds", type=count, help="no step is timed after these (270 on a GPU, 150 on a CPU)")
    add_device(parser)
    add_out(parser, "a JSON file with all of it (runs/check/RECIPE-DATE.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    named = RECIPES / f"{args.recipe}.yaml"
    file = named if named.exists() else Path(args.recipe)
    if not file.is_file():
        raise UserError(f"there is no recipe or recipe file '{args.recipe}' (bash run.sh lists them)")
    out = args.out or Path("runs/check") / f"{file.stem}-{time.strftime('%Y%m%d-%H%M%S')}.json"
    check_out(out, args.overwrite)

    from eval.checking.checks import run_all
    from meanflow.files import make_folder, write_text
    from meanflow.training.model import device_of

    device = device_of(args.device)
    make_folder(out.parent)  # better known before minutes of timing than after
    with tempfile.TemporaryDirectory(prefix="meanflow-check-") as folder:
        report, advice = run_all(file, tuple(args.set), args, device, Path(folder))
    print(report.table(), "", advice, f"{report.spent:.0f} seconds; everything is in {out}", sep="\n")
    write_text(out, json.dumps(report.tree(), indent=1, ensure_ascii=False) + "\n")
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
