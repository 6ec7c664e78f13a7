"""The job, top to bottom: recipe → train → sample → score → plot.

    python run.py RECIPE [--set key.path=value …] [--out DIR] [--dry-run]   a recipe, by name or file
    python run.py resume RUN [--set key.path=value …]                       continue a run with its own settings
    python run.py table1a [--scale cpu|gpu]                                 the rows of a table beside the paper's
    python run.py COMMAND …                                                 a command of eval/: sample, fid, plot, …
    torchrun --nproc-per-node 8 run.py recipes/imagenet_b4.yaml             the same job on many GPUs or nodes

The same command again continues a run. `bash run.sh …` sets up an environment first and uses all GPUs.
"""

import argparse
import difflib
import importlib
import itertools
import os
import shlex
import sys
import warnings
from pathlib import Path

from eval.scoring.options import Parser, add_device, add_set
from meanflow.errors import IncompleteError, UserError, run_main
from meanflow.training.signals import end_with_launcher

HERE = Path(__file__).resolve().parent
RECIPES, TABLES, FIGURES = HERE / "recipes", HERE / "recipes" / "tables", HERE / "recipes" / "figures"
PARALLEL = ("prepare_latents",)  # commands that are divided among all GPUs
SLOW_ON_CPU = 5_000_000  # parameters from which a CPU run is a matter of weeks


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun's, which our own launcher uses too
        end_with_launcher()
    if not argv or argv[0] in ("-h", "--help"):
        print(f"{__doc__.strip()}\n\n{listing()}")
        return 0
    name, rest = argv[0], argv[1:]
    if figure := file_in(FIGURES, name):
        return importlib.import_module(f"eval.{figure.stem}").main([str(figure), *rest])
    if name == "table" or table_files(name):
        table, words = importlib.import_module("eval.table"), [*map(str, table_files(name)), *rest]
        table.parse(words)  # mistakes are reported before processes start
        if processes := launched(name):
            return launch(processes, argv)
        return table.main(words, job)
    if name in commands():
        if name in PARALLEL and not {"-h", "--help"} & set(rest) and (processes := launched(name)):
            return launch(processes, argv)
        return importlib.import_module(f"eval.{name}").main(rest)
    args = parse(argv)
    if processes := launched(name):
        check(args, processes)
        return launch(processes, argv)
    return run_recipe(args)


# --- arguments -------------------------------------------------------------------------------------------------------


def commands() -> dict[str, str]:
    """{name: what it does} of the commands of eval/: the first line of each."""
    found = {}
    for path in sorted((HERE / "eval").glob("[a-z]*.py")):
        first = path.read_text(encoding="utf-8").partition("\n")[0].strip('"')
        found[path.stem] = (first.partition(": ")[2] or first).rstrip(".")
    return found


def table_files(name: str) -> list[Path]:
    """The files of the table called `name`, or of all the paper's for "tables"; empty if it is none."""
    if name == "tables":
        return sorted(TABLES.glob("table*.yaml")) + sorted(TABLES.glob("figure*.yaml")) + [TABLES / "jvp_overhead.yaml"]
    return [path] if (path := file_in(TABLES, name)) else []


def file_in(folder: Path, name: str) -> Path | None:
    """The YAML file in `folder` that `name` (its stem, or a path to it) refers to; None if there is none."""
    file = Path(name).expanduser()
    path = folder / (f"{name}.yaml" if file.name == name and not file.suffix else file.name)
    return path if path.is_file() and (file.name == name or (file.exists() and file.samefile(path))) else None


def recipe_file(name: str) -> Path:
    """The recipe called `name`, or the file `name`. Raises UserError, with similar names, if there is none."""
    file = Path(name).expanduser()
    if file.suffix in (".yaml", ".yml") and file.is_file():
        return file
    if path := file_in(RECIPES, name):
        return path
    if (file / "config.yaml").is_file():
        raise UserError(f"{name} is a run folder: continue it with bash run.sh resume {shlex.quote(name)}")
    known = [*(path.stem for path in RECIPES.rglob("*.yaml")), "tables", *commands()]
    near = difflib.get_close_matches(file.stem, known, n=3, cutoff=0.5)
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
            lines.append(f"  {path.stem:<21} {start[0].partition(':')[2].strip().strip(chr(34)) if start else ''}")
        if folder == TABLES:
            lines.append(f"  {'tables':<21} all of the paper's, one after the other")
    lines += ["commands, each with --help", *(f"  {name:<21} {what}" for name, what in commands().items())]
    return "\n".join(lines)


def parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("", __doc__)
    parser.add_argument("recipe", help="a recipe's name, a YAML file, or resume")
    parser.add_argument("folder", nargs="?", type=Path, metavar="RUN", help="with resume: the run folder")
    add_set(parser)
    parser.add_argument("--out", type=Path, help="run folder (runs/NAME)")
    parser.add_argument("--dry-run", action="store_true", help="print settings, parameters, memory and speed, and stop")
    add_device(parser)
    args = parser.parse_args(argv)
    if args.recipe == "resume":
        if args.folder is None or args.out is not None:
            raise UserError("resume takes a run folder, such as runs/demo, and no --out")
        args.out = args.folder.expanduser()
        args.file = args.out / "config.yaml"
        if not args.file.is_file():
            raise UserError(f"{args.out}: is no run folder (it has no config.yaml)")
    elif args.folder is not None:
        hint = f": did you mean --set {shlex.quote(str(args.folder))}?" if "=" in str(args.folder) else ""
        raise UserError(f"{args.folder}: only one recipe at a time is run{hint}")
    else:
        args.file = recipe_file(args.recipe)
        args.out = (args.out or Path("runs") / args.file.stem).expanduser()
    for change in args.set:
        if "=" not in change:
            raise UserError(f"--set {change}: expected key.path=value, such as train.steps=1000")
    return args


# --- processes -------------------------------------------------------------------------------------------------------


def launched(name: str) -> int:
    """How many processes to start: NPROC (a number, or "all" GPUs); 0 if this one does the work itself."""
    requested = os.environ.get("NPROC", "")
    if "RANK" in os.environ or not requested or name == "jvp_overhead":  # which is timed in a single process
        return 0
    if requested == "all":
        import torch

        count = torch.cuda.device_count()
    elif requested.isdecimal() and int(requested) > 0:
        count = int(requested)
    else:
        raise UserError(f"NPROC={requested}: the number of processes must be 1 or more, or all")
    return count if count > 1 else 0


def launch(processes: int, argv: list[str]) -> int:
    from meanflow.training.launch import run_in_processes

    return run_in_processes(processes, [str(Path(__file__).resolve()), *argv])


def check(args: argparse.Namespace, world: int) -> None:
    """Check settings before processes start, so that an error is one line. Raises ConfigError."""
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
            for text in itertools.chain([config_to_yaml(config)], estimate(config, ctx), [cost_line(config)]):
                if ctx.is_main:
                    print(text, flush=True)
            return 0
        with warned_by_usr1(), lost_ranks_explained(ctx):
            requested = {change.partition("=")[0].strip() for change in args.set}
            return job(config, args.out, ctx, requested)


def job(config, out: Path, ctx, requested=frozenset()) -> int:
    """Train (or continue) in the run folder `out`, then write samples.png, eval/*.json and curves.png; the exit code.

    requested: keys of settings that were given by --set.
    """
    from eval.reports.curves import plot
    from eval.reports.read import ema_note
    from eval.sampling.grid import write_grid
    from eval.scoring.score import ScoreDuring, closing_table, score_run, shown_at_the_end
    from eval.scoring.sweep import Choice, sweep
    from meanflow.logs import log
    from meanflow.training.loop import train
    from meanflow.training.microbatch import with_last_microbatch, with_microbatch
    from meanflow.training.processes import run_on_rank0
    from meanflow.training.run_folder import RunFolder
    from meanflow.training.setup import set_up

    run, opened = RunFolder(out), []
    try:
        run_on_rank0(ctx, lambda: opened.append(run.lock()))
        if "train.microbatch" not in requested:
            config = with_last_microbatch(config, run_on_rank0(ctx, run.config))
        config = with_microbatch(config, ctx)
        changed = run_on_rank0(ctx, lambda: run.check(config, requested))
        run_on_rank0(ctx, lambda: warn(config, ctx))
        training = set_up(config, run, ctx, requested)
        opened.insert(0, training.metrics)
        if ctx.is_main:  # only now: a start that is refused changes nothing
            run.write_config(config)
            run.note_start(
                processes=ctx.world, step=training.state.step, changed=changed, titles=config.objective.titles
            )
        code = train(training, ScoreDuring())
        if code:
            return code
        if ctx.is_main:
            if note := ema_note(config.ema.eval, training.state.step):
                log.info(f"note: {note}")
            write_grid(run, config, ctx.device)
        try:
            results = score_run(run, config, ctx)
            if config.eval.guidance:
                sweep(run, config, ctx, Choice(config.eval.guidance))
        except UserError as error:  # curves even if scoring fails, but Ctrl-C does not wait for them
            if ctx.is_main and not isinstance(error, IncompleteError):
                plot([run], run.curves)
            raise
        if ctx.is_main:
            plot([run], run.curves)
            training.metrics.show(training.state.step, shown_at_the_end(run, results))
            log.info(closing_table(config, run, results))
        return 0
    finally:
        for one in opened:
            one.close()


def warn(config, ctx) -> None:
    """Warn of problems that would otherwise show after a long run. Raises UserError for a run that cannot be scored."""
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
