"""The page of a report: which sections a run or a table has, and how they are put together."""

import datetime
import tempfile
from dataclasses import dataclass
from pathlib import Path

from eval.reports import sections
from eval.reports.curves import draw
from eval.reports.html import Html, figure, folded, image, join, page, read_picture, section, table, tag
from eval.reports.read import TABLE, RunRecord, TableRecord, one_seed_each, read_runs, read_table
from meanflow.errors import AssetError, UserError
from meanflow.logs import progress_bar
from meanflow.training.run_folder import RunFolder


@dataclass(frozen=True)
class Sampling:
    """Which grids are made: NFEs, samples of each grid, and where ("cpu", "cuda"; None: CUDA where there is one)."""

    steps: tuple[int, ...]
    count: int
    device: str | None


@dataclass(frozen=True)
class Part:
    """A table, or runs: a title, what is to be seen first, and {title: content} of the sections."""

    title: str
    lead: Html
    sections: dict[str, Html]


def report(folders: list[Path], sampling: Sampling | None, command: str) -> str:
    """The HTML page of these folders: a part for each table, and one for all runs together.

    sampling: None for no grids. Raises AssetError or ConfigError, naming the file, for what cannot be read.
    """
    tables = [read_table(folder) for folder in folders if is_table(folder)]
    runs = read_runs([RunFolder(folder) for folder in folders if not is_table(folder)])
    parts = [_part_of_table(one, command) for one in tables]
    if runs:
        parts.append(_part_of_runs(runs, sampling, command))
    return _document(parts)


def is_table(folder: Path) -> bool:
    """Raises AssetError for what is neither a table's folder nor a run's."""
    if not folder.is_dir():
        raise AssetError(f"{folder}: no such folder")
    if (folder / TABLE).exists():
        return True
    if RunFolder(folder).config_file.exists():
        return False
    raise AssetError(f"{folder}: is neither a run's folder (config.yaml) nor a table's ({TABLE})")


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
            "Curves": sections.curves(curves(runs), runs),
            "Scores": sections.scores(runs),
            **_records(runs, command),
        },
    )


def _part_of_table(found: TableRecord, command: str) -> Part:
    """A table has its pictures already, so no grid is made here; curves of every seed would hide each other."""
    one_each = one_seed_each(found.runs)
    notes = tag("ul", *(tag("li", note) for note in found.notes), class_="note") if found.notes else None
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
            "Curves": sections.curves(curves(one_each), one_each),
            "Scores": folded("every score", sections.scores(found.runs)),
            **_records(found.runs, command),
        }
    elif absent:
        content["Runs"] = absent
    lead = join(
        tag("p", found.description, class_="lead"),
        tag("p", found.question, class_="verdict"),
        tag("p", f"Scale: {found.scale}."),
    )
    return Part(found.path.resolve().name, lead, content)


def _records(runs: tuple[RunRecord, ...], command: str) -> dict[str, Html]:
    failed = sections.failures(runs)
    return {
        **({"Failures": failed} if failed else {}),
        "Starts and environment": sections.starts(runs),
        "Configuration": sections.configs(runs),
        "Make it again": sections.commands(runs, command),
    }


def curves(runs: tuple[RunRecord, ...]) -> bytes:
    """The figure of `run.sh plot` as a PNG. Raises AssetError if there is nothing to draw."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "curves.png"
        draw(runs, out)
        return out.read_bytes()


def _samples(runs: tuple[RunRecord, ...], sampling: Sampling | None) -> Html:
    if sampling is None:
        return join(*(_samples_png(run, "No grids were made (--no-samples)") for run in runs))
    from eval.reports.grids import sample_grids  # here: PyTorch takes seconds to import

    ready = [run for run in runs if any(run.folder.checkpoints.glob("*.pt"))]
    try:
        grids = {
            run: sample_grids(run.folder, sampling.steps, sampling.count, sampling.device, every_ema=len(runs) == 1)
            for run in progress_bar(ready, unit="run", disable=len(ready) < 2, leave=False)
        }
    except UserError as error:
        raise type(error)(f"{error} (--no-samples reports without grids)") from error
    made = sections.samples(grids, sampling.steps, sampling.count) if grids else None
    return join(made, *(_samples_png(run, "No checkpoint yet") for run in runs if run not in grids))


def _samples_png(run: RunRecord, why: str) -> Html:
    """The run's samples.png, if there is one."""
    file = run.folder.path / "samples.png"
    png = read_picture(file)
    if png is None:
        return sections.missing(f"{why}, and {run.name} has left no samples.png.")
    count, nfe, ema = (run.settings.get(key, "?") for key in ("sample.count", "sample.steps", "ema.eval"))
    caption = f"{count} samples, {nfe}-NFE, EMA {ema}: {file}, as the run left it. {why}."
    return figure(image(png, f"samples of {run.name}", "pixels"), caption)


def _document(parts: list[Part]) -> str:
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    alone = len(parts) == 1
    articles = [_article(part, f"part{number}", alone) for number, part in enumerate(parts, 1)]
    title = parts[0].title if alone else f"{parts[0].title} and {len(parts) - 1} more"
    return page(title, tag("header", f"Report of {now}"), None if alone else _contents(parts), *articles)


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
