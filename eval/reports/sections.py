"""The sections of a report: each turns runs into a part of the page."""

import json
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from eval.reports.html import NONE, Html, figure, folded, image, join, table, tag
from eval.reports.read import RunRecord, Score, differences, ema_note, read_failures
from meanflow.logs import duration

if TYPE_CHECKING:  # imports PyTorch
    from eval.reports.grids import Grids

MANY = 30  # rows of a table that the page shows at once


def verdict(run: RunRecord) -> Html:
    """The run in a sentence: how far it is, what it took, on what."""
    state = "Finished" if finished(run) else "Unfinished"
    return tag(
        "p",
        tag("strong", state, class_="finished" if finished(run) else "unfinished"),
        f" at {progress(run)}, after {trained(run)} of training on {hardware(run)}.",
        class_="verdict",
    )


def finished(run: RunRecord) -> bool:
    return run.steps is not None and run.step >= run.steps


def progress(run: RunRecord) -> str:
    return f"step {run.step:,}" + (f" of {run.steps:,}" if run.steps is not None else "")


def trained(run: RunRecord) -> str:
    """How long."""
    seconds = run.last.get("seconds")
    return duration(seconds) if seconds is not None and seconds == seconds else "an unknown time"


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
        return missing(f"No scores yet: bash run.sh fid {run.folder.path} makes them.")
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
    return join(tag("div", *shown, class_="cards"), _advice(best), notes(run.ema_notes()))


def _advice(scores: list[Score]) -> Html:
    same = "Less is better. Compare distances of the same metric, N and reference only."
    if any(score.why for score in scores):
        same += " The table of scores says which may not be compared with published ones, and why."
    return tag("p", same, class_="note")


def notes(texts: Iterable[str]) -> Html:
    return join(*(tag("p", f"Note: {text}.", class_="note") for text in dict.fromkeys(texts)))


def missing(text: str) -> Html:
    return tag("p", text, class_="missing")


def summary(runs: tuple[RunRecord, ...]) -> Html:
    """A row for each run: how far, how good, how long, on what."""
    keys = sorted({(score.metric, score.nfe, score.n) for run in runs for score in run.best()})
    found = {run: {key: score.value for key in keys if (score := run.least(*key))} for run in runs}
    rows = []
    for run in runs:
        values = [_marked(found[run].get(key), [all_[key] for all_ in found.values() if key in all_]) for key in keys]
        state = progress(run).removeprefix("step ") + ("" if finished(run) else ", unfinished")
        rows.append([run.name, state, *values, trained(run), hardware(run)])
    titles = [join(f"{metric}, {nfe}-NFE ", tag("small", f"N {n:,}")) for metric, nfe, n in keys]
    without = [run.name for run in runs if not found[run]]
    return join(
        table(["run", "step", *titles, "training", "hardware"], rows),
        _advice([score for run in runs for score in run.best()]) if keys else None,
        notes(f"{run.name}: {note}" for run in runs for note in run.ema_notes()),
        missing(f"No scores yet: {', '.join(without)}.") if without else None,
    )


def _marked(value: float | None, all_values: list[float]) -> object:
    """The lowest of several is bold."""
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
    header = ["metric", "value", "NFE", "EMA", "N", "step", "extractor", "reference", "comparable with published"]
    if len(runs) > 1:
        header.insert(0, "run")
    first, rest = table(header, rows[:MANY]), rows[MANY:]
    return join(first, folded(f"{len(rest)} more", table(header, rest)) if rest else None)


def _score_cells(score: Score) -> list[object]:
    value = "unfinished" if score.value is None else number(score.value)
    value += "" if score.deviation is None else f" ± {number(score.deviation)}"
    how = [
        f"{score.nfe}, {score.guidance}" if score.guidance else score.nfe,
        score.ema,
        f"{score.n:,}",
        f"{score.step:,}",
        score.extractor,
        score.reference,
    ]
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


def samples(grids: dict[RunRecord, "Grids"], steps: Sequence[int], count: int) -> Html:
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
    averages = [(run, ema, found.step) for run, found in grids.items() for ema in found.rows]
    young = [(run, note) for run, ema, step in averages if (note := ema_note(ema, step))]
    return join(
        figure(tag("table", tag("thead", head), tag("tbody", *rows), class_="grids"), _samples_caption(grids, count)),
        notes(f"{run.name}: {note}" if several else note for run, note in young),
    )


def _cell(png: bytes | None, alt: str) -> Html:
    return tag("td", "not finite" if png is None else image(png, alt, "pixels"))


def _samples_caption(grids: dict[RunRecord, "Grids"], count: int) -> Html:
    (run, found), *others = grids.items()
    of_step = "" if others else f" of step {found.step:,}"
    classes = f" Each row shows a class: {', '.join(found.classes)}." if found.classes else ""
    target = run.folder.path if not others else "RUN"
    down = "the run" if others else "the average of the weights"
    return join(
        f"{count} samples a grid{of_step}, all from the same noise (seed 0). The number of network evaluations (NFE) "
        f"changes to the right, {down} downwards.{classes} ",
        tag("code", f"bash run.sh sample {target} --n {count} --steps NFE --ema EMA --seed 0"),
    )


def curves(png: bytes, runs: tuple[RunRecord, ...]) -> Html:
    folders = " ".join(str(run.folder.path) for run in runs)
    look = (
        "The first panels are what the objective logs: errors fall, then flatten out. A gradient norm that climbs or "
        "jumps announces divergence; throughput and memory stay level."
    )
    if any(run.changes for run in runs):
        look += " Dashed lines mark where a run went on under other settings."
    caption = join(
        "Pale: the range of the steps; dark: their running mean. ", tag("code", f"bash run.sh plot {folders}")
    )
    picture = image(png, f"training curves of {', '.join(run.name for run in runs)}", "ink wide")
    return join(tag("p", look, class_="note"), figure(picture, caption))


def starts(runs: tuple[RunRecord, ...]) -> Html:
    """When, with what versions and on what the runs were started, and which settings changed on the way."""
    several = [run.name for run in runs if len(runs) > 1]
    facts = ("device", "cores", "processes", "torch", "torchvision", "python", "commit")
    header = [*(["run"] if several else []), "when", "from step", *facts, "settings changed"]
    rows = [
        [
            *([run.name] if several else []),
            str(start.get("time", NONE)).replace("T", " ")[:16],
            f"{start['step']:,}" if isinstance(start.get("step"), int) else NONE,
            *(start.get(fact) or NONE for fact in facts),
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
            tag("code", f"bash run.sh replay {failure.file}"),
        )
        for run in runs
        for failure in read_failures(run.folder)
    ]
    return tag("ul", *lines) if lines else None


def configs(runs: tuple[RunRecord, ...]) -> Html:
    """Every setting of every run, folded."""
    texts = {run.name: run.folder.config_file.read_text(encoding="utf-8") for run in runs}
    return join(*(folded(f"config.yaml of {name}", tag("pre", text)) for name, text in texts.items()))


def commands(runs: tuple[RunRecord, ...], this_page: str) -> Html:
    """What makes the runs, and this page, again."""
    scored = {run: run.scores[-1].command for run in runs if run.scores}
    again = [f"bash run.sh {run.folder.config_file} --out NEW_FOLDER" for run in runs]
    recorded = [tag("li", f"{run.name}: ", tag("code", command)) for run, command in scored.items()]
    return join(
        tag("p", "A run’s config.yaml is complete, so it makes the same run again:"),
        tag("pre", "\n".join(again)),
        join(tag("p", "What made their scores, as it was recorded:"), tag("ul", *recorded)) if recorded else None,
        tag("p", "This page:"),
        tag("pre", this_page),
    )
