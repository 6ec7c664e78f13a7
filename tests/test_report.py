"""`run.sh report`: one whole page of runs and tables, which shows what there is and says what is missing."""

import base64
import io
import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from report_helpers import refused, write_score
from running import ROOT, one_line

from eval.report import main
from eval.reports import page as page_module
from eval.reports.html import Html, join, table, tag
from eval.reports.read import RunRecord, read_runs
from eval.reports.sections import number
from meanflow.errors import AssetError, ConfigError, UserError, run_main
from meanflow.logs import duration
from meanflow.training.run_folder import RunFolder

VOID = {"meta", "img", "br"}
HOSTILE = "<script>alert('it\"s & bad')</script>"
QUICK = ("--samples", 4, "--steps", "1,2")


class Page(HTMLParser):
    """A page taken apart: {section's heading: its text}, pictures, the tags in order. Fails if they do not nest."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.lead, self._section = "", None
        self.feed(text)
        self.close()
        assert not self.open, self.open
        self.lead = " ".join(self.lead.split())
        self.sections = {title: " ".join(text.split()) for title, text in self.sections.items()}

    def handle_starttag(self, name, attributes):
        self.tags.append((name, dict(attributes)))
        if name == "article":
            self._section = None
        if name not in VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        if self.open[-1:] == ["h2"]:
            self._section = data
            self.sections[data] = ""
        elif self._section:
            self.sections[self._section] += f"{data} "
        elif "style" not in self.open:
            self.lead += f"{data} "

    def attributes(self, name: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag == name]

    def pictures(self) -> list[Image.Image]:
        found = []
        for attributes in self.attributes("img"):
            kind, _, data = attributes["src"].partition(",")
            assert kind == "data:image/png;base64" and attributes["alt"]
            picture = Image.open(io.BytesIO(base64.b64decode(data, validate=True)))
            picture.load()
            found.append(picture)
        return found


@pytest.fixture
def report(tmp_path) -> Callable[..., Page]:
    """`report(…)`: the page that the command writes with these arguments, outside the folders."""

    def report(*arguments) -> Page:
        out = tmp_path / "page.html"
        assert main([*map(str, arguments), "--out", str(out), "--overwrite"]) == 0
        return Page(out.read_text(encoding="utf-8"))

    return report


@pytest.fixture(autouse=True)
def drawn(monkeypatch) -> list[list[str]]:
    """The names of the runs in each figure of curves, which is left blank, for speed."""
    figures: list[list[str]] = []

    def blank(runs: tuple[RunRecord, ...], out: Path) -> None:
        figures.append([run.name for run in runs])
        Image.new("L", (4, 3)).save(out)

    monkeypatch.setattr(page_module, "draw", blank)
    return figures


@pytest.fixture
def run(trained, tmp_path) -> Callable[..., Path]:
    """`run(name, ("old", "new"), …)` copies the finished tiny run, with texts of its config.yaml replaced."""

    def copy(name: str, *replaced: tuple[str, str]) -> Path:
        folder = Path(shutil.copytree(trained.path, tmp_path / name))
        text = (folder / "config.yaml").read_text(encoding="utf-8")
        for old, new in replaced:
            assert old in text
            text = text.replace(old, new)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
        return folder

    return copy


@pytest.fixture
def table_folder(run, tmp_path) -> Callable[..., Path]:
    """`table_folder(**changes)`: what `run.sh table` leaves, of two rows, the first with two seeds."""

    def write(**changes) -> Path:
        folder = tmp_path / "table1x"
        folder.mkdir()
        run("low-seed0", ("ratio: 0.75", "ratio: 0.25"))
        run("low-seed1", ("ratio: 0.75", "ratio: 0.25"), ("seed: 3", "seed: 4"))
        run("high-seed0")
        found = {
            "description": "the share of r ≠ t",
            "question": "Which share is best?",
            "scale": "cpu",
            "header": ["share", "paper, FID-50K", "1-NFE fd-pixels"],
            "rows": [["25 %", "61.06", "1.25 ± 0.10"], ["75 %", "–", "2.50 ± 0.20"]],
            "notes": ["128 samples a figure."],
            "runs": ["low-seed0", "low-seed1", "high-seed0", "later-seed0"],
        } | changes
        (folder / "table.json").write_text(json.dumps(found), encoding="utf-8")
        Image.new("RGB", (30, 20), "red").save(folder / "figure.png")
        Image.new("L", (20, 10)).save(folder / "samples.png")
        return folder

    return write


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_is_judged_from_one_file(run, capsys, monkeypatch):
    monkeypatch.undo()  # with its curves
    folder = run("mine")
    write_score(folder, 3.25)
    write_score(folder, 2.125, nfe=2)
    versions = {"python": "3.11", "torch": "2.9", "torchvision": "0.2", "commit": "abc+"}
    start = {"time": "2026-01-02T03:04:05+0000", "device": "Chip", "cores": 2, "processes": 1, **versions}
    start |= {"step": 4, "changed": {"train.steps": [4, 6]}}
    (folder / "starts.jsonl").write_text(json.dumps(start) + '\n{"torn')
    assert main([str(folder), *map(str, QUICK)]) == main([str(folder), *map(str, QUICK)]) == 0
    assert str(folder / "report.html") in capsys.readouterr().out
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    for text in ("mine", "Finished at step 6 of 6", "Chip, 1 process", "fd-pixels, 1-NFE", "N 1,000", "3.250", "2.125"):
        assert text in page.lead
    assert "after 6 steps 53% of EMA 0.9 is still the weights that the run began with" in page.lead
    assert "2026-01-02 03:04 4 Chip 2 1 2.9 0.2 3.11 abc+ train.steps: 4 → 6" in page.sections["Starts and environment"]
    assert "fewer than 50,000 samples" in page.sections["Scores"] and "not Inception's" in page.sections["Scores"]
    assert "multipliers:" in page.sections["Configuration"] and ("details", {}) in page.tags
    assert f"bash run.sh {folder / 'config.yaml'}" in page.sections["Make it again"]
    assert "fid.py RUN --steps 1" in page.sections["Make it again"]
    assert "gradient norm" in page.sections["Curves"] and "Dashed lines" in page.sections["Curves"]
    assert "Failures" not in page.sections
    *grids, drawn = page.pictures()
    assert len(grids) == 2 * 3, "NFE 1 and 2 of two EMAs and the weights"
    assert drawn.width >= 1200


def test_the_page_needs_nothing_from_outside(run, report, tmp_path):
    folder = run("mine")
    write_score(folder, 3.0)
    page = report(folder, *QUICK)
    assert not page.attributes("link") and not page.attributes("script") and not page.attributes("base")
    for name, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:"), name
        assert attributes.get("href", "#").startswith("#"), name
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "@import" not in text and not re.search(r"url\(|https?://", text)
    assert "prefers-color-scheme: dark" in text and "@media print" in text and "width=device-width" in text
    assert (ROOT / "eval" / "reports" / "report.css").stat().st_size < 10_000


def test_grids_are_those_of_the_sample_command(run, report, tmp_path):
    """Of the same noise, as uint8 by the recipe's rule."""
    from eval.sample import main as sample

    page = report(run("mine"), "--samples", 4, "--steps", 1)
    sample([str(tmp_path / "mine"), "--n", "4", "--steps", "1", "--out", str(tmp_path / "grid.png")])
    assert page.pictures()[0].tobytes() == Image.open(tmp_path / "grid.png").tobytes()
    alts = [attributes["alt"] for attributes in page.attributes("img")]
    assert [alt.split(", ")[1] for alt in alts[:3]] == ["EMA 0.9", "EMA 0.5", "raw weights"]
    assert "bash run.sh sample" in page.sections["Samples"] and "--n 4" in page.sections["Samples"]
    assert "53% of EMA 0.9 is" in page.sections["Samples"] and "of EMA 0.5 is" not in page.sections["Samples"]


def test_classes_of_the_rows_are_named(trained_with_classes, report):
    page = report(trained_with_classes.path, "--samples", 4, "--steps", 1)
    assert "class0, class1" in page.sections["Samples"]


def test_only_a_metric_of_that_name_is_called_fid(run, report):
    def text(page: Page) -> str:
        return re.sub(r"run\.sh fid|eval\.fid|fid\.py", "", " ".join([page.lead, *page.sections.values()]))

    folder = run("mine")
    write_score(folder, 3.0)
    assert not re.search(r"(?i)\bfid\b", text(report(folder, "--no-samples")))
    write_score(folder, 2.92, n=50_000, metric="fid", comparable=True)
    page = report(folder, "--no-samples")
    assert "fid, 1-NFE" in page.lead and "N 50,000" in page.lead and " yes" in page.sections["Scores"]


def test_the_best_is_chosen_among_scores_of_the_most_samples(run):
    folder = run("mine")
    write_score(folder, 1.0, n=64)
    write_score(folder, 5.0)
    write_score(folder, 0.5, metric="precision-pixels")
    write_score(folder, 0.0, status="incomplete", metrics={})
    (mine,) = read_runs([RunFolder(folder)])
    assert [(score.value, score.n) for score in mine.best()] == [(5.0, 1000)] and len(mine.scores) == 4


def test_what_a_run_says_is_escaped(run, report):
    folder = run(f"<b>{'x' * 3}&", ("description: tiny", f"description: {json.dumps(HOSTILE)}"))
    write_score(folder, 3.0, circumstances={"command": HOSTILE}, warnings=[HOSTILE])
    (folder / "starts.jsonl").write_text(json.dumps({"device": HOSTILE, "changed": {HOSTILE: [HOSTILE, "x"]}}))
    page = report(folder, "--no-samples")
    assert not page.attributes("script") and not page.attributes("b")
    assert page.lead.count(HOSTILE) == 2 and "<b>xxx&" in page.lead
    for name in ("Scores", "Starts and environment", "Make it again"):
        assert HOSTILE in page.sections[name]


def test_failures_are_shown_with_their_replay(run, report):
    folder = run("mine")
    (folder / "failures").mkdir()
    file = folder / "failures" / "00000005.json"
    file.write_text('{"failure": {"step": 5, "what": "loss nan"}}')
    found = report(folder, "--no-samples").sections["Failures"]
    assert "step 5: loss nan" in found and f"bash run.sh replay {file}" in found


def test_an_unfinished_run_names_what_is_missing_and_shows_the_rest(run, report):
    folder = run("mine", ("steps: 6", "steps: 60"))
    shutil.rmtree(folder / "checkpoints")
    (folder / "starts.jsonl").unlink(missing_ok=True)
    write_score(folder, 0.0, status="incomplete", metrics={})
    page = report(folder)
    assert "Unfinished at step 6 of 60" in page.lead and "No scores yet" in page.lead
    assert "No checkpoint yet" in page.sections["Samples"] and "unfinished" in page.sections["Scores"]
    assert "No starts are recorded" in page.sections["Starts and environment"]
    assert len(page.pictures()) == 1
    Image.new("L", (9, 9)).save(folder / "samples.png")
    page = report(folder, "--no-samples")
    assert "9 samples, 1-NFE, EMA 0.9:" in page.sections["Samples"] and page.pictures()[0].size == (9, 9)


# --- several runs ----------------------------------------------------------------------------------------------------


def test_runs_are_compared_by_what_differs_alone(run, report, drawn):
    one, two = run("one"), run("two", ("lr: 0.001", "lr: 0.5"), ("seed: 3", "seed: 4"))
    write_score(one, 7.5, n=64)
    write_score(one, 5.5)
    write_score(two, 6.5, n=64)
    page = report(one, two, *QUICK)
    differ = page.sections["Settings that differ"].split()
    assert {"optim.lr", "0.001", "0.5", "one", "two", "seed", "3", "4"} == set(differ) - {"run", "setting"}
    assert next(iter(page.sections)) == "Settings that differ" and drawn == [["one", "two"]]
    assert (
        "2 runs compared" in page.lead and "one 6 of 6 7.500 5.500" in page.lead and "two 6 of 6 6.500 –" in page.lead
    )
    assert ("strong", {}) in page.tags, "the best of a column is marked"
    assert len(page.pictures()) == 1 + 2 * 2, "curves overlaid, and a row for each run with the recipe's EMA"
    assert page.sections["Configuration"].count("multipliers:") == 2


# --- tables ----------------------------------------------------------------------------------------------------------


def test_a_table_is_shown_with_its_pictures_and_runs(table_folder, report):
    page = report(table_folder())
    assert "Which share is best?" in page.lead and "Scale: cpu" in page.lead and "table1x" in page.lead
    for text in ("61.06", "1.25 ± 0.10", "128 samples a figure."):
        assert text in page.sections["Table"]
    assert [picture.size for picture in page.pictures()[:2]] == [(30, 20), (20, 10)] and len(page.pictures()) == 3
    assert "later-seed0" in page.sections["Runs"] and "low-seed1" in page.sections["Runs"]
    differ = page.sections["Settings that differ"]
    assert "times.ratio" in differ and "seed1" not in differ
    assert "low-seed0" in page.sections["Curves"] and "low-seed1" not in page.sections["Curves"]


def test_tables_and_runs_on_one_page_have_contents_and_every_link_its_target(run, table_folder, report):
    page = report(run("mine"), table_folder(), "--no-samples")
    assert len(page.attributes("article")) == 2
    assert [a["href"] for a in page.attributes("a") if a.get("class") == "part"] == ["#part1", "#part2"]
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    links = {attributes["href"][1:] for attributes in page.attributes("a")}
    assert len(set(ids)) == len(ids) and links and links <= set(ids)


def test_a_table_without_pictures_or_runs_is_shown_all_the_same(table_folder, report):
    folder = table_folder(runs=["later"], rows=[], notes=[])
    (folder / "figure.png").unlink()
    (folder / "samples.png").unlink()
    page = report(folder)
    assert "There is no figure.png yet" in page.sections["Figure"] and "later" in page.sections["Runs"]
    assert not page.pictures()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rows": [["too", "short"]]}, "as many in a row"),
        ({"rows": "none"}, "lists of texts"),
        ({"header": []}, "lists of texts"),
        ({"notes": [3]}, "lists of texts"),
        ({"scale": "huge"}, "scale must be one of"),
        ({"question": None}, "scale must be one of"),
        ({"runs": ["../mine"]}, "which is not the name"),
        ({"runs": ["/etc"]}, "which is not the name"),
    ],
)
def test_damaged_tables(table_folder, changes, said):
    assert said in refused(AssetError, main, table_folder(**changes))


# --- what cannot be reported -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "text", "kind"),
    [
        ("config.yaml", "a: [", ConfigError),
        ("config.yaml", "- 1", ConfigError),
        ("metrics.jsonl", "", AssetError),
        ("metrics.jsonl", "{torn", AssetError),
        ("eval/a.json", "{", AssetError),
        ("eval/a.json", "[1]", AssetError),
        ("eval/a.json", '{"subject": {"step": 1}}', AssetError),
        ("starts.jsonl", "{\n{}\n", AssetError),
        ("starts.jsonl", '{"changed": {"a": 1}}\n{}\n', AssetError),
        ("failures/a.json", "{}", AssetError),
        ("samples.png", "no picture", AssetError),
    ],
)
def test_damaged_files_are_named(run, file, text, kind):
    folder = run("mine")
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(text)
    assert str(folder if file == "metrics.jsonl" else folder / file) in refused(kind, main, folder, "--no-samples")
    assert not (folder / "report.html").exists()


def test_a_damaged_checkpoint_is_one_line_and_the_rest_can_be_had(run, capsys):
    folder = run("mine")
    for file in (folder / "checkpoints").glob("*.pt"):
        file.write_bytes(file.read_bytes()[:100])
    assert run_main(main, [str(folder), *map(str, QUICK)]) == AssetError.exit_code
    assert "--no-samples" in one_line(capsys.readouterr().err)
    assert main([str(folder), "--no-samples"]) == 0


def test_what_cannot_be_asked_for(run, tmp_path):
    folder, file = run("mine"), tmp_path / "file"
    for option, value in (("--samples", 0), ("--steps", "0"), ("--steps", "1,x"), ("--steps", "")):
        assert option in refused(UserError, main, folder, option, value)
    file.write_text("mine")
    for out in (tmp_path, file, file / "page.html", "/proc/x"):
        assert str(out) in refused(AssetError, main, folder, "--no-samples", "--out", out)
    assert file.read_text() == "mine"
    assert "no such folder" in refused(AssetError, main, tmp_path / "gone")
    assert "is neither a run's folder" in refused(AssetError, main, tmp_path)


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_all_but_markup_is_escaped():
    assert tag("p", "a < b", tag("b", "&"), title='"') == '<p title="&quot;">a &lt; b<b>&amp;</b></p>'
    assert tag("td", 0, None, class_="n") == '<td class="n">0</td>'
    assert join("<", Html("<br>")) == "&lt;<br>"
    assert tag("p", Html("<br>") + "<") == "<p>&lt;br&gt;&lt;</p>", "text made of markup is text"


def test_columns_of_numbers_are_aligned():
    rows = [["1.5 %", "text", "1.25 ± 0.1", "–"], ["−3", "4", Html("<b>2</b>"), "7"]]
    classes = re.findall(r'<th scope="col"( class="n")?>', table(["a", "b", "c", "d"], rows))
    assert [bool(found) for found in classes] == [True, False, True, True]


def test_numbers_and_durations_are_as_long_as_they_tell_something():
    assert [number(x) for x in (42.10532, 0.5164, 0.0123456, 0, None)] == ["42.105", "0.516", "0.0123", "0.000", "–"]
    said = [duration(seconds) for seconds in (47.4, 130, 9000, 400_000)]
    assert said == ["47 seconds", "2.2 minutes", "2.5 hours", "4.6 days"]
