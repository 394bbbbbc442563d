"""What runs inside a job that submitit has started: one process of a run, stopped and started again in time.

submitit writes a :class:`RunJob` to a file; each task of the job reads it and calls it. The task starts
``sslbench`` as a child. At the end of the job's time submitit's signal reaches :meth:`RunJob.checkpoint`: the
child saves and ends, and the job goes back into the queue, where its next start resumes the same run.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from sslbench.errors import ExitCode

_DECISION_S = 600.0
_GRACE_S = 600.0
_AFTER_THE_FIRST_S = 30.0
_PR_SET_PDEATHSIG = 1


class FailedRun(Exception, SystemExit):  # noqa: N818 - it ends a job, with the run's own exit code
    """A run that failed. submitit keeps it as the job's result, and Slurm sees the exit code."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(f"exit code {code}{reason and f': {reason}'}")
        self.code = code


class Task(NamedTuple):
    """Which process of the job this is."""

    rank: int
    tasks: int
    local_rank: int
    nodes: int
    host: str
    """Of the first task, as seen from the others."""
    attempt: str
    """Names this start of the job: all tasks of one start have the same, another start has another."""
    slurm: bool


class Decision(NamedTuple):
    """What the first task of a start has decided for all of them."""

    words: list[str]
    """Of the command line, after ``sslbench``."""
    port: int
    """At which the first task waits for the others."""


@dataclass(frozen=True)
class RunJob:
    """One run, as a job that can be started any number of times.

    Args:
        start: words of the command line, after ``sslbench``.
        resume: the words once the run exists; None: always ``start``.
        run: the link by which the run will be found; None: the command starts none.
        folder: working directory.
        notes: file in which the starts of the job are noted; all its nodes must see it.
        patience: seconds that a process may take to save when the job's time is over.
        requeued: how often the job went back into the queue.
    """

    start: tuple[str, ...]
    resume: tuple[str, ...] | None
    run: Path | None
    folder: Path
    notes: Path
    patience: float
    requeued: int = 0

    def __call__(self) -> int:
        """Run to the end.

        Returns:
            The exit code 0.

        Raises:
            FailedRun: of any other exit code.
        """
        from submitit.core.utils import UncompletedJobError

        task = _this_task(self.requeued)
        decision = self._decide(task) if task.rank == 0 else self._decided(task)
        try:
            code = self._run(decision, task)
        except UncompletedJobError:
            _say(f"the job does not go back into the queue any more. {go_on(self.run)}")
            raise
        if code == ExitCode.PREEMPTED and task.slurm:
            # Stopped, but not by the end of our time: Slurm is about to end or requeue the job. A job that ends
            # by itself would not be started again.
            time.sleep(_GRACE_S)
        if code == ExitCode.OK or (code == ExitCode.PREEMPTED and task.rank > 0):
            return code
        if task.rank > 0:
            # The end of one task ends all, and the first one may be on its way back into the queue.
            time.sleep(_AFTER_THE_FIRST_S)
        raise FailedRun(code)

    def checkpoint(self) -> Any:
        """What submitit calls, in a signal handler of the first task, before it requeues the job."""
        from submitit.helpers import DelayedSubmission

        _say("the job's time is over: the run saves its state, to go on when the job starts again")
        _stop(_children, self.patience)
        return DelayedSubmission(replace(self, requeued=self.requeued + 1))

    def _decide(self, task: Task) -> Decision:
        """Resume the run if an earlier start of this job has begun it."""
        begun = bool(_noted(self.notes))
        exists = self.run is not None and (self.run / "run.json").is_file()
        if exists and not begun and self.resume is not None:
            raise FailedRun(
                ExitCode.CONFIG,
                f"another run has taken the name {self.run and self.run.name} since the job was submitted",
            )
        words = self.resume if exists and self.resume is not None else self.start
        decision = Decision(list(words), _free_port())
        with self.notes.open("a") as file:
            file.write(json.dumps({"attempt": task.attempt, **decision._asdict()}) + "\n")
        return decision

    def _decided(self, task: Task) -> Decision:
        """Wait for what the first task has decided."""
        until = time.monotonic() + _DECISION_S
        while time.monotonic() < until:
            for note in _noted(self.notes):
                if note["attempt"] == task.attempt:
                    return Decision(note["words"], note["port"])
            time.sleep(0.2)
        raise FailedRun(ExitCode.LAUNCH, f"the first task has not written {self.notes} within {_DECISION_S:.0f} s")

    def _run(self, decision: Decision, task: Task) -> int:
        command = [sys.executable, "-P", "-m", "sslbench", *decision.words]
        _say(f"task {task.rank} of {task.tasks}: sslbench {' '.join(decision.words)}")
        environment = {**os.environ, **launch_environment(task, decision.port)}
        child = subprocess.Popen(command, cwd=self.folder, env=environment, preexec_fn=_prepare_child)
        _children.append(child.pid)
        with _forwarding(child.pid):
            code = _await(child)
        _children.clear()
        return 128 - code if code < 0 else code


def go_on(run: Path | None) -> str:
    """What to type when a job is not started again by itself."""
    if run is not None:
        return f"To go on: sslbench submit ... -- pretrain --resume {run.name}"
    return "To go on, submit it again, with more --hours or --requeues"


_children: list[int] = []
"""The process that this task has started, for the signal handler."""


def launch_environment(task: Task, port: int) -> Mapping[str, str]:
    """torchrun's variables, by which the processes of a run find each other; none for a single one."""
    if task.tasks == 1:
        return {}
    return {
        "RANK": str(task.rank),
        "WORLD_SIZE": str(task.tasks),
        "LOCAL_RANK": str(task.local_rank),
        "LOCAL_WORLD_SIZE": str(task.tasks // task.nodes),
        "MASTER_ADDR": task.host,
        "MASTER_PORT": str(port),
    }


def _this_task(requeued: int) -> Task:
    import submitit

    job = submitit.JobEnvironment()
    attempt = f"{job.job_id}-{os.environ.get('SLURM_RESTART_COUNT', '0')}-{requeued}"
    host = job.hostnames[0] if job.num_nodes > 1 else "127.0.0.1"
    return Task(
        job.global_rank, job.num_tasks, job.local_rank, job.num_nodes, host, attempt, job.cluster == "slurm"
    )


def _noted(file: Path) -> list[dict[str, Any]]:
    """The starts so far; a line that is not whole yet is passed over."""
    try:
        lines = file.read_text().splitlines(keepends=True)
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return int(free.getsockname()[1])


def _prepare_child() -> None:
    """Runs in the child before it becomes sslbench."""
    # Slurm may send the signal for our end of time to all processes; only this job's own shall take note of it.
    signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    with suppress(OSError, AttributeError):  # elsewhere than on Linux a killed job may leave its child behind
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _forwarding(child: int) -> Iterator[None]:
    """SIGTERM and SIGUSR1 are for the run, which saves and ends with exit code 75."""

    def forward(number: int, _frame: object) -> None:
        _say(f"{signal.Signals(number).name} goes to the run")
        _send(child, number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _await(child: subprocess.Popen[bytes]) -> int:
    """The exit code. Waits without subprocess's lock, which a signal handler that waits as well would need."""
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    return child.wait()


def _stop(children: Sequence[int], patience: float) -> None:
    """Ask for an end and wait for it; whoever does not end in time is killed."""
    until = time.monotonic() + patience
    for child in children:
        _send(child, signal.SIGTERM)
        while _is_running(child) and time.monotonic() < until:
            time.sleep(0.05)
        if _is_running(child):
            _say(f"the run has not ended within {patience:.0f} s; it goes on from its last checkpoint")
            _send(child, signal.SIGKILL)


def _is_running(child: int) -> bool:
    try:
        return os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT | os.WNOHANG) is None
    except ChildProcessError:
        return False


def _send(child: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(child, number)


def _say(message: str) -> None:
    print(f"sslbench job: {message}", flush=True)  # noqa: T201 - the job's log file
