"""Command lines in processes of their own that start fast, can be watched from outside, and can be killed.

A fork server has imported torch, sslbench and MLflow once, and has a migrated database: both take much longer than
a short run. What happens in the children is what happens in any other process.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

import torch

import sslbench.cli
import sslbench.engine.worker
from sslbench.tracking import process
from sslbench.tracking.store import Store

LIMIT_S = 240
"""A machine that is busy with other things takes several times as long as an idle one."""
NOWHERE = "http://127.0.0.1:9"
"""A store that refuses connections at once."""
_TESTS = Path(__file__).resolve().parents[1]
_FROM_OUTSIDE = ("MLFLOW_TRACKING_URI", "SSLBENCH_RUNS", "SSLBENCH_REGISTRY", "RANK", "WORLD_SIZE", "LOCAL_RANK")


class BrokenPromiseError(Exception):
    """A run did not do what is promised; the message says what it did instead."""


def promise(kept: bool, otherwise: str) -> None:
    """Raise unless something is as promised. Not ``assert``: the report is also made without pytest."""
    if not kept:
        raise BrokenPromiseError(otherwise)


def _type_in(line: str, folder: Path, log: Path, environment: Mapping[str, str]) -> None:
    """The child's program: one command line."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(folder)
    for name in _FROM_OUTSIDE:
        os.environ.pop(name, None)
    os.environ.update(environment)
    torch.set_num_threads(1)
    if {"pretrain", "eval"} & set(line.split()) and os.environ.get("RANK", "0") == "0":
        _fork_store_process()
    sys.exit(sslbench.cli.run(shlex.split(line)))


class _Fork:
    """The part of :class:`subprocess.Popen` that a store process needs: MLflow is imported already."""

    def __init__(self, *command: object, **options: object) -> None:
        ours, theirs = os.pipe(), os.pipe()
        self._pid = os.fork()
        if self._pid == 0:
            os.setsid()
            os.dup2(ours[0], 0)
            os.dup2(theirs[1], 1)
            for end in (*ours, *theirs):
                os.close(end)
            process.main()
        os.close(ours[0])
        os.close(theirs[1])
        self.stdin, self.stdout = os.fdopen(ours[1], "wb"), os.fdopen(theirs[0], "rb")

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def wait(self) -> None:
        with suppress(ChildProcessError):
            os.waitpid(self._pid, 0)


def _fork_store_process() -> None:
    """The process that talks to MLflow, which a command finds there already; another one it starts as ever."""
    as_ever = subprocess.Popen
    subprocess.Popen = _Fork  # type: ignore[assignment,misc]
    try:
        process.store_process()
    finally:
        subprocess.Popen = as_ever  # type: ignore[misc]


def put_database(folder: Path) -> None:
    """An empty MLflow store that need not be migrated."""
    shutil.copy(_database(), folder / "mlflow.db")


@cache
def _database() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="chaos-store-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    child = _context().Process(target=Store, args=(f"sqlite:///{folder / 'mlflow.db'}",))
    child.start()
    child.join()
    return folder / "mlflow.db"


def _context() -> multiprocessing.context.ForkServerContext:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["chaos.children", "mlflow.store.tracking.sqlalchemy_store"])
    # The server passes over what it cannot import, and before Python 3.13 it does not get our path.
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(_TESTS), *([before] if before else [])])
    try:
        forkserver.ensure_running()
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before
    return context


class Child:
    """A command line that runs in ``folder``; starts at once."""

    def __init__(self, line: str, folder: Path, environment: Mapping[str, str] | None = None) -> None:
        self.line = line
        numbers = (folder / f"command-{number:02}.log" for number in range(10_000))
        self.log = next(log for log in numbers if not log.exists())
        self.log.touch()
        target = (line, folder, self.log, dict(environment or {}))
        self._process = _context().Process(target=_type_in, args=target)
        self._process.start()

    @property
    def pid(self) -> int:
        return self._process.pid or 0

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    @property
    def said(self) -> str:
        """What it has printed so far, on both streams."""
        return self.log.read_text(errors="replace")

    def wait_for(self, moment: Callable[[], bool]) -> bool:
        """Whether the moment came before the command ended."""
        deadline = time.monotonic() + LIMIT_S
        while self.running:
            if moment():
                return True
            promise(time.monotonic() < deadline, f"{self.line}: nothing for {LIMIT_S} s\n{self.said[-2000:]}")
            time.sleep(0.001)
        return False

    def send(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> bool:
        """SIGKILL; False if it had ended before."""
        self._process.kill()
        self._process.join()
        return self._process.exitcode == -signal.SIGKILL

    def end(self, code: int = 0) -> str:
        """Wait for the end, which must be with this exit code; returns what it has printed."""
        self._process.join(LIMIT_S)
        if self.running:
            self.kill()
            raise BrokenPromiseError(f"{self.line}: did not end in {LIMIT_S} s\n{self.said[-2000:]}")
        found = self._process.exitcode
        promise(found == code, f"{self.line}: exit code {found}, not {code}\n{self.said[-2000:]}")
        promise("Traceback" not in self.said, f"{self.line}: a traceback\n{self.said[-2000:]}")
        return self.said


def typed(line: str, folder: Path, code: int = 0) -> str:
    """Run a command line to its end."""
    return Child(line, folder).end(code)


def ranks(line: str, folder: Path, world: int) -> list[Child]:
    """The same command as the processes of one world, joined by torchrun's variables."""
    if world == 1:
        return [Child(line, folder)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [Child(line, folder, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(world)]
