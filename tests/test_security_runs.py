"""Run directories, configurations and names that come from somebody else."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from faults_kit import METHOD, Command, command, make_images, run_dir

from sslbench.engine import checkpoint
from sslbench.engine.runs import pretrained_runs
from sslbench.errors import CheckpointError, ConfigError, LaunchError
from sslbench.evaluation.shards import Layout, ShardedTable
from sslbench.screen import Screen
from sslbench.tracking import RunRecord
from sslbench.tracking.journal import Journal
from sslbench.tracking.owner import RunLock, identity, is_gone
from sslbench.tracking.push import experiment_dir
from sslbench.tracking.record import SyncState
from sslbench.untrusted import file_name, is_inside, printable, read_json

__all__ = ["command"]

STEERING = "\x1b]0;owned\x07\x1b[31mred\u202egnp.exe[bold red]loud[/bold red][/nothing]"
TINY = f"pretrain {METHOD} --dataset digits --limit 1 --no-evals train.batch_size=64"


class Listener:
    """A server of somebody else that notes who calls."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        self.calls: list[bytes] = []
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            self.calls.append(client.recv(10_000))
            client.close()

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def stranger() -> Iterator[Listener]:
    listener = Listener()
    yield listener
    listener.close()


@pytest.fixture
def given(command: Command, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run directory as it comes out of somebody else's archive."""
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", "secret")
    command(f"{TINY} run.name=theirs")
    place = workdir / "unpacked" / "theirs"
    shutil.copytree(run_dir("theirs"), place)
    shutil.rmtree(workdir / "runs")
    return place


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_run_of_somebody_else_talks_to_nobody_and_writes_nowhere_else(
    command: Command, given: Path, stranger: Listener, workdir: Path
) -> None:
    target = workdir / "home" / ".config"
    hidden = {"root": str(target), "tracking_uri": stranger.uri, "host": "elsewhere", "experiment": "../../../up"}
    checkpoints = json.loads((given / "run.json").read_text())["checkpoints"]
    hidden |= {"checkpoints": checkpoints | {"../../secret": {"step": 1}, "/etc": {"step": 2}}}
    edit(given / "run.json", **hidden)
    config = given / "config.yaml"
    config.write_text(config.read_text().replace("tracking_uri: null", f"tracking_uri: {stranger.uri}"))
    assert stranger.uri in config.read_text()
    edit(given / "sync.json", uri=stranger.uri, store_run_id="0" * 32, artifact_uri=str(target / "autostart"))
    (given / "evals").mkdir(exist_ok=True)
    command(f"eval knn {given} k=3")
    command(f"sync {given}", code=1)  # our own store is out of reach in these tests
    command(f"pretrain --resume {given} train.limit=2")
    assert stranger.calls == []
    assert not target.exists()
    assert not (workdir.parent / "up").exists()
    assert {path.name for path in workdir.iterdir()} <= {"unpacked", "home", "mlflow.db"}
    record = RunRecord.load(given)
    assert "../../secret" not in record.checkpoints
    assert Path(record.root) == given.parent


@pytest.mark.parametrize("place", ["command.txt", ".run.lock", "evals/private.json", "checkpoints/step-1", "a/b"])
def test_a_run_of_somebody_else_has_no_links_that_lead_out(
    place: str, command: Command, given: Path, workdir: Path
) -> None:
    secret = workdir / "home" / "secret"
    secret.mkdir(parents=True)
    (secret / "key").write_text("mine")
    link = given / place
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(secret if place.endswith("step-1") else secret / "key")
    for line in (f"sync {given}", f"pretrain --resume {given} train.limit=2", f"eval knn {given} k=3"):
        assert "leads out of the run" in command(line, code=2).err
    assert (secret / "key").read_text() == "mine"
    assert [path.name for path in secret.iterdir()] == ["key"]
    link.unlink()
    link.symlink_to(given / "config.yaml")
    assert RunRecord.load(given).moved_from


@pytest.mark.parametrize("root", [".", "", "/proc/self/cwd"])
def test_a_run_of_somebody_else_cannot_pass_for_ones_own(
    root: str, given: Path, stranger: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(given / "run.json", root=root, tracking_uri=stranger.uri)
    monkeypatch.chdir(given.parent)
    assert RunRecord.load(given).tracking_uri != stranger.uri


def test_the_listener_would_notice(command: Command, given: Path, stranger: Listener) -> None:
    command(f"sync {given} --tracking-uri {stranger.uri}", code=1)
    assert stranger.calls


def test_only_the_store_says_where_a_link_is_made(workdir: Path, given: Path) -> None:
    """``sync.json`` may name any place of ours."""
    from sslbench.tracking import sync

    target = workdir / "bin" / "artifacts"
    uri = f"sqlite:///{workdir / 'mlflow.db'}"
    assert sync(given, print, uri).complete
    state = SyncState.load(given)
    state.artifact_uri, state.linked = str(target), False
    state.save(given)
    assert sync(given, print, uri).complete
    assert not os.path.lexists(target)
    assert not target.parent.exists()


@pytest.mark.parametrize("name", ["..", ".", "", "../../x", "a/b", "/etc", ".ssh", "a\0b", "x" * 999, STEERING])
def test_no_name_leads_out_of_its_folder(name: str, tmp_path: Path) -> None:
    made = tmp_path / "root" / file_name(name)
    made.mkdir(parents=True)
    assert made.resolve().parent == tmp_path / "root"
    assert not made.name.startswith(".")
    assert experiment_dir(tmp_path / "root", name).resolve().parent == tmp_path / "root"


def test_relative_paths_that_leave() -> None:
    assert is_inside("checkpoints/step-1")
    assert not [path for path in ("", "/etc", "../x", "a/../../b") if is_inside(path)]


def test_a_name_cannot_steer_a_terminal(command: Command, given: Path) -> None:
    record = json.loads((given / "run.json").read_text())
    tags = record["tags"] | {"sslbench.method": STEERING, "sslbench.dataset": STEERING}
    edit(given / "run.json", name=STEERING, tags=tags, status="FINISHED")
    result = {
        "protocol": STEERING,
        "version": 1,
        "dataset": STEERING,
        "dataset_fingerprint": "f",
        "primary": "top1",
    }
    folder = given / "evals" / "x"
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result | {"metrics": {"top1": 1.0}, "primary": "top1"}))
    edit(given / "run.json", tags=tags | {"sslbench.limited": "false"})
    for line in ("list runs", f"compare {given}"):
        done = command(f"--runs {given.parent} {line}")
        assert "\x1b" not in done.out + done.err
        assert "\u202e" not in done.out + done.err
    assert "[bold red]" in command(f"--runs {given.parent} list runs").out
    error = command(f"eval knn {given} --dataset '{STEERING}'", code=3).err
    assert "\x1b" not in error
    assert "\u202e" not in error


def test_a_screen_shows_what_would_steer(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    screen = Screen(force_terminal=True, color_system="standard", width=200)
    table = Table(STEERING)
    table.add_row(STEERING, style="bold")
    for thing in (STEERING, Text(STEERING, "red"), table):
        screen.print(thing)
    shown = capsys.readouterr().out
    assert "\x1b]" not in shown
    assert "\x1b[31mred" not in shown.replace("\x1b[31m\\x1b", "")
    assert shown.count("\\x1b]0;owned") == shown.count("\\x1b[31mred\\u202egnp") == 4
    assert "[bold red]loud" in shown


def test_printable_leaves_usual_texts_alone() -> None:
    text = "Größe 3 ± 1\n\t“quoted” 漢字 é"
    assert printable(text) == text
    assert printable("a\rb\x9b") == "a\\rb\\x9b"


@pytest.mark.parametrize(
    "content",
    [
        "[" * 100_000,
        "[]",
        "{",
        '{"run_id": "a", "name": 1, "kind": "pretrain"}',
        '{"run_id": "a\'; drop", "name": "x", "kind": "pretrain"}',
        '{"run_id": "a", "name": "x", "kind": "pretrain", "tags": [1]}',
        '{"run_id": "a", "name": "x", "kind": "pretrain", "started": "soon"}',
        '{"run_id": "a", "name": "x", "kind": "pretrain", "checkpoints": [1]}',
        '{"run_id": "a", "name": "x", "kind": "pretrain", "datasets": 7}',
        '{"run_id": "a", "name": "x", "kind": "pretrain", "parent": "/etc"}',
    ],
)
def test_a_damaged_record_hides_no_other_run(content: str, tmp_path: Path) -> None:
    for name, text in (("bad", content), ("good", '{"run_id": "g", "name": "good", "kind": "pretrain"}')):
        folder = tmp_path / "e" / name / "artifacts"
        folder.mkdir(parents=True)
        (folder / "run.json").write_text(text)
    assert [record["name"] for record, _ in pretrained_runs(tmp_path)] == ["good"]
    with pytest.raises(ConfigError, match="damaged"):
        RunRecord.load(tmp_path / "e" / "bad" / "artifacts")


def test_json_has_a_size(tmp_path: Path) -> None:
    with (tmp_path / "big.json").open("wb") as file:
        file.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(ValueError, match="more than"):
        read_json(tmp_path / "big.json")


def test_json_that_is_nested_too_deeply_is_damaged(tmp_path: Path) -> None:
    deep = "[" * 200_000
    folder = tmp_path / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    for file in (folder / "meta.json", folder.parent / "LATEST", tmp_path / "about.json"):
        file.write_text(deep)
    lines: list[str] = []
    with pytest.raises(CheckpointError, match="no intact checkpoint; 1 damaged"):
        checkpoint.latest(tmp_path, lines.append)
    assert "LATEST is damaged" in lines[0]
    journal = Journal(tmp_path / "metrics.jsonl")
    journal.path.write_text(deep + '\n{"step": 1e999, "time": 0, "metrics": {}}\n')
    journal.append(1, {"a": 1.0})
    assert [entry.step for entry in journal.entries()] == [1]
    assert ShardedTable.known_layout(tmp_path) is None
    table = ShardedTable(tmp_path, Layout(1, 1, 1))
    table.path(0).write_text("4 b." + deep)
    with pytest.raises(ValueError, match="too deeply"):
        table.check(0)


@pytest.mark.parametrize("name", ["LATEST", "step-00000001/meta.json"])
def test_what_is_read_of_a_checkpoint_has_a_size(name: str, tmp_path: Path) -> None:
    file = tmp_path / "checkpoints" / name
    file.parent.mkdir(parents=True)
    with file.open("wb") as stream:
        stream.truncate(1 << 40)  # a sparse terabyte
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        checkpoint.latest(tmp_path, print)


def test_a_shared_configuration_imports_and_installs_nothing(
    command: Command, workdir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (workdir / "evil.py").write_text("open('mark', 'w')\nEVIL = 1\n")
    before = set(sys.modules)
    for text in (
        "plugins: [evil.py]",
        "plugin: evil.py",
        "p: evil.py",
        "method: {name: evil}",
        "method: {name: evil.py}",
        "method: {name: './evil.py'}",
        "method: {name: 'evil:EVIL'}",
        "dataset: {name: evil.EVIL}",
        "run: {evals: [evil.py]}",
        "registry: evil.py",
    ):
        (workdir / "shared.yaml").write_text(text)
        (workdir / "runs").mkdir(exist_ok=True)
        method = "" if text.startswith("method") else "--method simclr"
        command(f"config {method} --config shared.yaml", code=_refused(text))
        assert not (workdir / "mark").exists(), text
    assert "evil" not in set(sys.modules) - before
    command("config --method simclr -p evil.py", code=3)  # it offers nothing
    assert (workdir / "mark").exists()  # but named on the command line it is imported


def _refused(text: str) -> int:
    return 2 if text.startswith(("plugin", "p:", "registry")) else 3


def test_a_registry_names_recipes_and_no_code(command: Command, workdir: Path) -> None:
    (workdir / "evil.py").write_text("open('mark', 'w')\n")
    (workdir / "registry.yaml").write_text("version: 1\nrecipes: {}\nplugins: [evil.py]\n")
    assert "plugins" in command("list recipes", code=2).err
    (workdir / "registry.yaml").write_text(
        "version: 1\nrecipes: {x: {summary: s, source: s, config: {method: {name: evil.py}}}}\n"
    )
    command("config --recipe x --backbone conv4 --dataset digits", code=3)
    assert not (workdir / "mark").exists()


def test_a_label_cannot_put_results_elsewhere(command: Command, workdir: Path) -> None:
    make_images(workdir / "photos")
    line = "dataset.label=../../../../out dataset.root=photos --dataset folder"
    command(f"pretrain {METHOD} {line} train.batch_size=8 train.epochs=1 run.evals=[knn] evals.knn.k=1 run.name=x")
    assert not list(workdir.parent.glob("out*"))
    assert list(run_dir("x").glob("evals/*out/knn/result.json"))


def test_a_process_is_told_from_a_later_one_with_its_number() -> None:
    child = subprocess.Popen(["sleep", "60"])
    host, known = socket.gethostname(), identity(child.pid)
    try:
        assert known
        assert not is_gone(child.pid, host, known)
        assert is_gone(child.pid, host, f"{known}0")  # the number was given away again
        assert not is_gone(child.pid, "another-machine", "")
    finally:
        child.kill()
        child.wait()
    assert is_gone(child.pid, host, known)


def test_locks_of_dead_processes_and_lost_machines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without locks what is written in the file has to do."""
    import fcntl

    def unsupported(*_: object) -> None:
        raise OSError(95, "not supported")

    monkeypatch.setattr(fcntl, "lockf", unsupported)
    child = subprocess.Popen(["sleep", "60"])
    host = socket.gethostname()
    alive = f"process {child.pid} on {host} ({identity(child.pid)})"
    try:
        (tmp_path / ".run.lock").write_text(alive)
        with pytest.raises(LaunchError, match=f"in use by process {child.pid} on {host}$"):
            RunLock(tmp_path)
    finally:
        child.kill()
        child.wait()
    RunLock(tmp_path).release()
    (tmp_path / ".run.lock").write_text("process 7 on lost-machine (x)")
    with pytest.raises(LaunchError, match=r"process 7 on lost-machine .another machine"):
        RunLock(tmp_path)
    long_ago = time.time() - 3600
    os.utime(tmp_path / ".run.lock", (long_ago, long_ago))
    RunLock(tmp_path).release()
