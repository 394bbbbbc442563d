"""How long commands take to answer, and training to begin.

    python benchmarks/start.py [--quick]

Wall time of fresh processes. "first step": from the command to the first line of metrics, after one step of SimCLR
on the digits that come with the installation; with a new MLflow store (it is created) and with one that exists.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from harness import Case, Report, arguments, open_report, spread, table

GOALS = {"--help": 0.2, "list": 0.2, "first step": 6.0}
"""Seconds that a command may take."""
SSLBENCH = (sys.executable, "-m", "sslbench")
PRETRAIN = (
    *(*SSLBENCH, "pretrain", "--method", "simclr", "--dataset", "digits", "--backbone", "conv4", "--no-evals"),
    *("train.limit=1", "train.log_every=1", "train.device=cpu", "probe.every=0"),
)


def main() -> None:
    options = arguments(__doc__, "start").parse_args()
    report = open_report(options, render)
    with tempfile.TemporaryDirectory(prefix="sslbench-start-") as folder:
        measure(Path(folder), 1 if options.quick else 5, report)
    print(render(report))


def measure(folder: Path, rounds: int, report: Report) -> None:
    """All programs in each round."""
    programs: dict[str, Callable[[], float]] = {
        "python -c pass": lambda: answer((sys.executable, "-c", "pass"), report),
        "--help": lambda: answer((*SSLBENCH, "--help"), report),
        "list": lambda: answer((*SSLBENCH, "list"), report),
        "first step, new store": lambda: first_step(folder / "new", report),
        "first step": lambda: first_step(folder / "kept", report),
    }
    first_step(folder / "kept", report)
    for number in range(rounds):
        for name, program in programs.items():
            shutil.rmtree(folder / "new", ignore_errors=True)
            report.add(Case("start", name, ()), number, {"seconds": program()})


def environment(report: Report) -> dict[str, str]:
    return os.environ | {"MLFLOW_TRACKING_URI": "sqlite:///mlflow.db"} | dict(report.env)


def answer(command: tuple[str, ...], report: Report) -> float:
    began = time.perf_counter()
    subprocess.run(command, env=environment(report), stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def first_step(folder: Path, report: Report) -> float:
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
        return time.perf_counter() - began


def written(folder: Path, before: set[Path]) -> bool:
    return any(path.stat().st_size for path in set(folder.glob("runs/*/metrics.jsonl")) - before)


def render(report: Report) -> str:
    rows = [
        [name, spread(report.values("start", name, "seconds"), 2), f"{GOALS[name]:.1f}" if name in GOALS else ""]
        for name in report.cases("start")
    ]
    return "\n".join(["# Seconds to an answer", "", table(("command", "median (least-most)", "goal"), rows)])


if __name__ == "__main__":
    main()
