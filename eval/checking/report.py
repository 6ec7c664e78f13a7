"""Findings, one line each; a part that fails is reported, and the next one goes on."""

import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from meanflow.logs import aligned, log

OK, FAILED, NOT_RUN = "ok", "FAILED", "not run"


@dataclass(frozen=True)
class Finding:
    """What was tried, how it ended (OK, FAILED or NOT_RUN) and what came out."""

    name: str
    outcome: str
    figure: str


@dataclass
class Report:
    """Everything that `check` finds. Parts of it share `seconds` of time: what is left out for lack of it says so."""

    seconds: float
    findings: dict[str, list[Finding]] = field(default_factory=dict)
    numbers: dict[str, Any] = field(default_factory=dict)  # for the JSON file: by part
    tracebacks: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    @property
    def spent(self) -> float:
        return time.monotonic() - self.started

    @property
    def over(self) -> bool:
        return self.spent > self.seconds

    @property
    def failed(self) -> bool:
        return any(finding.outcome == FAILED for part in self.findings.values() for finding in part)

    def part(self, title: str, findings: Callable[[], Iterator[Finding]]) -> None:
        """Collect the findings of one part. An exception ends this part alone, as a finding that failed."""
        log.info(f"{title} …")
        found = self.findings.setdefault(title, [])
        try:
            found.extend(findings())
        except Exception as error:  # whatever a new machine does: it is what this command is there to find
            self.tracebacks.append(traceback.format_exc())
            found.append(failure(title, error))

    def table(self) -> str:
        lines = []
        for title, found in self.findings.items():
            rows = [(f"  {f.name}", f.outcome, f.figure) for f in found]
            lines += [title, *aligned(rows, left=3)] if rows else []
        return "\n".join(lines)

    def tree(self) -> dict[str, Any]:
        parts = {title: [asdict(finding) for finding in found] for title, found in self.findings.items()}
        return {
            "seconds": round(self.spent),
            "findings": parts,
            "numbers": self.numbers,
            "tracebacks": self.tracebacks,
        }


def failure(name: str, error: Exception) -> Finding:
    first = (str(error).splitlines() or [""])[0]
    return Finding(name, FAILED, f"{type(error).__name__}: {first}"[:200])
