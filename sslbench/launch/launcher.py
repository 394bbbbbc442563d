"""``--devices``: starting the same command in several processes and seeing them through."""

from __future__ import annotations

import logging
import os
import shlex
import shutil
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.rendezvous import (
    RendezvousClosedError,
    RendezvousConnectionError,
    RendezvousError,
    RendezvousTimeoutError,
)

from sslbench.config.schema import TrainOptions
from sslbench.engine.console import Console
from sslbench.engine.machine import share_of_cores
from sslbench.errors import ExitCode, LaunchError, SslbenchError
from sslbench.launch import environment
from sslbench.launch.agent import Agent, signals_go_to
from sslbench.launch.identity import name_of_run
from sslbench.launch.rendezvous import Rendezvous
from sslbench.launch.report import Report, read_report
from sslbench.launch.request import LaunchRequest, Meeting, at, meeting

_FOLDER = ".launch"


def launch(request: LaunchRequest, arguments: Sequence[str], train: TrainOptions, runs: Path) -> int:
    """Run a command in several processes.

    Args:
        arguments: the words after ``sslbench``; every process gets the same ones.
        runs: folder of the run directories; log files of the processes are kept in it.

    Returns:
        The exit code.

    Raises:
        LaunchError: the processes could not be started, or died more often than they may be started again.
    """
    processes = request.processes(_gpus(train))
    place = meeting(request)
    console = Console()
    folder = runs.absolute() / _FOLDER / place.launch_id.replace("/", "-").replace(":", "-") / _node_name(request)
    folder.mkdir(parents=True, exist_ok=True)
    if place.announced:
        _announce(at(request, place), arguments, console)
    with _settings(at(request, place) if request.nnodes else request, place, folder, processes), _torch_is_quiet():
        agent = _run(request, place, arguments, folder, processes, console)
    return _conclude(agent, folder, request, name_of_run(runs, place.launch_id))


def _run(
    request: LaunchRequest,
    place: Meeting,
    arguments: Sequence[str],
    folder: Path,
    processes: int,
    console: Console,
) -> Agent:
    while True:
        rendezvous = Rendezvous(request, place)
        agent = Agent(_workers(request, rendezvous, arguments, processes), folder, console.info)
        try:
            _see_through(agent, rendezvous)
        except RendezvousConnectionError as error:
            if rendezvous.first or agent.restarts_left == 0:
                raise _rendezvous_failure(error, request, place) from error
            console.info(f"The first machine ({place.host}) is gone; waiting {request.peer_timeout:g} s for it.")
            request = replace(request, max_restarts=agent.restarts_left - 1)
        except RendezvousError as error:
            raise _rendezvous_failure(error, request, place) from error
        else:
            return agent


def _workers(
    request: LaunchRequest, rendezvous: Rendezvous, arguments: Sequence[str], processes: int
) -> WorkerSpec:
    return WorkerSpec(
        role="sslbench",
        local_world_size=processes,
        rdzv_handler=rendezvous,
        entrypoint=sys.executable,
        args=("-P", "-m", "sslbench", *arguments),
        max_restarts=request.max_restarts,
        monitor_interval=0.1,
    )


def _see_through(agent: Agent, rendezvous: Rendezvous) -> None:
    with _handling_signals(agent):
        try:
            agent.run()
        finally:
            with suppress(Exception):  # whoever had the store may be gone
                rendezvous.shutdown()


def _conclude(agent: Agent, folder: Path, request: LaunchRequest, run: str | None) -> int:
    verdict = agent.verdict
    if verdict is None:
        raise LaunchError(
            f"the launch had its {request.nodes()[1]} machines without this one, and has ended",
            hint="--nnodes MIN:MAX says how many may take part",
        )
    if verdict.final and verdict.rank is None and not agent.blame:
        shutil.rmtree(folder, ignore_errors=True)
        with suppress(OSError):  # other machines still have theirs in it
            folder.parent.rmdir()
    if verdict.final and (verdict.rank == 0 or not agent.blame):  # rank 0 has said why, or it was the user
        return verdict.code
    report = read_report(folder, verdict.rank) if verdict.rank is not None else None
    if verdict.final:
        raise _as_told(agent.blame, report, verdict.code)
    restarts = f" after {request.max_restarts} restarts" if request.max_restarts else ""
    again = f"sslbench pretrain --resume {shlex.quote(run)} {request.words()}" if run else "give the command again"
    raise LaunchError(f"{agent.blame}{restarts}", hint=f"see to the cause, then: {again}")


def _as_told(blame: str, report: Report | None, code: int) -> SslbenchError:
    """The error of a rank that has no terminal."""
    error = SslbenchError(blame, hint=report.hint if report else None)
    error.title = report.title if report else LaunchError.title
    error.exit_code = ExitCode(code) if code in set(ExitCode) else ExitCode.UNEXPECTED
    return error


def _rendezvous_failure(error: RendezvousError, request: LaunchRequest, place: Meeting) -> LaunchError:
    where = f"{place.host}:{place.port}"
    if isinstance(error, RendezvousTimeoutError):
        return LaunchError(
            f"--nnodes {request.nnodes}: not all machines came to {where} within {request.peer_timeout:g} s",
            hint="start the command on every machine with the same --rdzv-endpoint and --launch-id; "
            "--peer-timeout sets how long to wait",
        )
    if isinstance(error, RendezvousClosedError):
        return LaunchError(
            f"the launch {place.launch_id} was ended by another machine",
            hint="its output says why; a new launch needs another --launch-id",
        )
    if isinstance(error, RendezvousConnectionError):
        return LaunchError(
            f"the first machine ({where}) is gone",
            hint="give the same line again on every machine: the run goes on from its last checkpoint",
        )
    return LaunchError(f"the machines could not meet at {where}: {error}")


def _announce(request: LaunchRequest, arguments: Sequence[str], console: Console) -> None:
    words = _without(arguments, ("--rdzv-endpoint", "--launch-id", "--node-rank"))
    line = f"sslbench {shlex.join(words)} --rdzv-endpoint {request.rdzv_endpoint} --launch-id {request.launch_id}"
    console.info(f"Type this on the other machines (and here, should this one have to start again):\n  {line}")


def _without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in options:
            next(words, None)
        elif word.partition("=")[0] not in options:
            kept.append(word)
    return kept


def _gpus(train: TrainOptions) -> int | None:
    if train.device == "cpu" or (train.device == "auto" and not torch.cuda.is_available()):
        return None
    return torch.cuda.device_count()


def _node_name(request: LaunchRequest) -> str:
    return f"{os.uname().nodename}-{os.getpid()}" if request.nnodes else "logs"


@contextmanager
def _settings(request: LaunchRequest, place: Meeting, folder: Path, processes: int) -> Iterator[None]:
    """What the workers find in their environment."""
    settings = {
        environment.LAUNCH: place.launch_id,
        environment.LAUNCHER: str(os.getpid()),
        environment.FOLDER: str(folder),
        environment.OPTIONS: request.words(),
        "TORCHELASTIC_SIGNALS_TO_HANDLE": "",  # the agent has its own
    }
    before = dict(os.environ)
    os.environ.update(settings)
    if os.environ.get("TORCH_CPP_LOG_LEVEL") == "FATAL":
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # FATAL is for this process, see _prepare_launch
    os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cores(processes)))
    try:
        yield
    finally:
        _restore(before)


def _restore(before: Mapping[str, str]) -> None:
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@contextmanager
def _torch_is_quiet() -> Iterator[None]:
    """What torch's launcher logs, tracebacks among it, is for its own developers."""
    if os.environ.get("SSLBENCH_DEBUG"):
        yield
        return
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _handling_signals(agent: Agent) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signals_go_to(agent)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
