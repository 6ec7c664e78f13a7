"""All parts of the check in their order, and the advice at the end."""

import argparse
from pathlib import Path

import torch

from eval.benchmark.clock import cpu_has_bf16
from eval.benchmark.steps import Setting
from eval.checking import derivatives, machine, runs, scaling, speed
from eval.checking.report import Report
from meanflow.logs import duration
from meanflow.training.config import RunConfig, load_config
from meanflow.training.costs import forward_multiply_adds

SECONDS = {"cuda": 270, "cpu": 150}
IMAGES = 128  # a step while timing, at most
CPU_STEP = 4e10  # multiplications and additions of a forward pass: a CPU's step then takes about a second


def run_all(
    file: Path, overrides: tuple[str, ...], args: argparse.Namespace, device: torch.device, folder: Path
) -> tuple[Report, str]:
    """The report, and the lines of advice. Raises ConfigError for a recipe or setting that is wrong."""
    config = load_config(file, overrides)
    cuda = device.type == "cuda"
    report = Report(args.seconds or SECONDS[device.type])
    found = machine.describe(device)
    report.numbers |= {"machine": found, "recipe": file.stem, "set": list(overrides)}
    precisions = ("tf32", "bf16", "fp32") if cuda else ("fp32", "bf16") if cpu_has_bf16() else ("fp32",)
    modes = ("default", "reduce-overhead") if cuda else ("default",) if args.compile else ()
    few = IMAGES if cuda else max(2, int(CPU_STEP / forward_multiply_adds(config)))
    batch = args.batch or min(few, IMAGES, config.train.batch)
    setting = Setting(file, overrides, batch, "dual", precisions[0], None)
    steps: list[speed.Speed] = []

    report.part("machine", lambda: machine.lines(found))
    report.part("tests of the suite that need a GPU", lambda: machine.gpu_tests(device))
    title = f"derivatives of {file.stem} against torch.func in float32"
    ways = [(precision, None) for precision in precisions]
    ways += [(precisions[0], mode) for mode in modes[:1]]  # once: compiling takes a minute or more
    report.part(title, lambda: derivatives.agreement(setting, ways, device))
    report.part("runs", lambda: runs.killed_and_resumed(folder, device))
    report.part("processes", lambda: runs.two_processes(folder, device))
    choices = speed.choices(config, precisions, modes)
    title = f"steps of {file.stem}, {batch} images at once"
    report.part(title, lambda: speed.search(setting, choices, device, report, steps))
    if cuda and steps:
        best = steps[-1]
        report.part("devices", lambda: scaling.two_devices(setting, best, folder, device))
    report.numbers["steps"] = speed.numbers(steps)
    return report, advice(config, steps, found["devices"])


def advice(config: RunConfig, steps: list[speed.Speed], devices: int) -> str:
    """The settings that were fastest, and how long the recipe takes with them on all devices."""
    if not steps:
        return "no step could be timed: see above"
    best = steps[-1]
    seconds = config.train.steps * config.train.batch / best.images_per_s / devices
    where = f"{devices} devices (if they scale evenly)" if devices > 1 else "it"
    settings = " ".join(f"{key}={value}" for key, value in best.settings.items())
    return (
        f"for this machine: --set {settings}\n"
        f"{config.train.steps:,} steps of {config.train.batch:,} images take about {duration(seconds)} on {where}"
    )
