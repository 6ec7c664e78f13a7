"""Soak tests: does anything grow in a long run?"""

import os
import statistics
import time
from pathlib import Path

from running import start, write_recipe

from meanflow.training.records import read_metrics


class Watched:
    """Memory, open files and threads of a process, from outside, as it goes."""

    def __init__(self, pid: int):
        self.pid = pid
        self.seen: list[tuple[int, float, int, int]] = []

    def look(self, step: int) -> None:
        try:
            pages = int(Path(f"/proc/{self.pid}/statm").read_text().split()[1])
            files = len(os.listdir(f"/proc/{self.pid}/fd"))
            threads = len(os.listdir(f"/proc/{self.pid}/task"))
        except (OSError, IndexError):  # it has just ended
            return
        self.seen.append((step, pages * os.sysconf("SC_PAGE_SIZE") / 1e6, files, threads))

    def growth(self, warm: int) -> dict[str, tuple[float, float]]:
        """(early, late) of each: the median memory and the fewest files and threads of a tenth of the looks.

        Steps before `warm` are left out. The fewest, since a file may be open at the moment of a look.
        """
        rows = [row[1:] for row in self.seen if row[0] >= warm]
        tenth = max(3, len(rows) // 10)
        (early, *before), (late, *after) = (zip(*part, strict=True) for part in (rows[:tenth], rows[-tenth:]))
        grown = {"MB": (statistics.median(early), statistics.median(late))}
        return grown | {name: (min(x), min(y)) for name, x, y in zip(("files", "threads"), before, after, strict=True)}


def watch(folder: Path, warm: int, **changes) -> tuple[Path, dict[str, tuple[float, float]]]:
    """Run the job to its end; its folder, and what grew."""
    run, recipe = folder / "run", write_recipe(folder / "long.yaml", **changes)
    started = start("run", recipe, "--out", run, logs=folder / "logs", environment={"XDG_CACHE_HOME": str(folder)})
    watched, metrics = Watched(started.process.pid), run / "metrics.jsonl"
    while started.code is None and not (run / "samples.png").exists():  # what comes after training is not watched
        time.sleep(0.02)
        if metrics.exists():
            watched.look(metrics.stat().st_size // 250)  # a line has about so many bytes
    done = started.wait(600)
    assert done.code == 0, done.err
    return run, watched.growth(warm)


def flat(grown: dict[str, tuple[float, float]]) -> str:
    (early, late), files, threads = grown["MB"], grown["files"], grown["threads"]
    assert late <= early * 1.02, f"memory grew from {early:.1f} to {late:.1f} MB"
    assert files[1] <= files[0] and threads[1] <= threads[0], grown
    return f"memory {early:.1f} → {late:.1f} MB ({late / early - 1:+.1%}), open files {files[0]:.0f} → {files[1]:.0f}"


def steps(folder: Path, steps: int) -> str:
    """One run of a tiny network: memory within 2 %, open files and the time of a step as at the beginning."""
    run, grown = watch(folder, steps // 10, train__steps=steps, checkpoint__every=max(steps // 10, 1))
    lines = list(read_metrics(run / "metrics.jsonl"))
    assert [line["step"] for line in lines] == list(range(1, steps + 1))
    tenth = steps // 10
    times = [
        1000 * 8 / statistics.median(line["images_per_s"] for line in part)
        for part in (lines[tenth : 2 * tenth], lines[-tenth:])
    ]
    if steps >= 1000:  # other work on the machine decides over less
        assert times[1] < 1.5 * times[0], times
    size = (run / "metrics.jsonl").stat().st_size
    return f"{flat(grown)}, step {times[0]:.2f} → {times[1]:.2f} ms, {size / steps:.0f} bytes of metrics a step"


def evaluations(folder: Path, count: int) -> str:
    """An evaluation every other step."""
    changes = {"eval__every": 2, "eval__every_samples": 32, "eval__batch": 16, "checkpoint__every": 10}
    warm = max(2 * count // 5, 6)  # the first evaluations start the pools that later ones use
    run, grown = watch(folder, warm, train__steps=2 * count, **changes)
    assert len(list((run / "eval").glob("step*.json"))) == count + 1, "one each, and one of more samples at the end"
    assert not (run / "eval" / "work").exists()
    return f"{count} evaluations: {flat(grown)}"
