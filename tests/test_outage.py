"""Real servers and real processes: an MLflow server that dies during a run, two first runs at the same moment."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from mlflow import MlflowClient

from sslbench.tracking import Tracker
from sslbench.tracking.record import SyncState

pytestmark = pytest.mark.slow


class Server:
    """``mlflow server`` on a free port, with its database in a folder."""

    def __init__(self, folder: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.folder = folder
        self.uri = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        words = ["server", "--host", "127.0.0.1", "--port", str(self.port), "--workers", "1"]
        words += ["--backend-store-uri", f"sqlite:///{self.folder / 'server.db'}"]
        words += ["--artifacts-destination", str(self.folder / "artifacts")]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", *words],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 180
        while not self._answers():
            assert self.process.poll() is None, "the server ended"
            assert time.monotonic() < deadline, "the server does not start"
            time.sleep(0.2)

    def kill(self) -> None:
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
            self.process = None

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=10) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "60")  # its first answers take long on a busy machine
    folder = tmp_path / "server"
    folder.mkdir()
    server = Server(folder)
    server.start()
    yield server
    server.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_server_that_dies_during_a_run_gets_everything_later(workdir: Path, server: Server, cli) -> None:
    messages: list[str] = []
    tracker = Tracker.open(
        root=workdir / "runs",
        name="outage",
        kind="pretrain",
        experiment="toy",
        tracking_uri=server.uri,
        parent=None,
        params={"optim": {"lr": 0.1}},
        tags={"method": "byol"},
        log=messages.append,
    )
    for step in range(20):
        tracker.log(step, {"loss": 1.0 / (step + 1)})
    wait_until(lambda: tracker.synced)
    assert SyncState.load(tracker.run_dir).store_run_id == tracker.run_id
    server.kill()
    for step in range(20, 50):
        tracker.log(step, {"loss": 1.0 / (step + 1)})
    tracker.finish("FINISHED")
    assert not tracker.synced
    assert any("takes no data at the moment" in message for message in messages)
    assert cli("sync", str(tracker.run_dir), check=1).stdout.startswith("outage: 0 values sent, not complete")

    server.start()
    assert cli("sync", str(tracker.run_dir)).stdout.startswith("outage: 30 values sent, complete")
    client = MlflowClient(server.uri)
    points = client.get_metric_history(tracker.run_id, "loss")
    assert [(point.step, point.value) for point in points] == [(step, 1.0 / (step + 1)) for step in range(50)]
    run = client.get_run(tracker.run_id)
    assert (run.info.status, run.data.params["optim.lr"]) == ("FINISHED", "0.1")
    assert "metrics.jsonl" in {file.path for file in client.list_artifacts(tracker.run_id)}


def test_two_first_runs_at_once_in_an_empty_folder(workdir: Path) -> None:
    words = "pretrain --method simclr --dataset digits --backbone conv4 --limit 2 --no-evals probe.every=0"
    commands = [
        subprocess.Popen(
            [sys.executable, "-m", "sslbench", *words.split(), f"run.seed={seed}"],
            cwd=workdir,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for seed in (1, 2)
    ]
    for command in commands:
        out, err = command.communicate(timeout=300)
        assert command.returncode == 0, out + err
        assert "MLflow" not in err
    client = MlflowClient(f"sqlite:///{workdir / 'mlflow.db'}")
    (experiment,) = client.search_experiments(filter_string="name = 'digits'")
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["sslbench.seed"] for run in runs) == ["1", "2"]
    assert {run.info.status for run in runs} == {"FINISHED"}
    assert all((Path(run.info.artifact_uri) / "run.json").is_file() for run in runs)
