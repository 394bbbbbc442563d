"""Jobs of a cluster that reach their time limit: submitit's local executor runs them and starts them again."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from chaos.children import LIMIT_S, NOWHERE, promise, typed
from chaos.fault import Fault
from chaos.runs import RUN, STEPS, View, expect_same, resumed_after, whole
from chaos.trials import trials


class Job:
    """A run that was submitted to this machine, as ``sslbench submit --json`` describes it."""

    def __init__(self, about: dict[str, str]) -> None:
        self.controller = int(about["id"])
        self.log = Path(about["log"])

    @property
    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tasks(self) -> list[int]:
        """The processes that submitit has started for it."""
        return children(self.controller)

    def reach_the_limit(self) -> None:
        """What submitit does some time before a job's limit."""
        before = self.tasks()
        promise(bool(before), "submitit has not started the job yet")
        for task in before:
            os.kill(task, signal.SIGUSR2)
        self.wait_for(lambda: bool(self.tasks()) and not set(before) & set(self.tasks()), "was not started again")

    def wait_for(self, moment: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not moment():
            promise(time.monotonic() < deadline, f"the job {otherwise}\n{self.said[-2000:]}")
            time.sleep(0.01)


def children(process: int) -> list[int]:
    """Numbers of the processes that a process has started."""
    file = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in file.read_text().split()] if file.exists() else []


def submitted(line: str, folder: Path) -> Job:
    """Submit a command line as one job."""
    said = typed(f"submit --cluster local --json {line}", folder)
    return Job(json.loads(said[said.index("[") :])[0])


def at_the_limit(folder: Path, rng: random.Random) -> int:
    """One or two time limits at any step."""
    expected, view, lost = whole(), View(folder), 0
    job = submitted(f"{RUN} run.tracking_uri={NOWHERE}", folder)
    for number in sorted(rng.sample(range(1, STEPS - 4), rng.choice([1, 2]))):
        job.wait_for(lambda number=number: view.last_step() >= number, f"did not reach step {number}")  # type: ignore[misc]
        reached = view.last_step()
        resumed = job.said.count("Resuming after step")
        job.reach_the_limit()
        job.wait_for(partial(went_on, job, view, resumed), "did not resume")
        lost = max(lost, reached - resumed_after(job.said[job.said.rfind("Resuming after step") :]))
    job.wait_for(lambda: not job.tasks(), "did not end")
    promise(view.status() == "FINISHED", f"the run is {view.status()}\n{job.said[-2000:]}")
    expect_same(view.the_run(), expected)
    promise(len(list(folder.glob("runs/killed*"))) == 1, "there is a second run")
    return max(lost, 0)


def went_on(job: Job, view: View, resumed: int) -> bool:
    """Whether a job has resumed more often than before, or had nothing left to do."""
    return job.said.count("Resuming after step") > resumed or view.status_or("") == "FINISHED"


def before_the_first_step(folder: Path, rng: random.Random) -> int:
    """A time limit while the run is being set up."""
    expected, view = whole(), View(folder)
    job = submitted(f"{RUN} run.tracking_uri={NOWHERE}", folder)
    job.wait_for(lambda: any(children(task) for task in job.tasks()), "did not start")
    time.sleep(rng.uniform(0, 4))
    job.reach_the_limit()
    job.wait_for(lambda: not job.tasks(), "did not end")
    expect_same(view.the_run(), expected)
    promise(len(list(folder.glob("runs/killed*"))) == 1, "there is a second run")
    return 0


SAME = "the job went on by itself; checkpoints, curves and results are those of a run that nobody disturbed"
FAULTS = [
    Fault("a job reaches its time limit once or twice, at any step", trials(at_the_limit, SAME), times=5),
    Fault("a job reaches its time limit before its first step", trials(before_the_first_step, SAME), times=3),
]
