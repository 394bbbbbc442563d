"""How long commands take to answer, and training to begin.

    python benchmarks/start.py [--quick]

Wall time of fresh processes, and their CPU time, which a busy machine does not stretch. "50 packages": with as
many distributions on the path, each with a method, a data set and a long README in its metadata. "first step":
from the command to the first line of metrics, after one step of SimCLR on the digits that come with the
installation; with a new MLflow store (it is created) and with one that exists.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import Case, Report, arguments, open_report, spread, table

GOALS = {"--help": 0.2, "list": 0.2, "list, 50 packages": 0.3, "first step": 6.0}
"""Seconds that a command may take."""
SSLBENCH = (sys.executable, "-m", "sslbench")
PRETRAIN = (
    *(*SSLBENCH, "pretrain", "--method", "simclr", "--dataset", "digits", "--backbone", "conv4", "--no-evals"),
    *("train.limit=1", "train.log_every=1", "train.device=cpu", "probe.every=0"),
)


PACKAGES = 50
PLUGIN = '''"""A {kind} of package {number}, which a listing must not import."""

raise RuntimeError("imported")
'''


def main() -> None:
    options = arguments(__doc__, "start").parse_args()
    report = open_report(options, render)
    with tempfile.TemporaryDirectory(prefix="sslbench-start-") as folder:
        measure(Path(folder), 1 if options.quick else 5, report)
    print(render(report))


def measure(folder: Path, rounds: int, report: Report) -> None:
    """All programs in each round."""
    packages(folder / "packages")
    programs: dict[str, Callable[[], dict[str, float]]] = {
        "python -c pass": lambda: answer((sys.executable, "-c", "pass"), report),
        "--help": lambda: answer((*SSLBENCH, "--help"), report),
        "list": lambda: answer((*SSLBENCH, "list"), report),
        "list, 50 packages": lambda: answer((*SSLBENCH, "list"), report, PYTHONPATH=str(folder / "packages")),
        "first step, new store": lambda: first_step(folder / "new", report),
        "first step": lambda: first_step(folder / "kept", report),
    }
    first_step(folder / "kept", report)
    for number in range(rounds):
        for name, program in programs.items():
            shutil.rmtree(folder / "new", ignore_errors=True)
            report.add(Case("start", name, ()), number, program())


def packages(site: Path, count: int = PACKAGES) -> None:
    """Lay down distributions as pip would."""
    for number in range(count):
        top = site / f"bench_plugins_{number}"
        top.mkdir(parents=True)
        (top / "__init__.py").write_text("raise RuntimeError('imported')\n")
        for kind in ("method", "dataset"):
            (top / f"{kind}.py").write_text(PLUGIN.format(kind=kind, number=number))
        info = site / f"bench_plugins_{number}-1.0.dist-info"
        info.mkdir()
        readme = "A sentence of the README.\n" * 400
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: bench-plugins-{number}\nVersion: 1.0\n\n{readme}"
        )
        groups = (f"[sslbench.{kind}s]\n{kind}_{number} = {top.name}.{kind}\n" for kind in ("method", "dataset"))
        (info / "entry_points.txt").write_text("\n".join(groups))


def environment(report: Report) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"} | dict(report.env)


def answer(command: tuple[str, ...], report: Report, **more: str) -> dict[str, float]:
    """Wall and CPU seconds of a command."""
    spent, began = _cpu_of_children(), time.perf_counter()
    subprocess.run(command, env=environment(report) | more, stdout=subprocess.DEVNULL, check=True)
    return {"seconds": time.perf_counter() - began, "cpu": _cpu_of_children() - spent}


def _cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def first_step(folder: Path, report: Report) -> dict[str, float]:
    """Seconds until a run below ``folder`` has written metrics."""
    folder.mkdir(parents=True, exist_ok=True)
    before = set(folder.glob("runs/*/metrics.jsonl"))
    began = time.perf_counter()
    with subprocess.Popen(
        PRETRAIN, cwd=folder, env=environment(report), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while not written(folder, before):
            if process.poll() is not None and not written(folder, before):
                raise SystemExit(f"sslbench pretrain ended with exit code {process.returncode} and no metrics")
            time.sleep(0.005)
        return {"seconds": time.perf_counter() - began}


def written(folder: Path, before: set[Path]) -> bool:
    return any(path.stat().st_size for path in set(folder.glob("runs/*/metrics.jsonl")) - before)


def render(report: Report) -> str:
    names = report.cases("start")
    rows = [[name, *_times(report, name), f"{GOALS[name]:.1f}" if name in GOALS else ""] for name in names]
    lines = ["# Seconds to an answer", ""]
    lines.append(table(("command", "median (least-most)", "least CPU", "goal"), rows))
    if {"list", "list, 50 packages"} <= set(names):
        few, many = (_least_cpu(report, name) for name in ("list", "list, 50 packages"))
        lines += ["", f"{PACKAGES} packages make a listing {many / few:.2f} times as long (least CPU time)."]
    return "\n".join(lines)


def _times(report: Report, name: str) -> tuple[str, str]:
    cpu = "" if name.startswith("first") else f"{_least_cpu(report, name):.2f}"
    return spread(report.values("start", name, "seconds"), 2), cpu


def _least_cpu(report: Report, name: str) -> float:
    return float(min(report.values("start", name, "cpu").values()))


if __name__ == "__main__":
    main()
