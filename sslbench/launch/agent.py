"""The launcher's part on one machine: ``torch.distributed``'s elastic agent with manners.

It differs from its base in three things. Workers that end on purpose are not started again. A signal is passed on
to the workers, which save and end; meanwhile nobody is killed. And when one worker dies the others get time to
close their files.
"""

from __future__ import annotations

import inspect
import os
import signal
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from sslbench.engine.stopping import SIGNALS, stopped_by
from sslbench.errors import ExitCode
from sslbench.launch.report import read_report, regrouping_file, report_file
from sslbench.launch.verdict import End, Verdict, judge

#: How long workers may take to save after a signal before they are killed.
STOP_LIMIT_S = 600.0
#: How long the others may go on after one worker has failed: they notice, and close the run's files.
PEERS_LIMIT_S = 20.0
_POLL_S = 0.05
#: How long workers that must end may take before they are killed.
_CLOSING_S = 10
_VERDICT, _VERDICT_WAIT_S = "verdict", 3.0
_LOOK_S = 1.0


class Agent(LocalElasticAgent):
    """Runs the workers of one machine.

    Args:
        folder: for reports and log files of the workers.
        say: takes the line about a restart.
    """

    def __init__(self, spec: WorkerSpec, folder: Path, say: Callable[[str], None]) -> None:
        limit = known_options(LocalElasticAgent.__init__, shutdown_timeout=_CLOSING_S)
        super().__init__(spec, Logs(folder), **limit)
        self._folder = folder
        self._say = say
        self._asked: int | None = None
        self._passing_on = self._waiting = False
        self._ends: dict[int, End] = {}
        self._looked = 0.0
        self.verdict: Verdict | None = None
        self.blame = ""
        """Who failed and how, in words."""

    @property
    def restarts_left(self) -> int:
        """How often the workers may still be started again."""
        return int(self._remaining_restarts)

    def asked_to_stop(self, number: int, frame: FrameType | None = None) -> None:
        """Handle a signal."""
        self._asked = self._asked or number
        if self._waiting:
            self._check_stop()
        if self._passing_on:
            self._signal_workers(number)

    def _check_stop(self) -> None:
        if self._asked is not None:
            raise stopped_by(self._asked, "no process was at work", "give the same command again")

    def _rendezvous(self, worker_group: WorkerGroup) -> None:
        self._waiting = True
        self._check_stop()
        try:
            super()._rendezvous(worker_group)
        finally:
            self._waiting = False

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._ends = {}
        regrouping_file(self._folder).unlink(missing_ok=True)
        for worker in worker_group.workers:
            report_file(self._folder, worker.global_rank).unlink(missing_ok=True)
        started: dict[int, Any] = super()._start_workers(worker_group)
        self._passing_on = True
        if self._asked is not None:  # while they were being started
            self._signal_workers(self._asked)
        return started

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        self._poll(worker_group)
        if self._at_work(worker_group):
            return RunResult(state=WorkerState.HEALTHY)
        self._let_end(worker_group)
        verdict = self._agree(worker_group, judge(self._ends, self._asked))
        self.verdict = verdict
        if verdict.code == ExitCode.OK:
            return RunResult(state=WorkerState.SUCCEEDED, return_values=dict.fromkeys(self._ends))
        if verdict.final:
            self._remaining_restarts = 0
        elif self._remaining_restarts:
            number = worker_group.spec.max_restarts - self._remaining_restarts + 1
            self._say(
                f"Restart {number} of {worker_group.spec.max_restarts}: {self.blame}. "
                "All processes start again from the last checkpoint."
            )
        return RunResult(state=WorkerState.FAILED)

    def _at_work(self, worker_group: WorkerGroup) -> bool:
        if self._asked is not None or self._failed() or len(self._ends) == len(worker_group.workers):
            return False
        if worker_group.group_world_size == 1 or time.monotonic() < self._looked + _LOOK_S:
            return True
        self._looked = time.monotonic()
        posted = self._posted(worker_group, wait=False)
        if posted is None or not posted.final:
            return True
        self._signal_workers(signal.SIGTERM)  # another machine has ended, and they would wait for it
        return False

    def _stop_workers(self, worker_group: WorkerGroup, **options: Any) -> None:
        """Also called when machines come: workers that still train then save first."""
        if not self._failed():
            self._say("Another machine has come: all processes save, and start again together.")
            regrouping_file(self._folder).touch()
            self._signal_workers(signal.SIGTERM)
            self._wait(worker_group, lambda: STOP_LIMIT_S)
        self._passing_on = False
        super()._stop_workers(worker_group, **options)

    def _let_end(self, worker_group: WorkerGroup) -> None:
        self._wait(worker_group, self._limit)
        if len(self._ends) < len(worker_group.workers):
            self._passing_on = False
            self._shutdown(signal.SIGTERM, **known_options(self._shutdown, timeout=_CLOSING_S))
            self._poll(worker_group, cleared=True)

    def _limit(self) -> float:
        stopping = self._asked is not None or any(
            end.code in (ExitCode.PREEMPTED, ExitCode.INTERRUPTED) for end in self._ends.values()
        )
        return STOP_LIMIT_S if stopping else PEERS_LIMIT_S

    def _wait(self, worker_group: WorkerGroup, limit: Callable[[], float]) -> None:
        began = time.monotonic()
        while len(self._ends) < len(worker_group.workers) and time.monotonic() - began < limit():
            time.sleep(_POLL_S)
            self._poll(worker_group)

    def _poll(self, worker_group: WorkerGroup, *, cleared: bool = False) -> None:
        for worker in worker_group.workers:
            process = self._process(worker.local_rank)
            if worker.global_rank not in self._ends and (code := process.poll()) is not None:
                report = read_report(self._folder, worker.global_rank)
                self._ends[worker.global_rank] = End(code, report, cleared)

    def _failed(self) -> bool:
        return any(end.code != 0 for end in self._ends.values())

    def _agree(self, worker_group: WorkerGroup, own: Verdict) -> Verdict:
        """What the machines think together: on one whose workers only lost contact, the cause is elsewhere."""
        self.blame = self._describe(own)
        if worker_group.group_world_size == 1 or own.code == ExitCode.OK:
            return own
        secondary = own.rank is not None and self._ends[own.rank].lost
        posted = self._posted(worker_group, wait=secondary)
        if posted is not None and (posted.final or secondary):
            return own if own.rank == 0 and own.code == posted.code else posted
        store: Any = worker_group.store
        with suppress(Exception):  # the machine with the store may be the one that is gone
            if not secondary:
                store.set(_VERDICT, f"{own.code} {int(own.final)} {self.blame}")
        return own

    def _posted(self, worker_group: WorkerGroup, *, wait: bool) -> Verdict | None:
        """The verdict of another machine."""
        store: Any = worker_group.store
        try:
            if not wait and not store.check([_VERDICT]):
                return None
            store.wait([_VERDICT], timedelta(seconds=_VERDICT_WAIT_S))
            code, final, blame = store.get(_VERDICT).decode().split(" ", 2)
        except (RuntimeError, ValueError):  # none, or the machine with the store is gone
            return None
        verdict = Verdict(int(code), None, bool(int(final)))
        self.blame = blame  # empty: somebody has asked it to stop
        return verdict

    def _describe(self, verdict: Verdict) -> str:
        if verdict.rank is None:
            return ""
        end = self._ends[verdict.rank]
        log = self._logs_specs.file(verdict.rank)  # type: ignore[attr-defined]
        where = f" (log: {log})" if verdict.rank else ""
        who = "" if end.lost else f"rank {verdict.rank} on {socket.gethostname()} "
        return f"{who}{end.words()}{where}"

    def _signal_workers(self, number: int) -> None:
        """The workers only: what they have started is theirs to end."""
        for worker in self._worker_group.workers:
            process = self._process(worker.local_rank)
            if process.poll() is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def _process(self, local_rank: int) -> Any:
        return self._pcontext.subprocess_handlers[local_rank].proc  # type: ignore[union-attr]


class Logs(LogsSpecs):
    """Rank 0 has the terminal; what the others print goes to files."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self._attempt = 0

    @property
    def root_log_dir(self) -> str:
        """See base class."""
        return str(self._folder)

    def file(self, rank: int) -> Path:
        """The messages of a rank in the newest attempt."""
        return self._folder / f"attempt-{self._attempt}" / f"rank-{rank}.log"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """See base class."""
        self._attempt += 1
        ranks = {local: int(env["RANK"]) for local, env in envs.items()}
        self.file(0).parent.mkdir(parents=True, exist_ok=True)
        errors = {local: str(self.file(rank)) if rank else "" for local, rank in ranks.items()}
        return LogsDest(
            stdouts={local: name and str(Path(name).with_suffix(".out")) for local, name in errors.items()},
            stderrs=errors,
            error_files=dict.fromkeys(ranks, os.devnull),
        )


def known_options(function: Callable[..., Any], **options: Any) -> dict[str, Any]:
    """Those that the function takes: in older versions of torch some time limits cannot be set."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def signals_go_to(agent: Agent) -> dict[int, Any]:
    """Install the agent's handler; returns what was there."""
    return {number: signal.signal(number, agent.asked_to_stop) for number in SIGNALS}
