"""Runs that are killed at any moment and resumed end as if nothing had happened: files, weights, MLflow."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shlex
import sqlite3
import sys
import time
from collections import Counter
from collections.abc import Callable
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch
from faults_kit import METHOD, NOWHERE

import sslbench.cli

pytestmark = pytest.mark.slow

RUN = (
    f"pretrain {METHOD} --dataset digits train.batch_size=256 train.epochs=4 train.log_every=1 data.workers=0 "
    "checkpoint.every_steps=2 checkpoint.keep=2 probe.every=1 probe.images=100 "
    "run.evals=[knn,linear] run.name=killed"
)
STEPS = 20
LIMIT_S = 60


def type_in(line: str, folder: Path) -> None:
    """The target of a child process: one command line in a folder of its own."""
    with (folder / "log").open("a") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.chdir(folder)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    torch.set_num_threads(1)
    sys.exit(sslbench.cli.run(shlex.split(line)))


def start(line: str, folder: Path) -> ForkServerProcess:
    """A fresh process that need not import torch and MLflow again: that takes most of a short run's time."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_faults_kill", "mlflow.store.tracking.sqlalchemy_store"])
    process = context.Process(target=type_in, args=(line, folder))
    process.start()
    return process


def finish(process: ForkServerProcess, folder: Path) -> None:
    process.join(LIMIT_S)
    assert process.exitcode == 0, (folder / "log").read_text()[-3000:]


class Folder:
    """What can be seen of a run from outside."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_dir(self) -> Path | None:
        """The newest run directory of a pretraining run."""
        records = self.path.glob("runs/digits/*/artifacts/run.json")
        found = [file.parent for file in records if '"kind": "pretrain"' in file.read_text()]
        return max(found, key=lambda folder: (folder / "config.yaml").stat().st_ctime_ns, default=None)

    def resumable(self) -> bool:
        return bool(self.any("checkpoints/step-????????/meta.json"))

    def any(self, pattern: str) -> bool:
        folder = self.run_dir()
        return folder is not None and any(folder.glob(pattern))

    def journal(self) -> list[str]:
        file = (self.run_dir() or self.path) / "metrics.jsonl"
        return file.read_text().splitlines() if file.exists() else []

    def last_step(self) -> int:
        return max((json.loads(line)["step"] for line in self.journal() if line.endswith("}")), default=0)

    def size(self, name: str) -> int:
        file = self.path / name
        return file.stat().st_size if file.exists() else 0


Moment = Callable[[Folder], bool]


def step(number: int) -> Moment:
    return lambda folder: folder.last_step() >= number


def moments(rng: random.Random) -> dict[str, Moment]:
    """In the order in which they come up; drawn anew for every seed where there is a choice."""
    steps = sorted(rng.sample(range(5, 17), 3))
    return {
        "migration": lambda folder: folder.size(".mlflow.db.new") > rng.randrange(1, 400_000),
        "database before a run": lambda folder: folder.size("mlflow.db") > 0,
        "first record": lambda folder: folder.run_dir() is not None,
        f"step {rng.randrange(1, 3)}": step(1),
        "first save": lambda folder: folder.any("checkpoints/step-*.partial"),
        "first checkpoint": Folder.resumable,
        "probe": lambda folder: len(folder.journal()) > 5 and "probe/" not in folder.journal()[-1],
        **{f"step {number}": step(number) for number in steps},
        "a later save": lambda folder: folder.last_step() > steps[-1] and folder.any("checkpoints/*.partial"),
        "last step": step(STEPS),
        "features": lambda folder: any((folder.path / "runs").glob(".features/*")),
        "first result": lambda folder: folder.any("evals/*/knn/result.json"),
        "second evaluation": lambda folder: folder.any("evals/*/linear/*"),
    }


def kill_at(moment: Moment, folder: Folder) -> bool:
    """Go on with the run, and kill it; False if it was over before."""
    line = "pretrain --resume last" if folder.resumable() else RUN
    process = start(line, folder.path)
    deadline = time.monotonic() + LIMIT_S
    while process.is_alive() and not moment(folder):
        assert time.monotonic() < deadline, (folder.path / "log").read_text()[-3000:]
        time.sleep(0.001)
    process.kill()
    process.join()
    return process.exitcode == -9


def curves(run_dir: Path) -> list[dict[str, object]]:
    """The journal without what a clock measured."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [
        {"step": line["step"], **{k: v for k, v in line["metrics"].items() if not k.startswith("perf/")}}
        for line in lines
    ]


def stored_points(database: Path, run_dir: Path) -> Counter[tuple[str, int]]:
    """How often the store has each point."""
    run_id = json.loads((run_dir / "sync.json").read_text())["store_run_id"]
    with sqlite3.connect(database) as connection:
        assert connection.execute("pragma integrity_check").fetchone() == ("ok",)
        rows = connection.execute("select key, step from metrics where run_uuid = ?", (run_id,)).fetchall()
        status = connection.execute("select status from runs where run_uuid = ?", (run_id,)).fetchone()
    assert status == ("FINISHED",)
    return Counter(rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupts, without a store."""
    folder = tmp_path_factory.mktemp("whole")
    finish(start(f"{RUN} run.tracking_uri={NOWHERE}", folder), folder)
    run_dir = Folder(folder).run_dir()
    assert run_dir is not None
    return run_dir


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    planned = moments(random.Random(5))
    hit = {name: kill_at(moment, folder) for name, moment in planned.items()}
    assert sum(hit.values()) >= 10, hit
    finish(start("pretrain --resume last", tmp_path), tmp_path)
    finish(start("sync last", tmp_path), tmp_path)
    resumed = folder.run_dir()
    assert resumed is not None
    names = [sorted(path.name for path in run.glob("checkpoints/*")) for run in (whole, resumed)]
    assert names[0] == names[1]
    expected, found = (
        torch.load(run / f"checkpoints/step-{STEPS:08d}/backbone.pt", weights_only=True)
        for run in (whole, resumed)
    )
    assert all(torch.equal(value, found[key]) for key, value in expected.items())
    assert curves(resumed) == curves(whole)
    points = stored_points(tmp_path / "mlflow.db", resumed)
    lines = [json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines()]
    written = Counter((key, line["step"]) for line in lines for key in line["metrics"])
    assert set(points) == set(written)
    assert points <= written, "the store has points more often than the journal"
