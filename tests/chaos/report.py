"""The report: which faults there are, what became of each, and how to repeat one."""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import shlex
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import chaos
from chaos.fault import Fault, Finding
from chaos.trials import first_line

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "benchmarks"))

from harness import machine, table

HEADER = (
    "fault", "tried", "held", "most lost steps", "result", "seconds", "at", "repeat with `python -m chaos`"
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A fault and what came of it."""

    key: str
    """``module/words-of-its-name``: what ``--only`` takes."""
    name: str
    finding: Finding
    seconds: float
    repeat: str
    """Options that repeat this row alone."""
    at: str = ""
    """Commit and day."""

    @property
    def held(self) -> bool:
        return 0 < self.finding.tried == self.finding.held

    def cells(self) -> tuple[str, ...]:
        found = self.finding
        numbers = (str(found.tried), str(found.held), str(found.lost_steps))
        told = found.result.replace("|", "/")
        return self.name, *numbers, told, f"{self.seconds:.0f}", self.at, f"`{self.repeat}`"


def find_faults(only: str = "*") -> dict[str, Fault]:
    """The faults of all modules of this package whose key fits a pattern or contains it.

    A module that cannot be imported is one fault, which fails.
    """
    names = [module.name for module in pkgutil.iter_modules(chaos.__path__) if module.name != "__main__"]
    found = {f"{name}/{_slug(fault.name)}": fault for name in names for fault in _faults_of(name)}
    return {key: fault for key, fault in found.items() if fnmatchcase(key, only) or only in key}


def inflict(key: str, fault: Fault, folder: Path, times: int, seed: int) -> Row:
    """Inflict a fault; one that raises is a row that failed."""
    folder.mkdir(parents=True)
    began = time.perf_counter()
    try:
        finding = fault.inflict(folder, times, seed)
    except Exception as error:  # noqa: BLE001 - one fault must not end the report
        (folder / "failure.txt").write_text(traceback.format_exc())
        finding = Finding(times, 0, 0, f"{type(error).__name__}: {first_line(error)}")
    repeat = f"--only {shlex.quote(key)} --times {times} --seed {seed}"
    return Row(key, fault.name, finding, time.perf_counter() - began, repeat)


def write(rows: Sequence[Row], out: Path) -> None:
    """``chaos.md`` for people, ``chaos.json`` for programs.

    Rows of faults that were not inflicted this time stay as they are there, with their own commit and day.
    """
    facts = _facts()
    out.mkdir(parents=True, exist_ok=True)
    at = f"{facts['commit'] or 'unknown'}, {facts['date']}"
    known = _earlier(out / "chaos.json") | {row.key: replace(row, at=at) for row in rows}
    rows = [known[key] for key in find_faults() if key in known]
    content = {"facts": facts, "rows": [asdict(row) | {"ok": row.held} for row in rows]}
    (out / "chaos.json").write_text(json.dumps(content, indent=1) + "\n")
    (out / "chaos.md").write_text(_markdown(rows, facts))


@cache
def _facts() -> dict[str, Any]:
    """Once: the report itself would make the commit a changed one."""
    return machine() | {"versions": {name: version(name) for name in ("torch", "mlflow", "numpy", "sslbench")}}


def _earlier(report: Path) -> dict[str, Row]:
    if not report.exists():
        return {}
    rows = [{key: row[key] for key in row if key != "ok"} for row in json.loads(report.read_text())["rows"]]
    return {row["key"]: Row(**row | {"finding": Finding(**row["finding"])}) for row in rows}


def _markdown(rows: Sequence[Row], facts: Mapping[str, Any]) -> str:
    tried, held = (sum(getattr(row.finding, name) for row in rows) for name in ("tried", "held"))
    failed = [row for row in rows if not row.held]
    said = [
        f"`{facts['command']}` was the last of the commands that made it; each row names its commit and day.",
        f"{facts['cpu']}, {facts['cores']} cores, GPU: {facts['gpu'] or 'none'}, {facts['system']}.",
        ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".",
        f"{len(rows)} faults, inflicted {tried} times; as promised {held} times.",
        *(f"**Failed: {row.name}.**" for row in failed),
    ]
    head = "# Faults inflicted on real runs\n\n"
    return head + "  \n".join(said) + "\n\n" + table(HEADER, [row.cells() for row in rows]) + "\n"


def _faults_of(name: str) -> Iterator[Fault]:
    try:
        module = importlib.import_module(f"chaos.{name}")
    except Exception as error:  # noqa: BLE001 - the others shall be inflicted all the same
        yield Fault(f"import of chaos.{name}", partial(_fail, error), times=1, quick=1)
        return
    yield from getattr(module, "FAULTS", ())


def _fail(error: Exception, folder: Path, times: int, seed: int) -> Finding:
    raise error


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
