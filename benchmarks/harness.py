"""Runs programs that measure themselves, in interleaved rounds, and writes what they report.

A program prints one JSON line last. Rounds go A-B-C-A-B-C, so that a drift of the machine meets all alike. A run
whose window was disturbed is repeated, a few times; after each run the results are on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
QUIET = 0.08
"""Cores that others may use, or the hypervisor steal, in a window that counts."""
REPEATS = 3
"""How often a disturbed run is repeated before it is kept with a mark."""
_TIMEOUT = 300
_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
_TUNING = ("OMP_", "KMP_", "GOMP_", "MKL_", "MALLOC_", "LD_PRELOAD")

Sample = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One program in one setting."""

    group: str
    """Cases of one group are compared, and interleaved with each other."""
    name: str
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    rounds: int | None = None
    """Take part in the first rounds only."""


@dataclass
class Report:
    """What was measured so far, written to ``out/name.json`` and ``out/name.md`` after each run."""

    name: str
    out: Path
    render: Callable[[Report], str]
    """The Markdown above the facts about the machine."""
    samples: list[Sample] = field(default_factory=list)
    dropped: int = 0
    """Disturbed runs that were repeated."""
    failures: dict[str, str] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    """Of all programs."""
    limit: float | None = QUIET
    """Cores in other use that disturb a window; None: nothing does."""

    def add(self, case: Case, number: int, sample: Sample) -> None:
        self.samples.append({"group": case.group, "case": case.name, "round": number, **sample})
        self.write()

    def fail(self, case: Case, message: str) -> None:
        self.failures[f"{case.group}, {case.name}"] = message
        self.write()

    def values(self, group: str, case: str, key: str = "images_per_second") -> dict[int, Any]:
        """By round; ``key`` may be dotted."""
        mine = [sample for sample in self.samples if (sample["group"], sample["case"]) == (group, case)]
        found = {sample["round"]: _at(sample, key) for sample in mine}
        return {number: value for number, value in found.items() if value is not None}

    def groups(self) -> list[str]:
        return list(dict.fromkeys(sample["group"] for sample in self.samples))

    def cases(self, group: str) -> list[str]:
        return list(dict.fromkeys(sample["case"] for sample in self.samples if sample["group"] == group))

    def write(self) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        facts = machine() | {"versions": self._versions(), "dropped": self.dropped, "failures": self.failures}
        (self.out / f"{self.name}.json").write_text(
            json.dumps({"facts": facts, "samples": self.samples}, indent=1) + "\n"
        )
        (self.out / f"{self.name}.md").write_text(f"{self.render(self)}\n\n{describe(facts, self.samples)}\n")

    def _versions(self) -> dict[str, str]:
        """Of this interpreter's packages and of what the programs report."""
        found = {name: _version(name) for name in ("sslbench", "torch", "torchvision", "pillow")}
        for sample in self.samples:
            found |= sample.get("versions", {})
        return found | {"Python": platform.python_version()}


def _at(sample: Sample, key: str) -> Any:
    value: Any = sample
    for part in key.split("."):
        value = value.get(part, {})
    return None if value == {} else value


def arguments(description: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with what all benchmarks understand."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one short round, to see that it works")
    parser.add_argument("--out", type=Path, help="folder of the results (default: benchmarks/results)")
    parser.add_argument(
        "--threads", type=int, help="OMP_NUM_THREADS of all programs, for a machine that others use"
    )
    parser.set_defaults(name=name)
    return parser


def open_report(options: argparse.Namespace, render: Callable[[Report], str]) -> Report:
    """A quick run never replaces real results."""
    scratch = Path(tempfile.gettempdir(), "sslbench-quick")
    env = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
    out = options.out or (scratch if options.quick else HERE / "results")
    return Report(options.name, out, render, env=env, limit=None if options.quick else QUIET)


def measure(cases: Sequence[Case], rounds: int, report: Report) -> None:
    """Run all cases, group by group, in interleaved rounds."""
    for _, members in groupby(cases, key=lambda case: case.group):
        for number, case in _interleaved(list(members), rounds):
            if f"{case.group}, {case.name}" in report.failures:
                continue
            try:
                sample = _undisturbed(case, report)
            except ChildProcessError as error:
                report.fail(case, str(error))
                print(f"{case.group}, {case.name}: failed: {error}", file=sys.stderr)
                continue
            report.add(case, number, sample)
            print(f"{case.group}, {case.name}, round {number + 1}: {_shown(sample)}", file=sys.stderr)


def _interleaved(cases: Sequence[Case], rounds: int) -> Iterator[tuple[int, Case]]:
    for number in range(rounds):
        yield from ((number, case) for case in cases if number < (case.rounds or rounds))


def _undisturbed(case: Case, report: Report) -> Sample:
    for _ in range(REPEATS):
        sample = run(case, report.env)
        if not _disturbed(sample, report.limit):
            return sample
        report.dropped += 1
    sample = run(case, report.env)
    return sample | {"disturbed": _disturbed(sample, report.limit)}


def _disturbed(sample: Sample, limit: float | None) -> bool:
    windows = [sample, *(value for value in sample.values() if isinstance(value, dict))]
    if limit is None:
        return False
    return any(window.get(key, 0.0) > limit for window in windows for key in ("others", "stolen"))


def run(case: Case, env: Mapping[str, str]) -> Sample:
    """Run a program once, without the caller's own tuning of threads and memory.

    Raises:
        ChildProcessError: it failed; with its last words.
    """
    clean = {key: value for key, value in os.environ.items() if not key.startswith(_TUNING)}
    clean["PYTHONPATH"] = f"{HERE.parent}{os.pathsep}{clean.get('PYTHONPATH', '')}"
    try:
        done = subprocess.run(
            case.command,
            env=clean | dict(env) | dict(case.env),
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise ChildProcessError(f"not done after {_TIMEOUT} s") from None
    if done.returncode:
        raise ChildProcessError((done.stderr.strip() or "no message").splitlines()[-1])
    sample: Sample = json.loads(done.stdout.strip().splitlines()[-1])
    return sample


def _shown(sample: Sample) -> str:
    rate = sample.get("images_per_second")
    mark = " (disturbed)" if sample.get("disturbed") else ""
    return f"{rate:,.1f} images/s{mark}" if rate else json.dumps(sample)


def python(script: str, *options: object, interpreter: str = sys.executable) -> tuple[str, ...]:
    """The command that runs a script of this folder."""
    return (interpreter, str(HERE / script), *(str(option) for option in options))


def ratio(over: Mapping[int, float], under: Mapping[int, float]) -> str:
    """Of medians; in brackets the range of the rounds' own ratios."""
    if not over or not under:
        return "-"
    middle = statistics.median(over.values()) / statistics.median(under.values())
    paired = [over[number] / under[number] for number in over if number in under]
    return f"{middle:.2f}" + (f" ({min(paired):.2f}-{max(paired):.2f})" if len(paired) > 1 else "")


def spread(values: Mapping[int, float], digits: int | None = None) -> str:
    """Median (least-most)."""
    if not values:
        return "-"
    numbers = sorted(values.values())
    digits = (1 if numbers[0] < 100 else 0) if digits is None else digits
    middle = f"{statistics.median(numbers):,.{digits}f}"
    return middle + (f" ({numbers[0]:,.{digits}f}-{numbers[-1]:,.{digits}f})" if len(numbers) > 1 else "")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|:--" + "|--:" * (len(header) - 1) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


@cache
def machine() -> dict[str, Any]:
    """Hardware, date, command and commit."""
    return {
        "cpu": _cpu_info("model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in (_cpu_info("flags") or "").split()],
        "gpu": _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader"),
        "system": f"{platform.system()} {platform.release()}",
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "command": shlex.join(["python", *(_short(word) for word in sys.argv)]),
        "commit": _output("git", "-C", str(HERE), "describe", "--always", "--dirty", "--abbrev=10", "--match="),
    }


def describe(facts: Mapping[str, Any], samples: Sequence[Sample]) -> str:
    """The facts as Markdown."""
    flags = ", ".join(facts["flags"]) or "no vector flags known"
    kept = f"{len(samples)} runs, {facts['dropped']} disturbed ones repeated"
    marked = sum(bool(sample.get("disturbed")) for sample in samples)
    rows = [
        f"`{facts['command']}` at {facts['commit'] or 'an unknown commit'}, {facts['date']}.",
        f"{facts['cpu']}, {facts['cores']} cores ({flags}), GPU: {facts['gpu'] or 'none'}, {facts['system']}.",
        ", ".join(f"{name} {number}" for name, number in facts["versions"].items()) + ".",
        kept + (f", {marked} kept although disturbed." if marked else "."),
        *(f"Failed: {case}: {message}" for case, message in facts["failures"].items()),
    ]
    return "  \n".join(rows)


def _cpu_info(key: str) -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _short(word: str) -> str:
    """Results travel: they name files, not this machine's folders."""
    path = Path(word)
    if path.parent == HERE or path.resolve().parent == HERE:
        return f"benchmarks/{path.name}"
    return path.name if path.is_absolute() else word


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
