"""The job, top to bottom: recipe → train → sample → score → plot.

    python run.py RECIPE [--set key.path=value …] [--out DIR] [--dry-run]   a recipe, by name or file
    python run.py resume RUN [--set key.path=value …]                       a run folder, under its own settings
    python run.py table1a [--scale cpu|gpu]                                 the rows of a table, set beside the paper's
    python run.py COMMAND …                                                 a command of eval/: sample, fid, plot, …
    torchrun --nproc-per-node 8 run.py recipes/imagenet_b4.yaml             the same job on many GPUs or nodes

RECIPE alone starts, and started again continues. `bash run.sh …` sets up an environment first and uses all GPUs.
"""

import argparse
import importlib
import os
import sys
import warnings
from pathlib import Path

from meanflow.errors import UserError, run_main

HERE = Path(__file__).resolve().parent
RECIPES, TABLES, FIGURES = HERE / "recipes", HERE / "recipes" / "tables", HERE / "recipes" / "figures"
SLOW_ON_CPU = 5_000_000  # parameters from which a CPU run is a matter of weeks


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{listing()}")
        return 0
    name, rest = argv[0], argv[1:]
    if (FIGURES / f"{name}.yaml").exists():
        return importlib.import_module(f"eval.{name}").main([str(FIGURES / f"{name}.yaml"), *rest])
    if name in commands():
        return importlib.import_module(f"eval.{name}").main(rest)
    if tables := table_files(name):
        if processes := launched(name):
            return launch(processes, argv)
        return importlib.import_module("eval.table").main([*map(str, tables), *rest], job)
    args = parse(argv)
    if processes := launched(name):
        check(args, processes)
        return launch(processes, argv)
    return run_recipe(args)


# --- what is asked for -----------------------------------------------------------------------------------------------


def commands() -> dict[str, str]:
    """{name: what it does} of the commands of eval/: the first line of each."""
    found = {}
    for path in sorted((HERE / "eval").glob("[a-z]*.py")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].strip('"')
        found[path.stem] = first.partition(": ")[2] or first
    return found


def table_files(name: str) -> list[Path]:
    """The tables that `name` stands for: one, or with "tables" all of the paper's."""
    if name == "tables":
        return sorted(TABLES.glob("table*.yaml")) + sorted(TABLES.glob("figure*.yaml")) + [TABLES / "jvp_overhead.yaml"]
    return [TABLES / f"{name}.yaml"] if (TABLES / f"{name}.yaml").exists() else []


def recipe_file(name: str) -> Path:
    """The recipe called `name`, or the file at it. Raises UserError, naming near ones, if there is none."""
    named, file = RECIPES / f"{name}.yaml", Path(name).expanduser()
    if named.exists():
        return named
    if file.suffix in (".yaml", ".yml") and file.is_file():
        return file
    import difflib

    known = [*(path.stem for path in (HERE / "recipes").rglob("*.yaml")), "tables", *commands()]
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"; did you mean {' or '.join(near)}?" if near else ""
    raise UserError(f"there is no recipe, recipe file or command '{name}'{hint} (bash run.sh lists them)")


def listing() -> str:
    """Recipes, tables, figures and commands, a line each."""
    lines = []
    titles = {
        "recipes": RECIPES,
        "tables, also [--scale cpu|gpu] [--rows 1,2] [--seeds 0,1]": TABLES,
        "figures": FIGURES,
    }
    for title, folder in titles.items():
        lines.append(title)
        for path in sorted(folder.glob("*.yaml")):
            start = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("description:")]
            lines.append(f"  {path.stem:<18} {start[0].partition(':')[2].strip().strip(chr(34)) if start else ''}")
        if folder == TABLES:
            lines.append(f"  {'tables':<18} all of the paper's, one after the other")
    lines += ["commands, each with --help", *(f"  {name:<18} {what}" for name, what in commands().items())]
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", help="a recipe's name, a YAML file, or resume")
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="with resume: the run folder")
    parser.add_argument(
        "--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help="override settings"
    )
    parser.add_argument("--out", type=Path, help="run folder (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print settings, parameters, memory and speed, and stop")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    args = parser.parse_args(argv)
    if args.recipe == "resume":
        if args.folder is None or args.out is not None:
            raise UserError("resume takes a run folder, and no --out")
        args.out = args.folder.expanduser()
        args.file = args.out / "config.yaml"
        if not args.file.exists():
            raise UserError(f"{args.out}: is no run folder (it has no config.yaml)")
    elif args.folder is not None:
        raise UserError(f"{args.folder}: what is this? After --set, settings are written key.path=value")
    else:
        args.file = recipe_file(args.recipe)
        args.out = (args.out or Path("runs") / args.file.stem).expanduser()
    return args


# --- processes -------------------------------------------------------------------------------------------------------


def launched(name: str) -> int:
    """How many processes this one should start: NPROC (a number, or "all" GPUs); 0 if it is to do the work itself."""
    wanted = os.environ.get("NPROC", "")
    if "RANK" in os.environ or not wanted or name == "jvp_overhead":  # that one is timed alone
        return 0
    if wanted == "all":
        import torch

        wanted = str(torch.cuda.device_count())
    if not wanted.isdecimal() or (wanted == "0" and os.environ["NPROC"] != "all"):
        raise UserError(f"NPROC={wanted}: the number of processes must be 1 or more")
    return int(wanted) if int(wanted) > 1 else 0


def launch(processes: int, argv: list[str]) -> int:
    from meanflow.training.launch import run_in_processes

    return run_in_processes(processes, [str(Path(__file__).resolve()), *argv])


def check(args: argparse.Namespace, world: int) -> None:
    """What can be known before processes start. Raises ConfigError."""
    from meanflow.training.batches import split_batch
    from meanflow.training.config import load_config

    split_batch(load_config(args.file, args.set), world)


# --- the job ---------------------------------------------------------------------------------------------------------


def run_recipe(args: argparse.Namespace) -> int:
    from eval.scoring.score import cost_line
    from meanflow.training.config import config_to_yaml, load_config
    from meanflow.training.estimate import estimate
    from meanflow.training.processes import leaving_distributed, lost_ranks_explained, start_distributed
    from meanflow.training.signals import warned_by_usr1

    config = load_config(args.file, args.set)
    with leaving_distributed():
        ctx = start_distributed(args.device)
        if args.dry_run:
            report = estimate(config, ctx)
            if ctx.is_main:
                print(config_to_yaml(config), report, cost_line(config), sep="\n")
            return 0
        with warned_by_usr1(), lost_ranks_explained(ctx):
            requested = {change.partition("=")[0].strip() for change in args.set}
            return job(config, args.out, ctx, requested)


def job(config, out: Path, ctx, requested=frozenset()) -> int:
    """Train (or continue) in the run folder `out`, then write samples.png, eval/*.json and curves.png; the exit code.

    requested: keys of settings that were given by --set.
    """
    from eval.plot import plot
    from eval.sampling.grid import write_grid
    from eval.scoring.score import ScoreDuring, closing_table, score_run
    from meanflow.logs import log
    from meanflow.training.checkpoint import list_checkpoints
    from meanflow.training.loop import train
    from meanflow.training.run_folder import RunFolder
    from meanflow.training.setup import set_up

    run = RunFolder(out)
    lock = run.lock() if ctx.is_main else None
    try:
        changed = run.check(config, requested) if ctx.is_main else {}
        if ctx.is_main:
            warn(config, ctx)
        training = set_up(config, run, ctx, requested)
        if ctx.is_main:  # nothing of the run is rewritten before everything has been checked
            saved = list_checkpoints(run.checkpoints)
            run.write_config(config)
            run.note_start(
                processes=ctx.world,
                step=int(saved[-1].stem) if saved else 0,
                changed={key: list(pair) for key, pair in changed.items()},
            )
        code = train(training, ScoreDuring())
        if code:
            return code
        if ctx.is_main:
            write_grid(run, config, ctx.device)
        try:
            results = score_run(run, config, ctx)
        finally:  # curves are worth having where a score is not to be had
            if ctx.is_main:
                plot([run], run.curves)
        if ctx.is_main:
            log.info(closing_table(config, run, results))
        return 0
    finally:
        if lock:
            lock.close()


def warn(config, ctx) -> None:
    """What is better known before a long run than after."""
    import torch

    from eval.scoring.score import preflight
    from meanflow.logs import log
    from meanflow.training.state import build_network, count_parameters

    if ctx.device.type == "cpu" and count_parameters(build_network(config, torch.device("meta"))) > SLOW_ON_CPU:
        log.warning("no GPU is used, and on a CPU this network trains very slowly; --dry-run estimates how long")
    for warning in preflight(config):
        log.warning(warning)


def cli() -> None:
    """The console command `meanflow`, where the project is installed as a package."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch")
    raise SystemExit(run_main(main))


if __name__ == "__main__":
    cli()
