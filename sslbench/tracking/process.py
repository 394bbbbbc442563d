"""The process that talks to MLflow: importing it and opening a database takes as long as importing torch.

A command starts it before anything else, so that both happen at once on two cores; the training process imports no
mlflow at all. Calls of a :class:`~sslbench.tracking.store.Store` go there and come back as pickles over two pipes.
It ends with the process that started it, however that ends: its input is closed then.
"""

from __future__ import annotations

import atexit
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Any, BinaryIO, cast

from sslbench.tracking.address import resolve_tracking_uri, sqlite_path
from sslbench.tracking.store import RejectedError, Store, StoreError, reason

_PREFIX = "MLFLOW_"
# The parent's own path, as it is: a module that happens to lie in the working directory is none of ours.
_PROGRAM = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); from {__name__} import main; main()"


class StoreProcess:
    """The side of the training process. Calls of several threads go on at the same time."""

    def __init__(self) -> None:
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the training process, which then sends what is left
        )
        self._numbers = count()
        self._calls: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()
        self._ended = self._closing = False
        threading.Thread(target=self._listen, name="sslbench-store", daemon=True).start()
        atexit.register(self.close)

    @property
    def alive(self) -> bool:
        """Whether calls can be answered."""
        return not self._ended

    def call(self, method: str, *arguments: Any, **named: Any) -> Any:
        """Have a function of :class:`_Service` called, and wait for what it returns.

        Raises:
            StoreError, RejectedError: what it raised, or the process has ended.
        """
        answer: Future[Any] = Future()
        with self._lock:
            number = next(self._numbers)
            self._calls[number] = answer
            try:
                pickle.dump((number, method, arguments, named), self._input)
                self._input.flush()
            except OSError as error:
                self._ended = True  # the thread that listens may see it later: nobody shall be given this process
                raise StoreError(_ENDED) from error
        if self._ended:
            raise StoreError(_ENDED)
        return answer.result()

    def close(self) -> None:
        """End it at once, whatever it is doing: what the store has not acknowledged is sent another time."""
        self._closing = True
        self._child.kill()
        self._child.wait()

    @property
    def _input(self) -> BinaryIO:
        return cast(BinaryIO, self._child.stdin)

    def _listen(self) -> None:
        with suppress(Exception):  # whatever a broken reply raises, nobody may wait for ever
            while True:
                number, value, error = pickle.load(cast(BinaryIO, self._child.stdout))
                answer = self._calls.pop(number)
                answer.set_result(value) if error is None else answer.set_exception(error)
        self._ended = True
        for answer in [] if self._closing else list(self._calls.values()):
            answer.set_exception(StoreError(_ENDED))


_ENDED = "the process that talks to MLflow has ended"
_running: StoreProcess | None = None
_starting = threading.Lock()


def store_process() -> StoreProcess:
    """The process of this process; it is started if there is none. Returns at once."""
    global _running
    with _starting:
        if _running is None or not _running.alive:
            _running = StoreProcess()
        return _running


def prepare_store() -> None:
    """Start it early, in a process that is going to record a run."""
    if os.environ.get("RANK", "0") == "0":  # of the processes that a launcher starts, the first one records
        with suppress(OSError):  # the first call meets it again
            store_process()


def open_store(uri: str, patient: bool) -> Store:
    """A store whose methods run in the other process.

    Args:
        patient: give a slow server the time it takes.

    Raises:
        StoreError, RejectedError: as :class:`~sslbench.tracking.store.Store` does.
    """
    try:
        process = store_process()
    except OSError as error:
        raise StoreError(reason(error)) from error
    settings = {name: value for name, value in os.environ.items() if name.startswith(_PREFIX)}
    return cast(Store, _Remote(process, uri, process.call("open", uri, patient, settings)))


class _Remote:
    """Has the methods of :class:`~sslbench.tracking.store.Store`."""

    def __init__(self, process: StoreProcess, uri: str, number: int) -> None:
        self.uri = uri
        self._process = process
        self._number = number

    def __getattr__(self, method: str) -> Any:
        return partial(self._process.call, "use", self._number, method)


class _Service:
    """The side that holds the stores."""

    def __init__(self, replies: BinaryIO) -> None:
        self._replies = replies
        self._lock = threading.Lock()
        self._stores: list[Store] = []

    def open(self, uri: str, patient: bool, settings: Mapping[str, str]) -> int:
        for name in [name for name in os.environ if name.startswith(_PREFIX)]:
            del os.environ[name]
        os.environ.update(settings)
        store = Store(uri, patient=patient)
        with self._lock:
            self._stores.append(store)
            return len(self._stores) - 1

    def use(self, number: int, method: str, *arguments: Any, **named: Any) -> Any:
        return getattr(self._stores[number], method)(*arguments, **named)

    def answer(self, number: int, method: str, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        try:
            reply = pickle.dumps((number, getattr(self, method)(*arguments, **named), None))
        except (StoreError, RejectedError) as error:
            reply = pickle.dumps((number, None, error))
        except Exception as error:  # noqa: BLE001 - whatever it is, the other side must not wait for ever
            reply = pickle.dumps((number, None, StoreError(reason(error))))
        with self._lock:
            self._replies.write(reply)
            self._replies.flush()


def _warm_up() -> None:
    """Import what the first call needs. A failure will meet that call again, which can report it."""
    with suppress(Exception):
        import mlflow

        uri = resolve_tracking_uri(None)
        database = sqlite_path(uri)
        if database is None:
            return
        import mlflow.store.tracking.sqlalchemy_store  # noqa: F401

        if database.exists():  # the command may name another one, and this one would be there for nothing
            Store(uri)


def main() -> None:
    """Answer calls until the input is closed."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # the training process decides when to end
        signal.signal(number, signal.SIG_IGN)
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not get between the replies
    service = _Service(replies)
    _warm_up()
    pool = ThreadPoolExecutor()
    with suppress(EOFError, OSError, pickle.UnpicklingError):
        while True:
            pool.submit(service.answer, *pickle.load(requests))
    os._exit(0)  # nobody waits for the calls that still go on
