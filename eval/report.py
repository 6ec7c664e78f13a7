"""`python -m eval.report FOLDER [FOLDER …]`: one HTML page, in itself complete, by which to judge runs at a glance.

A folder is a run's, or a table's (`bash run.sh` of a table makes them). Several runs are compared.
"""

import argparse
import datetime
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

from eval.reports import sections
from eval.reports.figures import curves, has_checkpoint, read_picture, sample_grids
from eval.reports.html import Html, figure, folded, image, join, page, section, table, tag
from eval.reports.read import TABLE, RunRecord, TableRecord, one_seed_each, read_runs, read_table
from eval.scoring.files import write_atomically
from meanflow.errors import AssetError, UserError, run_main
from meanflow.logs import progress_bar
from meanflow.training.run_folder import RunFolder

STEPS = (1, 2, 8)
COUNT = 36


@dataclass(frozen=True)
class Sampling:
    """Which grids are made: NFEs, samples of each grid, and where."""

    steps: list[int]
    count: int
    device: torch.device


@dataclass(frozen=True)
class Part:
    """A table, or runs: a title, what is to be seen first, and {title: content} of the sections."""

    title: str
    lead: Html
    sections: dict[str, Html]


def main(argv: list[str] | None = None) -> int:
    args = _parse(argv)
    sampling = None
    if not args.no_samples:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        sampling = Sampling(_steps(args.steps), args.samples, device)
    tables = [read_table(folder) for folder in args.folders if _is_table(folder)]
    runs = read_runs([RunFolder(folder) for folder in args.folders if not _is_table(folder)])
    command = _command(args)
    parts = [_part_of_table(one, command) for one in tables]
    if runs:
        parts.append(_part_of_runs(runs, sampling, command))
    out = args.out or args.folders[0] / "report.html"
    text = _document(parts)
    write_atomically(out, lambda file: file.write(text.encode()))
    print(f"report of {', '.join(map(str, args.folders))} → {out}")
    return 0


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.report", description=__doc__)
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="a run's or a table's")
    parser.add_argument("--out", type=Path, help="the HTML to write (report.html in the first folder)")
    parser.add_argument("--steps", default=",".join(map(str, STEPS)), help="NFEs of the sample grids (1,2,8)")
    parser.add_argument("--samples", type=int, default=COUNT, help=f"samples of each grid ({COUNT})")
    parser.add_argument("--no-samples", action="store_true", help="make no grids: quick, and needs no checkpoint")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="where to compute (CUDA where there is one)")
    args = parser.parse_args(argv)
    if args.samples < 1:
        raise UserError(f"--samples must be ≥ 1, got {args.samples}")
    if args.out is not None and args.out.is_dir():
        raise UserError(f"--out {args.out}: is a folder; name an HTML file")
    return args


def _steps(text: str) -> list[int]:
    try:
        steps = [int(word) for word in text.split(",")]
    except ValueError:
        steps = []
    if not steps or min(steps) < 1:
        raise UserError(f"--steps {text}: expected numbers ≥ 1 with commas between, such as 1,2,8")
    return steps


def _is_table(folder: Path) -> bool:
    if not folder.is_dir():
        raise AssetError(f"{folder}: no such folder")
    if (folder / TABLE).exists():
        return True
    if (folder / "config.yaml").exists():
        return False
    raise AssetError(f"{folder}: is neither a run's folder (config.yaml) nor a table's ({TABLE})")


def _command(args: argparse.Namespace) -> str:
    words = [*map(str, args.folders), *(["--out", str(args.out)] if args.out else [])]
    if args.no_samples:
        words.append("--no-samples")
    else:
        words += ["--steps", args.steps, "--samples", str(args.samples)]
    return shlex.join(["python", "-m", "eval.report", *words])


def _part_of_runs(runs: tuple[RunRecord, ...], sampling: Sampling | None, command: str) -> Part:
    if len(runs) == 1:
        title = runs[0].name
        description = runs[0].settings.get("description")
        lead = join(tag("p", description, class_="lead"), sections.verdict(runs[0]), sections.cards(runs[0]))
    else:
        title = f"{len(runs)} runs compared"
        lead = sections.summary(runs)
    return Part(
        title,
        lead,
        {
            **({"Settings that differ": sections.differing(runs)} if len(runs) > 1 else {}),
            "Samples": _samples(runs, sampling),
            "Curves": sections.curves(curves([run.folder for run in runs]), runs),
            "Scores": sections.scores(runs),
            **_records(runs, command),
        },
    )


def _part_of_table(found: TableRecord, command: str) -> Part:
    """A table has its pictures already, so no grid is made here; curves of every seed would hide each other."""
    one_each = one_seed_each(found.runs)
    notes = tag("ul", *(tag("li", note) for note in found.notes), class_="note") if found.notes else None
    scale = f"Scale: {found.scale}."
    content = {"Table": join(table(found.header, found.rows), notes)}
    pictures = [("figure.png", "Figure", "ink"), ("samples.png", "Samples", "photo")]
    for name, title, class_ in pictures if found.runs or found.absent else pictures[:1]:  # a benchmark has no samples
        png = read_picture(found.path / name)
        caption = f"{found.path / name}, as the table left it."
        content[title] = (
            figure(image(png, f"{title.lower()} of {found.path.name}", class_), caption)
            if png
            else sections.missing(f"There is no {name} yet.")
        )
    absent = sections.missing(f"Not there yet: {', '.join(found.absent)}.") if found.absent else None
    if found.runs:
        content |= {
            "Runs": join(sections.summary(found.runs), absent),
            "Settings that differ": sections.differing(one_each),
            "Curves": sections.curves(curves([run.folder for run in one_each]), one_each),
            "Scores": folded("every score", sections.scores(found.runs)),
            **_records(found.runs, command),
        }
    elif absent:
        content["Runs"] = absent
    lead = join(tag("p", found.description, class_="lead"), tag("p", found.question, class_="verdict"), tag("p", scale))
    return Part(found.path.resolve().name, lead, content)


def _records(runs: tuple[RunRecord, ...], command: str) -> dict[str, Html]:
    failed = sections.failures(runs)
    return {
        **({"Failures": failed} if failed else {}),
        "Starts and environment": sections.starts(runs),
        "Configuration": sections.configs(runs),
        "Make it again": sections.commands(runs, command),
    }


def _samples(runs: tuple[RunRecord, ...], sampling: Sampling | None) -> Html:
    if sampling is None:
        return join(*(_left_samples(run, "No grids were made (--no-samples)") for run in runs))
    ready = [run for run in runs if has_checkpoint(run.folder)]
    several = progress_bar(ready, unit="run", disable=len(ready) < 2, leave=False)
    try:
        grids = {
            run: sample_grids(run.folder, sampling.steps, sampling.count, len(runs) == 1, sampling.device)
            for run in several
        }
    except UserError as error:
        raise type(error)(f"{error} (--no-samples reports without grids)") from error
    made = sections.samples(grids, sampling.steps, sampling.count) if grids else None
    return join(made, *(_left_samples(run, "No checkpoint yet") for run in runs if run not in grids))


def _left_samples(run: RunRecord, why: str) -> Html:
    """The grid that the run itself left, if it did."""
    png = read_picture(run.folder.path / "samples.png")
    if png is None:
        return sections.missing(f"{why}, and {run.name} has left no samples.png.")
    count, nfe, ema = (run.settings.get(key, "?") for key in ("sample.count", "sample.steps", "ema.eval"))
    file = run.folder.path / "samples.png"
    caption = f"{count} samples, {nfe}-NFE, EMA {ema}: {file}, as the run left it. {why}."
    return figure(image(png, f"samples of {run.name}", "pixels"), caption)


def _document(parts: list[Part]) -> str:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    alone = len(parts) == 1
    articles = [_article(part, f"part{number}", alone) for number, part in enumerate(parts, 1)]
    title = parts[0].title if alone else f"{parts[0].title} and {len(parts) - 1} more"
    return page(title, tag("header", f"MeanFlow report · {now}"), None if alone else _contents(parts), *articles)


def _article(part: Part, anchor: str, alone: bool) -> Html:
    links = tag("nav", _links(part, anchor)) if alone else None
    content = [section(title, _anchor(anchor, title), body) for title, body in part.sections.items()]
    return tag("article", tag("h1", part.title), part.lead, links, *content, id=anchor)


def _contents(parts: list[Part]) -> Html:
    lines = [
        tag("li", tag("a", part.title, href=f"#part{number}", class_="part"), _links(part, f"part{number}"))
        for number, part in enumerate(parts, 1)
    ]
    return tag("nav", tag("ul", *lines))


def _links(part: Part, anchor: str) -> Html:
    return join(*(tag("a", title, href=f"#{_anchor(anchor, title)}") for title in part.sections))


def _anchor(part: str, title: str) -> str:
    return f"{part}-{''.join(c if c.isalnum() else '-' for c in title.lower())}"


if __name__ == "__main__":
    raise SystemExit(run_main(main))
