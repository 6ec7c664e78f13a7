"""What the commands of sampling and scoring accept, read without PyTorch, which takes seconds to import."""

import argparse
import os
from argparse import ArgumentTypeError
from itertools import pairwise
from pathlib import Path
from typing import NoReturn

from meanflow.errors import AssetError, UserError, write_errors_named

METRICS = ("fid", "isc", "kid", "prc")
INCEPTION, PIXELS, THUMBNAILS = "inception-v3-compat", "pixels", "thumbnails"
EXTRACTORS = (INCEPTION, PIXELS, THUMBNAILS)
CIFAR10_SPLITS = {"cifar10-train": "train", "cifar10-test": "test"}
DIGITS = "digits"
ADM = "adm-imagenet256"  # ADM's statistics of ImageNet's training images at 256², and 10,000 of them
NAMED = (*CIFAR10_SPLITS, DIGITS, ADM)  # references that have a name
RUN = "run folder, checkpoint file, shared folder, or owner/name on the Hugging Face hub"
FULL_N = 50_000  # what "FID" means without another number beside it


class Parser(argparse.ArgumentParser):
    """Raises UserError, one line, where argparse would print its usage."""

    def __init__(self, command: str, description: str, **options):
        options.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        super().__init__(prog=f"bash run.sh {command}".strip(), description=description, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


# --- options of several commands ---------------------------------------------------------------------------------


def add_device(parser, what: str = "compute") -> None:
    parser.add_argument("--device", choices=("cpu", "cuda"), help=f"where to {what} (CUDA where there is one)")


def add_set(parser, what: str = "override settings") -> None:
    parser.add_argument("--set", action="extend", nargs="+", default=[], metavar="KEY.PATH=VALUE", help=what)


def add_guidance(parser) -> None:
    """--guidance ω and --interval t_min,t_max, of networks that take guidance as an input."""
    help_ = "guidance scale ω, where it is an input of the network (the recipe's sample.guidance)"
    parser.add_argument("--guidance", type=scale, help=help_)
    parser.add_argument(
        "--interval", type=interval, metavar="T_MIN,T_MAX", help="t in which it holds (the recipe's sample.interval)"
    )


def add_out(parser, what: str) -> None:
    """--out FILE and --overwrite; see `check_out`."""
    parser.add_argument("--out", type=path, help=what)
    parser.add_argument("--overwrite", action="store_true", help="replace --out if it exists")


# --- types of options: they raise ArgumentTypeError ---------------------------------------------------------------


def path(text: str) -> Path:
    """A path with ~ expanded, of a file or folder that may be missing."""
    found = Path(os.path.expanduser(text))
    try:
        found.exists()
    except OSError as error:  # a name that is too long, a folder above it that may not be entered, …
        raise ArgumentTypeError(f"{text}: {error.strerror}") from None
    if not text:
        raise ArgumentTypeError("an empty path")
    return found


def reference(text: str) -> str:
    """A name in NAMED, or a path."""
    return text if text in NAMED else str(path(text))


def count(text: str) -> int:
    """A whole number of 1 or more."""
    if not (text.isascii() and text.isdecimal() and int(text)):
        raise ArgumentTypeError(f"give a whole number of 1 or more, not {text!r}")
    return int(text)


def counts(text: str) -> tuple[int, ...]:
    """Whole numbers of 1 or more, separated by commas; each once."""
    return tuple(dict.fromkeys(count(part.strip()) for part in text.split(",")))


def grid(text: str) -> tuple[float, ...]:
    """A time grid, such as 1,0.6,0."""
    try:
        times = tuple(float(part) for part in text.split(","))
    except ValueError:
        times = ()
    if len(times) < 2 or times[0] != 1 or times[-1] != 0 or not all(t > r for t, r in pairwise(times)):
        raise ArgumentTypeError(f"give times that descend from 1 to 0, such as 1,0.6,0, not {text!r}")
    return times


def scale(text: str) -> float:
    """A guidance scale ω ≥ 1."""
    try:
        omega = float(text)
    except ValueError:
        omega = 0.0
    if not 1 <= omega < float("inf"):
        raise ArgumentTypeError(f"give a guidance scale of 1 (none) or more, not {text!r}")
    return omega


def scales(text: str) -> tuple[float, ...]:
    """Guidance scales, separated by commas; each once."""
    return tuple(dict.fromkeys(scale(part) for part in text.split(",")))


def interval(text: str) -> tuple[float, float]:
    """The interval of t with guidance, such as 0.4,0.65."""
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        low, high = 1.0, 0.0
    if not 0 <= low <= high <= 1:
        raise ArgumentTypeError(f"give t_min,t_max with 0 ≤ t_min ≤ t_max ≤ 1, such as 0.4,0.65, not {text!r}")
    return low, high


def metrics(text: str) -> tuple[str, ...]:
    """Names of metrics, separated by commas; each once."""
    names = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    if not set(names) <= set(METRICS):
        raise ArgumentTypeError(f"choose from {', '.join(METRICS)}, not {text!r}")
    return names


def steps_name(steps: int, times: tuple[float, ...] | None = None) -> str:
    """For file names: "nfe2", and for another time grid than the even one "nfe2-grid1-0.6-0"."""
    return f"nfe{steps}" if times is None else f"nfe{len(times) - 1}-grid{'-'.join(f'{t:g}' for t in times)}"


def guidance_name(omega: float, times: tuple[float, float]) -> str:
    """For file names: "-w7.5", and if guidance is not everywhere "-w7.5-t0.4-0.65"."""
    return f"-w{omega:g}" + ("" if times == (0, 1) else f"-t{times[0]:g}-{times[1]:g}")


def check_out(out: Path, overwrite: bool) -> None:
    """Before the work rather than after. Raises AssetError if `out` cannot be a file, or is one that is to be kept."""
    if out.exists() and not out.is_file():
        raise AssetError(f"--out {out}: is a folder or a device; name a file")
    if out.exists() and not overwrite:
        raise AssetError(f"--out {out}: exists; --overwrite replaces it")
    with write_errors_named(out):
        out.parent.mkdir(parents=True, exist_ok=True)
