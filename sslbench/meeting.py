"""What processes tell each other at the store where they met: which attempt this is, who is alive, who is done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from threading import Event, Thread
from typing import TypeVar
from uuid import uuid4

from torch.distributed import DistStoreError
from torch.distributed.distributed_c10d import PrefixStore, Store

from sslbench.errors import ExitCode, LaunchError, PreemptedError

_POLL_S = 0.2
_BEAT_S = 1.0
_STOPPED = (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)
_T = TypeVar("_T")


def of_this_attempt(store: Store, rank: int, world: int, timeout: float) -> Store:
    """The part of a store that only the processes of one attempt know.

    A launcher may keep its store when it starts its processes again, as torchrun does where it was given a port.
    They would then find addresses of those before them. So each process brings a number that nobody had before,
    and the first one answers it.

    Args:
        timeout: seconds after which a process that does not come counts as gone.

    Raises:
        DistStoreError: one did not come.
    """
    mine = uuid4().hex
    if rank == 0:
        _welcome(store, mine, world, timeout)
        return PrefixStore(f"sslbench/{mine}", store)
    store.set(f"sslbench/hello/{rank}", mine)
    answer = f"sslbench/welcome/{mine}"
    _await(lambda: bool(store.check([answer])), timeout, lambda: "rank 0 did not answer")
    attempt = store.get(answer).decode()
    store.set(f"sslbench/came/{attempt}/{rank}", "")
    return PrefixStore(f"sslbench/{attempt}", store)


def _welcome(store: Store, attempt: str, world: int, timeout: float) -> None:
    """Answer every number, those of earlier processes as well, until each rank has got its answer."""
    left = set(range(1, world))
    greeted: set[str] = set()

    def all_came() -> bool:
        for rank in [rank for rank in left if store.check([f"sslbench/hello/{rank}"])]:
            number = store.get(f"sslbench/hello/{rank}").decode()
            if number not in greeted:
                store.set(f"sslbench/welcome/{number}", attempt)
                greeted.add(number)
        left.difference_update([rank for rank in left if store.check([f"sslbench/came/{attempt}/{rank}"])])
        return not left

    _await(all_came, timeout, lambda: f"rank {_listed(left)} did not come")


def _await(done: Callable[[], bool], timeout: float, otherwise: Callable[[], str]) -> None:
    """Ask the store until something is done."""
    deadline, pause = time.monotonic() + timeout, 0.001
    while not answered(done, timeout):
        if time.monotonic() > deadline:
            raise DistStoreError(f"timed out: {otherwise()} within {timeout:g} s")
        time.sleep(pause)
        pause = min(2 * pause, _POLL_S)


def answered(ask: Callable[[], _T], seconds: float) -> _T:
    """What a store answers. The call to one whose process hangs never returns, whatever its own time limit.

    Raises:
        DistStoreError: nothing within so many seconds.
    """
    answers: list[_T] = []
    errors: list[Exception] = []

    def call() -> None:
        try:
            answers.append(ask())
        except Exception as error:  # noqa: BLE001 - raised again below
            errors.append(error)

    asking = Thread(target=call, name="sslbench-store", daemon=True)
    asking.start()
    asking.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise DistStoreError(f"timed out: the processes' store did not answer within {seconds:g} s")
    return answers[0]


def _listed(ranks: set[int] | Sequence[int]) -> str:
    return ", ".join(map(str, sorted(ranks)))


@dataclass
class Meetings:
    """The meetings of the processes of one attempt, one after the other.

    Args:
        timeout: seconds after which a process that is not heard of counts as gone.
    """

    store: Store
    rank: int
    world: int
    timeout: float
    _numbers: Iterator[int] = field(default_factory=count)

    def next(self) -> Meeting:
        """A new one; all ranks must come to the same ones."""
        return Meeting(PrefixStore(f"meeting/{next(self._numbers)}", self.store), self)

    def silent(self, seconds: float) -> list[int]:
        """After lost contact: the ranks that do not answer a roll call within so many seconds."""
        left = list(range(self.world))
        try:
            answered(lambda: self._call_roll(left, seconds), seconds + _BEAT_S)
        except (RuntimeError, ValueError):
            return [0]  # whose process has the store
        return left

    def _call_roll(self, left: list[int], seconds: float) -> None:
        self.store.set(f"here/{self.rank}", "")
        deadline = time.monotonic() + seconds
        while left and time.monotonic() < deadline:
            left[:] = [rank for rank in left if not self.store.check([f"here/{rank}"])]
            time.sleep(0.1 if left else 0.0)


@dataclass
class Meeting:
    """Each rank has work that may take hours, and waits until all are done with theirs."""

    store: Store
    of: Meetings
    _beats: dict[int, tuple[int, float]] = field(default_factory=dict)
    """By rank: how often it was heard of, and since when it has been that often."""

    @contextmanager
    def working(self) -> Iterator[None]:
        """While this rank works it is heard of; at the end it says that it is done, or how it failed."""
        ended = Event()
        Thread(target=self._beat, args=(ended,), name="sslbench-beat", daemon=True).start()
        try:
            yield
        except BaseException as error:
            self._say(getattr(error, "exit_code", ExitCode.UNEXPECTED), str(error))
            raise
        else:
            self._say(ExitCode.OK, "")
        finally:
            ended.set()

    def _beat(self, ended: Event) -> None:
        with suppress(RuntimeError):  # the store is gone, which the main thread will notice
            while not ended.wait(_BEAT_S):
                self.store.add(f"beat/{self.of.rank}", 1)

    def _say(self, code: int, words: str) -> None:
        self.store.set(f"done/{self.of.rank}", json.dumps([code, words]))

    def wait(self) -> None:
        """Until all are done.

        Raises:
            LaunchError: the work has failed on another rank.
            PreemptedError: another rank was asked to stop.
            DistStoreError: another rank is not heard of any more.
        """
        left, looked, pause = list(range(self.of.world)), 0.0, 0.001
        while left := answered(partial(self._at_work, left), self.of.timeout):
            if time.monotonic() > looked + _BEAT_S:
                looked = time.monotonic()
                answered(partial(self._listen, left), self.of.timeout)
            time.sleep(pause)
            pause = min(2 * pause, _POLL_S)

    def _at_work(self, ranks: Sequence[int]) -> list[int]:
        """Those that are not done; what another one's work has ended with is raised."""
        done = [rank for rank in ranks if self.store.check([f"done/{rank}"])]
        for rank in done:
            code, words = json.loads(self.store.get(f"done/{rank}"))
            if code in _STOPPED:
                raise PreemptedError(f"rank {rank} was stopped: {words}", hint="give the same command again")
            if code != ExitCode.OK:
                error = LaunchError(f"rank {rank} has failed: {words}", hint="its own message says more")
                error.exit_code = ExitCode(code)
                raise error
        return [rank for rank in ranks if rank not in done]

    def _listen(self, ranks: Sequence[int]) -> None:
        now = time.monotonic()
        for rank in ranks:
            beats = self.store.add(f"beat/{rank}", 0)
            if self._beats.get(rank, (-1, now))[0] != beats:
                self._beats[rank] = beats, now
        silent = [rank for rank in ranks if now > self._beats[rank][1] + self.of.timeout]
        if silent:
            raise DistStoreError(f"timed out: rank {_listed(silent)} was not heard of for {self.of.timeout:g} s")
