"""The thread that copies a run directory to the store while the run goes on."""

from __future__ import annotations

import threading
from pathlib import Path

from sslbench.tracking.push import Push
from sslbench.tracking.record import Log
from sslbench.tracking.store import RejectedError, Store, StoreError, connect, reason

#: Seconds between two passes: metrics of several log calls go in one request.
_INTERVAL_S = 1.0
#: Seconds before a store that failed is tried again; doubled up to the limit.
_FIRST_RETRY_S, _LAST_RETRY_S = 2.0, 60.0


class Sender:
    """Runs :class:`Push` when there is news. It reads the files, so a slow store costs no memory."""

    def __init__(self, run_dir: Path, uri: str, log: Log, store: Store | None, *, told: bool = False) -> None:
        """``told``: the user knows already that the store is out of reach."""
        self._run_dir = run_dir
        self._uri = uri
        self._log = log
        self._store = store
        self._news = threading.Event()
        self._stopping = threading.Event()
        self._done = False
        self._reported = told
        self._noted: set[str] = set()
        self._thread = threading.Thread(target=self._work, name="sslbench-sender", daemon=True)
        self._thread.start()

    def wake(self) -> None:
        """There is something to send."""
        self._news.set()

    def idle(self) -> bool:
        """Whether the store has everything."""
        return self._done and not self._news.is_set()

    def stop(self, limit_s: float) -> None:
        """Send what is left, within a time limit, and end."""
        self._stopping.set()
        self._news.set()
        self._thread.join(limit_s)

    def _work(self) -> None:
        retry_s = _FIRST_RETRY_S
        while True:
            self._news.wait()
            last_pass = self._stopping.is_set()
            self._done = False
            self._news.clear()
            self._done = sent = self._pass()
            if last_pass:
                return
            if sent:
                retry_s = _FIRST_RETRY_S
                self._stopping.wait(_INTERVAL_S)
            else:
                self._stopping.wait(retry_s)
                retry_s = min(2 * retry_s, _LAST_RETRY_S)
                self._news.set()

    def _pass(self) -> bool:
        try:
            self._store = self._store or connect(self._uri, patient=True)
            push = Push(self._run_dir, self._store)
            push.everything()
        except (StoreError, RejectedError) as error:
            self._store = None  # what answered may have ended; the next attempt connects anew
            self._report(error)
            return False
        # A full disk, a file that someone deleted: nothing may end this thread with a traceback.
        except Exception as error:  # noqa: BLE001
            self._report(StoreError(reason(error)))
            return False
        for note in push.report.notes:
            if note not in self._noted:
                self._noted.add(note)
                self._log(note)
        for refusal in push.report.refused:
            self._log(f"the MLflow store refused {refusal}")
        self._reported = False
        return True

    def _report(self, error: StoreError | RejectedError) -> None:
        """Report an outage once, not once per attempt."""
        if not self._reported and not getattr(error, "repeated", False):
            self._log(f"MLflow store {self._uri} takes no data at the moment: {error}. Training goes on.")
        self._reported = True
