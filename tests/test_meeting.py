"""Processes that wait for each other: who they are, that they live, and what becomes of those that do not."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch._C._distributed_c10d import HashStore, Store
from torch.distributed import DistStoreError

from sslbench import meeting
from sslbench.errors import DataError, ExitCode, LaunchError, PreemptedError
from sslbench.launch.addresses import free_port
from sslbench.meeting import Meetings, of_this_attempt

WORLD = 3


@pytest.fixture
def store() -> HashStore:
    found = HashStore()
    found.set_timeout(timedelta(seconds=20))
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_BEAT_S", 0.05)
    monkeypatch.setattr(meeting, "_POLL_S", 0.02)


def each(work: Callable[[int], object], world: int = WORLD) -> list[object]:
    """What the ranks, threads here, get; errors as they are."""

    def caught(rank: int) -> object:
        try:
            return work(rank)
        except Exception as error:  # noqa: BLE001 - looked at by the test
            return error

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(caught, range(world)))


def test_processes_that_are_started_again_see_nothing_of_those_before_them(store: Store) -> None:
    def attempt(late: int) -> Callable[[int], list[bool]]:
        def joined(rank: int) -> list[bool]:
            time.sleep(0.2 * (rank == late))
            own = of_this_attempt(store, rank, WORLD, 20)
            before = own.check(["address"])
            if rank == 0:
                own.set("address", "mine")
            own.get("address")
            return [before and rank == 0, own.check(["address"])]

        return joined

    for late in (0, 1, 0):
        assert each(attempt(late)) == [[False, True]] * WORLD


def test_who_does_not_come_is_named(store: Store, quick: None) -> None:
    (found, *_) = each(lambda rank: of_this_attempt(store, rank, WORLD, 0.5) if rank != 2 else None)
    assert isinstance(found, DistStoreError)
    assert "rank 2 did not come within 0.5 s" in str(found)
    with pytest.raises(DistStoreError, match="rank 0 did not answer"):
        of_this_attempt(HashStore(), 1, WORLD, 0.3)


def test_long_work_is_waited_for_and_silence_is_not(store: Store, quick: None) -> None:
    """Rank 1 works for several times the limit, and is heard of; rank 2 never comes to the second meeting."""
    meetings = [Meetings(store, rank, WORLD, 1.5) for rank in range(WORLD)]

    def work(rank: int) -> float:
        began = time.monotonic()
        here = meetings[rank].next()
        with here.working():
            time.sleep(3.2 * (rank == 1))
        here.wait()
        return time.monotonic() - began

    assert all(isinstance(seconds, float) and seconds > 3.1 for seconds in each(work))
    found = each(work, WORLD - 1)
    assert [str(error) for error in found] == ["timed out: rank 2 was not heard of for 1.5 s"] * 2


@pytest.mark.parametrize(
    ("raised", "told", "code"),
    [
        (DataError("image 7 is gone"), LaunchError, ExitCode.DATA),
        (PreemptedError("asked to stop"), PreemptedError, ExitCode.PREEMPTED),
        (ZeroDivisionError("division"), LaunchError, ExitCode.UNEXPECTED),
    ],
)
def test_the_failure_of_one_ends_all(
    store: Store, quick: None, raised: Exception, told: type[LaunchError], code: ExitCode
) -> None:
    meetings = [Meetings(store, rank, WORLD, 20) for rank in range(WORLD)]

    def work(rank: int) -> None:
        here = meetings[rank].next()
        with here.working():
            if rank == 1:
                raise raised
        here.wait()

    first, second, third = each(work)
    assert second is raised
    for error in (first, third):
        assert isinstance(error, told)
        assert error.exit_code == code
        assert f"rank 1 {'was stopped' if told is PreemptedError else 'has failed'}: {raised}" in str(error)


def test_the_roll_call_names_who_is_silent(store: Store) -> None:
    meetings = [Meetings(store, rank, WORLD, 20) for rank in range(WORLD)]
    assert each(lambda rank: meetings[rank].silent(0.5), WORLD - 1) == [[2], [2]]


STOPPING = """
import os, signal, sys, time
import torch
from sslbench import comm

comm.join(torch.device("cpu"), 3)
comm.barrier()
try:
    comm.patiently(lambda: os.kill(os.getpid(), signal.SIGSTOP) if comm.rank() == int(sys.argv[1]) else None)
except Exception as error:
    print(comm.is_lost_contact(error), comm.silent_ranks(2), flush=True)
    os._exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize("stopped", [0, 1])
def test_a_process_that_stops_answering_is_noticed(stopped: int) -> None:
    """Also the first one, whose process has the store: calls to that never return."""
    where = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": "2",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-c", STOPPING, str(stopped)]
    ranks = [
        subprocess.Popen(
            command, env={**os.environ, **where, "RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        said, _ = ranks[1 - stopped].communicate(timeout=240)
    finally:
        for process in ranks:
            process.send_signal(signal.SIGKILL)
            process.wait()
    assert said == f"True [{stopped}]\n"
