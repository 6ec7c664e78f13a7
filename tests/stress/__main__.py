"""`bash run.sh stress [NAME …]`: every promise, long; a table at the end, also as report.md and report.json."""

import argparse
import json
import os
import platform
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from stress import fuzzing, kills, nodes, ranks, soak, storage

# name: (promise, function of a folder, number in docs/reliability.md)
PROMISES = {
    "kills": ("Killed anywhere, the same command ends bit-equal", lambda folder: kills.anywhere(folder, kills=60)),
    "end": ("Killed before any file operation after training", kills.after_training),
    "latents": ("Killed before any file operation of latent preparation", kills.in_preparation),
    "storage": ("A damaged newest checkpoint costs only its steps", lambda folder: storage.damaged(folder, times=60)),
    "truth": ("1, 2 and 4 processes compute the same", lambda folder: ranks.truth(folder, (1, 2, 4), steps=20)),
    "elastic": ("1 → 2 → 4 → 1 processes, one curve", lambda folder: ranks.elastic(folder, (1, 2, 4, 1), steps=40)),
    "drift": ("A process that drifts stops the run and is named", lambda folder: ranks.drift(folder, world=4)),
    "nodes": ("Two torchrun agents train and restart together", lambda folder: nodes.agents(folder, 2, 1, 60, 1)),
    "restarts": ("torchrun --max-restarts continues a run", lambda folder: nodes.agents(folder, 1, 2, 60, 2)),
    "failure": ("One failing process ends all within seconds", nodes.one_fails),
    "repeat": ("deterministic: true is bit-equal", lambda folder: ranks.repeat(folder, steps=50)),
    "soak": ("20,000 steps: memory, files and time flat", lambda folder: soak.steps(folder, steps=20_000)),
    "scores": ("100 evaluations leak nothing", lambda folder: soak.evaluations(folder, count=100)),
    "fuzz": ("Mutated inputs give only documented errors", lambda folder: fuzzing.fuzz(folder, inputs=5000)),
}
LONGEST = ("soak", "fuzz")  # each on one core, run at the same time


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="bash run.sh stress", description=__doc__)
    parser.add_argument("name", nargs="*", choices=[[], *PROMISES], help=f"only these: {', '.join(PROMISES)}")
    parser.add_argument("--out", type=Path, default=Path("runs/stress"), help="folder (runs/stress)")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    work = args.out.resolve() / "work"
    shutil.rmtree(work, ignore_errors=True)
    chosen, start = args.name or list(PROMISES), time.monotonic()
    rows = [kept(name, work) for name in chosen if name not in LONGEST]
    with ThreadPoolExecutor(len(LONGEST)) as pool:
        rows += pool.map(lambda name: kept(name, work), [name for name in chosen if name in LONGEST])
    report = {"machine": machine(), "seconds": round(time.monotonic() - start), "rows": rows}
    table = markdown(report)
    (args.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    (args.out / "report.md").write_text(table, encoding="utf-8")
    show(f"\n{table}\n{args.out / 'report.json'}  {args.out / 'report.md'}")
    return 0 if all(row["kept"] for row in rows) else 1


def kept(name: str, work: Path) -> dict:
    """Try one promise; its row of the report."""
    promise, check = PROMISES[name]
    show(f"{name}: {promise} …")
    (work / name).mkdir(parents=True)
    start = time.monotonic()
    try:
        row = {"kept": True, "figure": check(work / name)}
    except AssertionError as error:
        row = {"kept": False, "figure": " ".join(str(error).split())[:300] or "see above"}
    row = {"name": name, "promise": promise, **row, "seconds": round(time.monotonic() - start, 1)}
    show(f"{name}: {'kept' if row['kept'] else 'BROKEN'}: {row['figure']} ({row['seconds']} s)")
    return row


def show(line: str) -> None:
    print(line, flush=True)


def machine() -> str:
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"


def markdown(report: dict) -> str:
    cells = [("promise", "kept", "figure", "seconds"), ("---",) * 4]
    cells += [
        (row["promise"], "yes" if row["kept"] else "**no**", row["figure"], row["seconds"]) for row in report["rows"]
    ]
    lines = [f"| {' | '.join(map(str, row))} |" for row in cells]
    return "\n".join([*lines, "", f"{report['machine']}; {report['seconds'] / 60:.0f} minutes in all.", ""])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
