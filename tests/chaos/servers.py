"""A real MLflow server, the bad line to it, and whether it has exactly what a journal says."""

from __future__ import annotations

import atexit
import json
import math
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from contextlib import closing, suppress
from functools import cache
from pathlib import Path
from typing import Any

from chaos.children import LIMIT_S, promise, put_database

SLOW_S = 5.0
"""How long each call takes on a slow line."""
_READY, _PAUSE_S = 2, 0.3
Point = tuple[str, int, int, float | None]
"""Metric, step, milliseconds since 1970, value (None for NaN)."""


class Server:
    """``mlflow server`` on a free port of this machine, with its database in a folder of its own."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="chaos-server-"))
        self.database = self.folder / "mlflow.db"
        self.port = _free_port()
        put_database(self.folder)
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        # A line that takes as long as the server keeps connections open would lose every second call.
        words += ["--uvicorn-opts", "--timeout-keep-alive 120"]
        words += ["--backend-store-uri", f"sqlite:///{self.database}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        self._process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        atexit.register(self.end)
        deadline = time.monotonic() + LIMIT_S
        while not self._answers():
            promise(self._process.poll() is None, "the MLflow server ended")
            promise(time.monotonic() < deadline, "the MLflow server does not start")
            time.sleep(0.2)

    def end(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@cache
def the_server() -> Server:
    """One for all trials: to start it takes longer than a run."""
    return Server()


class Line:
    """A TCP proxy in front of a server: it can be cut, and it can take seconds for each call."""

    def __init__(self, target: int) -> None:
        self.port = _free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.slow = False
        self.calls = 0
        self._target = target
        self._listener: socket.socket | None = None
        self._open: list[socket.socket] = []
        self.mend()

    def mend(self) -> None:
        """Take connections (again)."""
        self._listener = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def cut(self) -> None:
        """Refuse connections, and break those that there are in the middle of whatever is said."""
        for one in [self._listener, *self._open]:
            if one is not None:
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
                one.close()
        self._listener, self._open = None, []

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self._target))
                self._open += [client, server]
                for ends in ((client, server, True), (server, client, False)):
                    threading.Thread(target=self._carry, args=ends, daemon=True).start()

    def _carry(self, source: socket.socket, target: socket.socket, is_call: bool) -> None:
        last = -math.inf
        with suppress(OSError):
            while content := source.recv(1 << 16):
                if is_call and self.slow and time.monotonic() - last > _PAUSE_S:
                    time.sleep(SLOW_S)
                last = time.monotonic()
                self.calls += is_call
                target.sendall(content)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def expect_exact(run_dir: Path, database: Path) -> None:
    """Promise that a store has what a run directory says, no less, no more and nothing twice."""
    run_id = expect_recorded(run_dir, database)
    with closing(sqlite3.connect(database)) as store:
        points = _stored_points(store, run_id)
    written = _written_points(run_dir)
    promise(points == written, f"of {len(written)} points {_difference(written, points)}")


def expect_recorded(run_dir: Path, database: Path) -> str:
    """All of that but for the curves: a resumed run measures the time of its steps again. Returns the id."""
    record = json.loads((run_dir / "run.json").read_text())
    run_id = json.loads((run_dir / "sync.json").read_text())["store_run_id"]
    with closing(sqlite3.connect(database)) as store:
        promise(_one(store, "pragma integrity_check") == "ok", f"{database} is damaged")
        _expect_one_run(store, record, run_id)
        params = dict(store.execute("select key, value from params where run_uuid = ?", (run_id,)).fetchall())
        wanted = {key: value[:6000] for key, value in record["params"].items()}
        promise(params == wanted, f"parameters {set(params.items()) ^ set(wanted.items())} differ")
        tags = dict(store.execute("select key, value from tags where run_uuid = ?", (run_id,)).fetchall())
        different = [key for key, value in record["tags"].items() if tags.get(key) != value]
        promise(not different, f"tags {different} differ")
        _expect_models(store, record, run_id)
    return str(run_id)


def _expect_one_run(store: sqlite3.Connection, record: dict[str, Any], run_id: str) -> None:
    named = store.execute("select run_uuid, status from runs where name = ?", (record["name"],)).fetchall()
    promise(named == [(run_id, record["status"])], f"runs of the name {record['name']}: {named}")
    ended = _one(store, "select end_time from runs where run_uuid = ?", run_id)
    promise(ended == round(record["ended"] * 1000), f"it ended at {ended}, not at {record['ended']}")


def _stored_points(store: sqlite3.Connection, run_id: str) -> Counter[Point]:
    rows = store.execute(
        "select key, step, timestamp, value, is_nan from metrics where run_uuid = ?", (run_id,)
    ).fetchall()
    return Counter((key, step, ms, None if is_nan else value) for key, step, ms, value, is_nan in rows)


def _written_points(run_dir: Path) -> Counter[Point]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Counter(
        (key, line["step"], round(line["time"] * 1000), None if value == "nan" else float(value))
        for line in lines
        for key, value in line["metrics"].items()
        if value not in ("inf", "-inf")  # documented: they stay in the journal
    )


def _difference(written: Counter[Point], stored: Counter[Point]) -> str:
    missing, more = written - stored, stored - written
    return f"{len(missing)} are missing and {len(more)} too many, such as {[*missing, *more][:2]}"


def _expect_models(store: sqlite3.Connection, record: dict[str, Any], run_id: str) -> None:
    rows = store.execute(
        "select tag_value, status from logged_models join logged_model_tags using (model_id) "
        "where source_run_id = ? and lifecycle_stage = 'active' and tag_key = 'sslbench.checkpoint'",
        (run_id,),
    ).fetchall()
    found = sorted((Path(place).name, status) for place, status in rows)
    wanted = sorted((Path(path).name, _READY) for path in record["checkpoints"])
    promise(found == wanted, f"LoggedModels {found} instead of {wanted}")


def _one(store: sqlite3.Connection, question: str, *values: object) -> Any:
    return store.execute(question, values).fetchone()[0]
