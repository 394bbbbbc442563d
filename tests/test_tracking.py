"""Runs in a real MLflow database, and runs whose store is gone."""

from __future__ import annotations

import json
import math
import shutil
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient

from sslbench.errors import ConfigError, PreemptedError
from sslbench.tracking import (
    ParentRef,
    RunRecord,
    Tracker,
    check_store,
    headline,
    resolve_tracking_uri,
    run_directories,
    store,
    sync,
)
from sslbench.tracking.journal import Journal
from sslbench.tracking.push import Push
from sslbench.tracking.record import SyncState, flatten
from sslbench.tracking.store import Store, StoreError

PARAMS = {"method": {"name": "byol", "tau": 0.99, "views": [{"size": 32}]}, "optim": {"lr": 0.1, "note": None}}
TAGS = {"method": "byol", "seed": "1", "sslbench.dataset": "toy"}
Open = Callable[..., Tracker]


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated database: creating one takes seconds."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    store.Store(f"sqlite:///{path}")
    return path


@pytest.fixture
def uri(tmp_path: Path, empty_database: Path) -> str:
    path = tmp_path / "mlflow.db"
    path.write_bytes(empty_database.read_bytes())
    return f"sqlite:///{path}"


@pytest.fixture
def client(uri: str) -> MlflowClient:
    return MlflowClient(uri)


@pytest.fixture(autouse=True)
def _no_known_outages() -> Iterator[None]:
    yield
    store._outages.clear()


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def start(tmp_path: Path, uri: str, messages: list[str]) -> Open:
    def open_tracker(**changes: Any) -> Tracker:
        arguments: dict[str, Any] = {
            "root": tmp_path / "runs",
            "name": "byol-toy",
            "kind": "pretrain",
            "experiment": "toy",
            "tracking_uri": uri,
            "parent": None,
            "params": PARAMS,
            "tags": TAGS,
            "log": messages.append,
        }
        return Tracker.open(**(arguments | changes))

    return open_tracker


@pytest.fixture
def refused_uri() -> str:
    """An address where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


@pytest.fixture
def silent_uri(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server that accepts connections and never answers."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(64)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


def write_checkpoint(tracker: Tracker, step: int) -> Path:
    path = tracker.run_dir / "checkpoints" / f"step-{step}"
    path.mkdir(parents=True)
    (path / "backbone.pt").write_bytes(b"weights")
    (path / "meta.json").write_text("{}")
    tracker.checkpoint(path, {"step": step, "backbone": {"name": "conv4"}, "epoch": 1})
    return path


def history(client: MlflowClient, run_id: str, key: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]


def test_a_run_is_complete_in_its_folder_and_in_the_store(
    start: Open, client: MlflowClient, tmp_path: Path
) -> None:
    tracker = start()
    for step in range(50):
        tracker.log(step, {"train/loss": 1 / (step + 1), "bad": math.inf if step == 3 else math.nan})
    tracker.dataset("toy", "f" * 64, "pretraining")
    tracker.finish("FINISHED")
    assert tracker.synced

    run = client.get_run(tracker.run_id)
    assert run.info.status == "FINISHED"
    assert Path(run.info.artifact_uri) == tracker.run_dir == (tmp_path / "runs/byol-toy").resolve()
    assert {f.path for f in client.list_artifacts(tracker.run_id)} >= {
        "config.yaml",
        "metrics.jsonl",
        "command.txt",
    }
    assert history(client, tracker.run_id, "train/loss") == [(s, 1 / (s + 1)) for s in range(50)]
    assert 3 not in [step for step, _ in history(client, tracker.run_id, "bad")]
    assert run.data.params == {
        "method.name": "byol",
        "method.tau": "0.99",
        "method.views": '[{"size": 32}]',
        "optim.lr": "0.1",
        "optim.note": "None",
    }
    tags = run.data.tags
    assert tags["sslbench.kind"] == "pretrain"
    assert tags["sslbench.method"] == "byol"
    assert tags["sslbench.dataset"] == "toy"
    assert "sslbench eval" in tags["mlflow.note.content"]
    assert run.inputs.dataset_inputs[0].dataset.name == "toy"
    assert yaml.safe_load((tracker.run_dir / "config.yaml").read_text()) == PARAMS
    facts = yaml.safe_load((tracker.run_dir / "environment.yaml").read_text())
    assert {"torch", "torchvision", "numpy", "mlflow", "sslbench"} <= set(facts["packages"])
    assert (tracker.run_dir / "command.txt").read_text().startswith("cd ")


def test_an_evaluation_is_a_child_and_its_headline_reaches_the_model(start: Open, client: MlflowClient) -> None:
    parent = start()
    first = write_checkpoint(parent, 10)
    write_checkpoint(parent, 20)
    parent.checkpoint_removed(first)
    parent.finish("FINISHED")
    child = start(name="test-toy", kind="eval", parent=parent.ref())
    with child.closing():
        child.summary({"top1": 51.0})
    headline(parent.run_dir, {"eval/test.v1/toy/top1": 51.0}, log=print, step=20)

    run = client.get_run(parent.run_id)
    assert run.data.metrics["eval/test.v1/toy/top1"] == 51.0
    assert "| eval/test.v1/toy/top1 | 51 |" in run.data.tags["mlflow.note.content"]
    assert run.info.status == "FINISHED"
    assert client.get_run(child.run_id).data.tags["mlflow.parentRunId"] == parent.run_id
    (model,) = client.search_logged_models([run.info.experiment_id])
    assert model.status == "READY"
    assert model.source_run_id == parent.run_id
    assert [(m.key, m.value, m.step) for m in model.metrics] == [("eval/test.v1/toy/top1", 51.0, 20)]
    assert {f.path for f in client.list_logged_model_artifacts(model.model_id)} == {"backbone.pt", "meta.json"}
    assert client.get_run(child.run_id).inputs.model_inputs[0].model_id == model.model_id


def test_a_resumed_run_sends_no_point_twice(start: Open, client: MlflowClient) -> None:
    tracker = start()
    for step in range(10):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("KILLED")
    assert client.get_run(tracker.run_id).info.status == "KILLED"
    time.sleep(0.01)  # repeated points get other time stamps: the store would keep both

    again = start(resume=tracker.run_dir)
    assert again.run_id == tracker.run_id
    again.rewind(5)
    for step in range(6, 15):
        again.log(step, {"loss": float(step)})
    again.finish("FINISHED")
    assert history(client, tracker.run_id, "loss") == [(s, float(s)) for s in range(15)]
    assert client.get_run(tracker.run_id).info.status == "FINISHED"
    lines = [json.loads(line)["step"] for line in (tracker.run_dir / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(15))


@pytest.mark.parametrize("moment", ["points sent, not noted", "journal cut"])
def test_a_kill_between_two_writes_repeats_no_point(
    start: Open, client: MlflowClient, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start()
    for step in range(10):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("KILLED")
    time.sleep(0.01)
    if moment == "journal cut":

        def killed(journal: Journal, step: int) -> None:
            cut(journal, step)
            raise KeyboardInterrupt

        cut = Journal.truncate_after
        again = start(resume=tracker.run_dir)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "truncate_after", killed)
            with pytest.raises(KeyboardInterrupt):
                again.rewind(5)
        again.finish("KILLED")
    else:
        state = SyncState.load(tracker.run_dir)
        state.offset = 0
        state.save(tracker.run_dir)
    again = start(resume=tracker.run_dir)
    again.rewind(5)
    for step in range(6, 12):
        again.log(step, {"loss": float(step)})
    again.finish("FINISHED")
    assert history(client, tracker.run_id, "loss") == [(s, float(s)) for s in range(12)]


@pytest.mark.parametrize("known", [True, False], ids=["the record knows", "the record lags"])
def test_no_model_is_left_of_a_checkpoint_deleted_while_it_was_made(
    start: Open, client: MlflowClient, uri: str, refused_uri: str, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = start(tracking_uri=refused_uri)
    first, second = write_checkpoint(tracker, 10), write_checkpoint(tracker, 20)
    tracker.finish("KILLED")

    def killed(store: Store, model_id: str) -> None:
        raise StoreError("killed")

    def models() -> list[str]:
        experiments = [experiment.experiment_id for experiment in client.search_experiments()]
        return sorted(m.tags["sslbench.checkpoint"] for m in client.search_logged_models(experiments))

    with monkeypatch.context() as patch:
        patch.setattr(Store, "finalize_model", killed)
        with pytest.raises(StoreError):
            Push(tracker.run_dir, Store(uri)).everything()
    assert models() == [str(first)]
    shutil.rmtree(first)
    if not known:
        Push(tracker.run_dir, Store(uri)).everything()
    record = RunRecord.load(tracker.run_dir)
    del record.checkpoints["checkpoints/step-10"]
    record.save(tracker.run_dir)
    Push(tracker.run_dir, Store(uri)).everything()
    assert models() == [str(second)]


@pytest.mark.parametrize("first", ["", "torn\n", '{"step": 1}\n' * 9])
def test_what_was_not_sent_before_a_cut_is_still_to_send(first: str, start: Open, refused_uri: str) -> None:
    """A cut moves lines: damaged ones go, and so do those between others."""
    tracker = start(tracking_uri=refused_uri)
    tracker.finish("KILLED")
    journal = Journal(tracker.run_dir / "metrics.jsonl")
    journal.path.write_text(first)
    for step in (1, 2, 8, 3, 4, 5, 9, 6, 7):
        journal.append(step, {"loss": float(step)}, headline=step == 3)
    state = SyncState.load(tracker.run_dir)
    state.offset = next(entry.end for entry in journal.entries() if entry.step == 4)
    state.save(tracker.run_dir)
    tracker.rewind(6)
    state = SyncState.load(tracker.run_dir)
    assert [entry.step for entry in journal.entries(state.offset)] == [5, 6]
    assert [entry.step for entry in journal.entries()] == [1, 2, 3, 4, 5, 6]
    assert state.resent == {"loss": 8}
    tracker.rewind(2)
    assert list(journal.entries(SyncState.load(tracker.run_dir).offset)) == []


@pytest.mark.parametrize("version", ["this", "earlier"])
def test_a_run_that_comes_back_to_a_store_is_there_once(
    version: str, start: Open, client: MlflowClient, uri: str, tmp_path: Path, empty_database: Path
) -> None:
    other = tmp_path / "other.db"
    other.write_bytes(empty_database.read_bytes())
    tracker = start()
    tracker.log(1, {"loss": 1.0})
    write_checkpoint(tracker, 1)
    tracker.summary({"top1": 5.0})
    tracker.finish("FINISHED")
    if version == "earlier":
        record = RunRecord.load(tracker.run_dir)
        record.local_id = ""
        record.save(tracker.run_dir)
    for address in (f"sqlite:///{other}", uri, f"sqlite:///{other}"):
        assert sync(tracker.run_dir, print, address).complete
    for known in (client, MlflowClient(f"sqlite:///{other}")):
        experiment = known.get_experiment_by_name("toy")
        assert experiment is not None
        (run,) = known.search_runs([experiment.experiment_id])
        assert history(known, run.info.run_id, "loss") == [(1, 1.0)]
        assert history(known, run.info.run_id, "top1") == [(1, 5.0)]
        assert len(known.search_logged_models([experiment.experiment_id])) == 1


@pytest.mark.parametrize("kind", ["refused", "silent"])
def test_a_dead_server_costs_the_training_nothing(
    kind: str, start: Open, request: Any, messages: list[str]
) -> None:
    address = request.getfixturevalue(f"{kind}_uri")
    tracker = start(tracking_uri=address)
    slowest = max(_seconds(lambda step=step: tracker.log(step, {"loss": 1.0})) for step in range(300))
    began = time.monotonic()
    tracker.finish("FINISHED")
    assert time.monotonic() - began < 11
    # Means are far below 1 ms; a single call may meet the scheduler of a busy machine.
    assert slowest < 0.1
    assert not tracker.synced
    assert len((tracker.run_dir / "metrics.jsonl").read_text().splitlines()) == 300
    assert len(messages) == 2
    assert address in messages[0]
    assert f"sslbench sync {tracker.run_dir}" in messages[1]


def _seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def test_log_takes_less_than_a_millisecond_while_the_store_hangs(start: Open, silent_uri: str) -> None:
    tracker = start(tracking_uri=silent_uri)
    times = sorted(_seconds(lambda step=step: tracker.log(step, {"loss": 1.0, "lr": 0.1})) for step in range(500))
    assert times[250] < 0.001
    tracker.finish("KILLED")


def test_sync_completes_runs_whose_store_was_away(
    start: Open, client: MlflowClient, uri: str, refused_uri: str, messages: list[str]
) -> None:
    parent = start(tracking_uri=refused_uri)
    parent.log(1, {"loss": 1.0})
    write_checkpoint(parent, 1)
    parent.finish("FINISHED")
    child = start(tracking_uri=refused_uri, name="test-toy", kind="eval", parent=parent.ref())
    child.summary({"top1": 5.0})
    child.finish("FINISHED")
    for path in (parent.run_dir, child.run_dir):  # the server comes back
        record = RunRecord.load(path)
        record.tracking_uri = uri
        record.save(path)

    report = sync(parent.run_dir, messages.append)
    assert report.complete
    assert (report.points, [c.points for c in report.children]) == (1, [1])
    stored = SyncState.load(parent.run_dir).store_run_id
    assert stored is not None
    run = client.get_run(stored)
    assert run.info.status == "FINISHED"
    assert run.data.tags["sslbench.local_id"] == parent.run_id
    assert "config.yaml" in {f.path for f in client.list_artifacts(stored)}
    kept = Path(client.download_artifacts(stored, "checkpoints/step-1/backbone.pt"))
    assert kept.read_bytes() == b"weights"
    child_run = client.get_run(SyncState.load(child.run_dir).store_run_id or "")
    assert child_run.data.tags["mlflow.parentRunId"] == stored
    assert run_directories(Path(parent.run_dir).parents[2]) == sorted([parent.run_dir, child.run_dir])

    again = sync(parent.run_dir, messages.append)
    assert again.complete
    assert again.points == 0
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_sync_of_a_child_creates_its_parent_first(
    start: Open, client: MlflowClient, uri: str, refused_uri: str
) -> None:
    parent = start(tracking_uri=refused_uri)
    parent.finish("FINISHED")
    child = start(tracking_uri=refused_uri, name="knn-toy", kind="eval", parent=parent.ref())
    child.finish("FINISHED")
    record = RunRecord.load(child.run_dir)
    record.tracking_uri = uri
    record.save(child.run_dir)
    assert sync(child.run_dir, print).complete
    run = client.get_run(SyncState.load(child.run_dir).store_run_id or "")
    assert client.get_run(run.data.tags["mlflow.parentRunId"]).info.run_name == "byol-toy"


def test_a_locked_database_delays_but_loses_nothing(start: Open, client: MlflowClient, uri: str) -> None:
    tracker = start()
    locker = sqlite3.connect(uri.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    locker.execute("BEGIN EXCLUSIVE")
    release = threading.Timer(2.0, lambda: locker.execute("COMMIT"))
    release.start()
    for step in range(20):
        tracker.log(step, {"loss": float(step)})
    tracker.finish("FINISHED")
    release.join()
    locker.close()
    assert tracker.synced
    assert len(history(client, tracker.run_id, "loss")) == 20


def test_an_experiment_that_lives_elsewhere_leads_to_the_run_directory(
    start: Open, client: MlflowClient, tmp_path: Path
) -> None:
    client.create_experiment("toy", artifact_location=str(tmp_path / "elsewhere"))
    tracker = start()
    tracker.finish("FINISHED")
    assert tracker.run_dir.is_relative_to(tmp_path / "runs")
    assert "config.yaml" in {f.path for f in client.list_artifacts(tracker.run_id)}


def test_two_runs_of_one_name_both_have_a_link(start: Open, tmp_path: Path) -> None:
    one, two = start(), start()
    one.finish("FINISHED")
    two.finish("FINISHED")
    links = {(tmp_path / "runs" / name).resolve() for name in ("byol-toy", "byol-toy-2")}
    assert links == {one.run_dir, two.run_dir}


def test_a_killed_process_gets_its_final_status_from_sync(start: Open, client: MlflowClient) -> None:
    tracker = start()
    tracker.log(1, {"loss": 1.0})
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    record = RunRecord.load(tracker.run_dir)
    record.pid = dead.pid
    record.save(tracker.run_dir)
    assert sync(tracker.run_dir, print).complete
    assert client.get_run(tracker.run_id).info.status == "KILLED"


@pytest.mark.parametrize(
    ("error", "status"), [(ConfigError("no", hint="try"), "FAILED"), (PreemptedError("stop"), "KILLED")]
)
def test_closing_keeps_the_error(start: Open, client: MlflowClient, error: Exception, status: str) -> None:
    tracker = start()
    with pytest.raises(type(error)), tracker.closing():
        raise error
    assert client.get_run(tracker.run_id).info.status == status
    saved: Mapping[str, Any] = json.loads((tracker.run_dir / "error.json").read_text())
    assert saved["message"] == str(error)
    assert saved["hint"] == getattr(error, "hint", None)


def test_a_refused_part_does_not_hold_up_the_rest(start: Open, client: MlflowClient, messages: list[str]) -> None:
    tracker = start()
    client.log_param(tracker.run_id, "optim.lr", "something else")  # parameters are immutable
    tracker.log(1, {"loss": 1.0})
    tracker.finish("FINISHED")
    assert history(client, tracker.run_id, "loss") == [(1, 1.0)]
    assert [m for m in messages if "refused parameters" in m]


def test_long_keys_values_and_odd_characters_are_stored(start: Open, client: MlflowClient) -> None:
    many = {f"key{i}": i for i in range(250)} | {"long": "x" * 10_000}
    tracker = start(params={"evals": many})
    tracker.log(0, {"eval/a@b (c)": 1.0})
    tracker.finish("FINISHED")
    run = client.get_run(tracker.run_id)
    assert len(run.data.params) == 251
    assert len(run.data.params["evals.long"]) == 6000
    assert run.data.metrics == {"eval/a_b _c_": 1.0}


def test_concurrent_first_uses_of_a_database_all_succeed(tmp_path: Path) -> None:
    program = "import sys; from sslbench.tracking.store import Store; Store(sys.argv[1])"
    command = [sys.executable, "-c", program, f"sqlite:///{tmp_path / 'new.db'}"]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[1] for process in running] == ["", ""]
    assert [process.returncode for process in running] == [0, 0]


def test_where_runs_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert resolve_tracking_uri(None) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://somewhere:5000")
    assert resolve_tracking_uri(None) == "http://somewhere:5000"
    assert resolve_tracking_uri("sqlite:///other.db") == f"sqlite:///{tmp_path}/other.db"


def test_check_store_names_the_problem(tmp_path: Path, uri: str, refused_uri: str) -> None:
    assert check_store(uri) is None
    assert check_store(f"sqlite:///{tmp_path}/new.db") is None
    assert not (tmp_path / "new.db").exists()
    assert "connection refused" in (check_store(refused_uri) or "")
    broken = tmp_path / "broken.db"
    broken.write_text("this is no database, but text that is long enough to be looked at")
    assert "not a database" in (check_store(f"sqlite:///{broken}") or "")


def test_not_a_run_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="not a run directory"):
        sync(tmp_path, print)


def test_flatten() -> None:
    tree = {"a": {"b": {"c": 1}, "d": [1, {"e": None}]}, "f": {}, "g": "x"}
    assert flatten(tree) == {"a.b.c": "1", "a.d": '[1, {"e": null}]', "f": "{}", "g": "x"}


def test_parent_ref_names_the_run(start: Open) -> None:
    tracker = start()
    assert tracker.ref() == ParentRef(tracker.run_id, tracker.run_dir)
    tracker.finish("FINISHED")
