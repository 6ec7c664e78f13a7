"""The sections of a report: each turns runs as they were read into a piece of the page."""

import json
from typing import Any

from eval.reports.figures import Grids
from eval.reports.html import NONE, Html, figure, folded, image, join, table, tag
from eval.reports.read import RunRecord, Score, differences

MANY = 30  # rows of a table that the page shows at once


def verdict(run: RunRecord) -> Html:
    """The run in a sentence: how far it is, what it took, on what."""
    state = "Finished" if run.finished else "Unfinished"
    return tag(
        "p",
        tag("strong", state, class_="finished" if run.finished else "unfinished"),
        f" at {progress(run)}, after {duration(run.last.get('seconds'))} of training on {hardware(run)}.",
        class_="verdict",
    )


def progress(run: RunRecord) -> str:
    return f"step {run.last['step']:,}" + (f" of {run.steps:,}" if run.steps is not None else "")


def duration(seconds: Any) -> str:
    if not isinstance(seconds, int | float):
        return "an unknown time"
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} seconds"


def hardware(run: RunRecord) -> str:
    if not run.starts:
        return "hardware that was not recorded"
    last = run.starts[-1]
    count = last.get("processes", 1)
    return f"{last.get('device', 'an unknown device')}, {count} process{'' if count == 1 else 'es'}"


def cards(run: RunRecord) -> Html:
    """The best distance at each NFE, large."""
    best = run.best()
    if not best:
        return missing(f"No scores yet. python -m eval.fid {run.folder.path} makes them.")
    shown = [
        tag(
            "div",
            tag("span", number(score.value), class_="value"),
            tag("span", f"{score.metric}, {score.nfe}-NFE", class_="what"),
            tag("span", f"N {score.n:,} · EMA {score.ema} · step {score.step:,}", class_="how"),
            class_="card",
        )
        for score in best
    ]
    return join(tag("div", *shown, class_="cards"), _advice(best))


def _advice(scores: list[Score]) -> Html:
    same = "Less is better. Distances compare where metric, N and reference are the same."
    if any(score.why for score in scores):
        same += " Which may not stand beside published figures, and why, is in the table of scores."
    return tag("p", same, class_="note")


def missing(text: str) -> Html:
    return tag("p", text, class_="missing")


def summary(runs: tuple[RunRecord, ...]) -> Html:
    """A row for each run: how far, how good, how long, on what."""
    keys = sorted({(score.metric, score.nfe, score.n) for run in runs for score in run.best()})
    found = {run: {key: score.value for key in keys if (score := run.least(*key))} for run in runs}
    rows = []
    for run in runs:
        values = [_marked(found[run].get(key), [all_[key] for all_ in found.values() if key in all_]) for key in keys]
        state = progress(run).removeprefix("step ") + ("" if run.finished else ", unfinished")
        rows.append([run.name, state, *values, duration(run.last.get("seconds")), hardware(run)])
    titles = [join(f"{metric}, {nfe}-NFE ", tag("small", f"N {n:,}")) for metric, nfe, n in keys]
    without = [run.name for run in runs if not found[run]]
    return join(
        table(["run", "step", *titles, "training", "hardware"], rows),
        _advice([score for run in runs for score in run.best()]) if keys else None,
        missing(f"No scores yet: {', '.join(without)}.") if without else None,
    )


def _marked(value: float | None, all_values: list[float]) -> object:
    """The least of several is set off."""
    if value is None:
        return NONE
    return tag("strong", number(value)) if value == min(all_values) < max(all_values) else number(value)


def number(value: float | None) -> str:
    if value is None:
        return NONE
    return f"{value:,.3f}" if abs(value) >= 0.1 or value == 0 else f"{value:.3g}"


def scores(runs: tuple[RunRecord, ...]) -> Html:
    """Everything in eval/*.json, newest first."""
    rows = [
        [*([run.name] if len(runs) > 1 else []), *_score_cells(score)]
        for run in runs
        for score in sorted(run.scores, key=lambda s: (s.metric, -s.step, -s.n, s.nfe, s.ema))
    ]
    if not rows:
        return missing("No scores yet.")
    header = ["metric", "value", "NFE", "EMA", "N", "step", "extractor", "reference", "beside published figures"]
    if len(runs) > 1:
        header.insert(0, "run")
    first, rest = table(header, rows[:MANY]), rows[MANY:]
    return join(first, folded(f"{len(rest)} more", table(header, rest)) if rest else None)


def _score_cells(score: Score) -> list[object]:
    value = "unfinished" if score.value is None else number(score.value)
    how = [score.nfe, score.ema, f"{score.n:,}", f"{score.step:,}", score.extractor, score.reference]
    return [score.metric, value, *how, f"no: {score.why}" if score.why else "yes"]


def differing(runs: tuple[RunRecord, ...]) -> Html:
    """Only the settings that are not the same in all runs, side by side; the longer side runs down the page."""
    keys = differences(runs)
    if not keys:
        return tag("p", "Their settings are the same.")
    cells = {key: [setting(run.settings[key]) if key in run.settings else NONE for run in runs] for key in keys}
    names = [run.name for run in runs]
    if len(keys) <= len(runs):
        return table(["run", *keys], [[name, *(cells[key][i] for key in keys)] for i, name in enumerate(names)])
    return table(["setting", *names], [[key, *cells[key]] for key in keys])


def setting(value: Any) -> str:
    """A setting's value as its recipe spells it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def samples(grids: dict[RunRecord, Grids], steps: list[int], count: int) -> Html:
    """Grids in rows: of one run a row for each of its averages, of several a row for each run."""
    several = len(grids) > 1
    rows = []
    for run, found in grids.items():
        for ema, pictures in found.rows.items():
            weights = "raw weights" if ema == "weights" else f"EMA {ema}"
            name = f"{run.name}, {weights}" if several else weights
            note = "the recipe’s" if ema == found.recipe and not several else f"step {found.step:,}" if several else ""
            cells = [
                _cell(png, f"{count} samples, {name}, {nfe}-NFE") for nfe, png in zip(steps, pictures, strict=True)
            ]
            rows.append(tag("tr", tag("th", name, tag("small", note), scope="row"), *cells))
    head = tag("tr", tag("th"), *(tag("th", f"{nfe}-NFE", scope="col") for nfe in steps))
    caption = _samples_caption(grids, count)
    return figure(tag("table", tag("thead", head), tag("tbody", *rows), class_="grids"), caption)


def _cell(png: bytes | None, alt: str) -> Html:
    return tag("td", "not finite" if png is None else image(png, alt, "pixels"))


def _samples_caption(grids: dict[RunRecord, Grids], count: int) -> Html:
    (run, found), *others = grids.items()
    of_step = "" if others else f" of step {found.step:,}"
    classes = f" Each row shows a class: {', '.join(found.classes)}." if found.classes else ""
    target = run.folder.path if not others else "RUN"
    return join(
        f"{count} samples a grid{of_step}, the same noise in every grid (seed 0).{classes} ",
        tag("code", f"python -m eval.sample {target} --n {count} --steps NFE --ema EMA --seed 0"),
    )


def curves(png: bytes, runs: tuple[RunRecord, ...]) -> Html:
    folders = " ".join(str(run.folder.path) for run in runs)
    caption = join(
        "Every step is in it (pale), with its running mean (dark). ", tag("code", f"python -m eval.plot {folders}")
    )
    return figure(image(png, f"training curves of {', '.join(run.name for run in runs)}", "ink wide"), caption)


def starts(runs: tuple[RunRecord, ...]) -> Html:
    """When, with what versions and on what the runs were started, and which settings changed on the way."""
    several = [run.name for run in runs if len(runs) > 1]
    facts = ("device", "cores", "processes", "torch", "torchvision", "python")
    header = [*(["run"] if several else []), "when", *facts, "settings changed"]
    rows = [
        [
            *([run.name] if several else []),
            str(start.get("time", NONE)).replace("T", " ")[:16],
            *(start.get(fact, NONE) for fact in facts),
            _changes(start.get("changed", {})),
        ]
        for run in runs
        for start in run.starts
    ]
    return table(header, rows) if rows else missing("No starts are recorded.")


def _changes(changed: dict[str, list[Any]]) -> str:
    return "; ".join(f"{key}: {setting(old)} → {setting(new)}" for key, (old, new) in changed.items()) or NONE


def failures(runs: tuple[RunRecord, ...]) -> Html | None:
    """Steps at which the runs stopped for their numbers."""
    lines = [
        tag(
            "li",
            f"{run.name}, step {failure.step:,}: {failure.what}. ",
            tag("code", f"python -m eval.replay {failure.file}"),
        )
        for run in runs
        for failure in run.failures
    ]
    return tag("ul", *lines) if lines else None


def configs(runs: tuple[RunRecord, ...]) -> Html:
    """Every setting of every run, folded."""
    return join(*(folded(f"config.yaml of {run.name}", tag("pre", run.yaml)) for run in runs))


def commands(runs: tuple[RunRecord, ...], this_page: str) -> Html:
    """What makes the runs, and this page, again."""
    again = [f"python -m run {run.folder.config_file} --out NEW_FOLDER" for run in runs]
    recorded = [tag("li", f"{run.name}: ", tag("code", run.command)) for run in runs if run.command]
    return join(
        tag("p", "A run’s config.yaml is complete, so it makes the same run again:"),
        tag("pre", "\n".join(again)),
        join(tag("p", "What made their scores, as it was recorded:"), tag("ul", *recorded)) if recorded else None,
        tag("p", "This page:"),
        tag("pre", this_page),
    )
