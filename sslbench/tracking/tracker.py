"""The tracker of one run: files first, the store in the background."""

from __future__ import annotations

import os
import shlex
import socket
import traceback
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from sslbench.engine.records import Kind
from sslbench.errors import ExitCode, PreemptedError, StopNow
from sslbench.tracking.address import resolve_tracking_uri
from sslbench.tracking.clock import now
from sslbench.tracking.environment import command_line, git_commit, user_name
from sslbench.tracking.facts import command_text, write_facts
from sslbench.tracking.journal import Journal
from sslbench.tracking.order import place_behind
from sslbench.tracking.owner import RunLock, own_identity
from sslbench.tracking.plugins import Identities, changed, new_ones, plugin_tags
from sslbench.tracking.push import JOURNAL, experiment_dir
from sslbench.tracking.record import (
    Log,
    ParentRef,
    RunRecord,
    SyncState,
    edit_sync_state,
    flatten,
    write_json,
)
from sslbench.tracking.sender import Sender
from sslbench.tracking.store import RejectedError, Store, StoreError, connect
from sslbench.untrusted import file_name

_FLUSH_LIMIT_S = 10.0


class Tracker:
    """Records one run. Nothing but a full or read-only disk can make it fail.

    The run directory holds the truth; a background thread copies it to the MLflow store. What the store has not
    acknowledged when the run ends is sent by :func:`sslbench.tracking.sync`.
    """

    def __init__(
        self, run_dir: Path, record: RunRecord, log: Log, store: Store | None, *, told: bool = False
    ) -> None:
        self.run_dir = run_dir
        self._record = record
        self._lock = RunLock(run_dir)
        self._journal = Journal(run_dir / JOURNAL)
        self._log = log
        self._sender = Sender(run_dir, record.tracking_uri, log, store, told=told)

    @classmethod
    def open(
        cls,
        *,
        root: Path,
        name: str,
        kind: Kind,
        experiment: str,
        tracking_uri: str | None,
        parent: ParentRef | None,
        params: Mapping[str, Any],
        tags: Mapping[str, str],
        log: Log,
        plugins: Identities = (),
        resume: Path | None = None,
    ) -> Tracker:
        """Start a run, or continue the one in ``resume``.

        Args:
            root: folder of all runs. The run directory is ``<root>/<experiment>/<run id>/artifacts``, which is
                also the run's artifact folder in MLflow; ``<root>/<name>`` is a link to it.
            params: the configuration as a nested tree; written to ``config.yaml``, flattened for MLflow.
            tags: ``method``, ``backbone``, ``dataset``, ``seed``, ... are stored as ``sslbench.<key>``; keys
                with a dot as they are.
            log: takes the one line that says why the store is out of reach.
            plugins: identities of all that takes part, for ``run.json``, ``environment.yaml`` and tags.
        """
        if resume is not None:
            return cls._resume(resume.resolve(), log, plugins)
        root = root.absolute()
        root.mkdir(parents=True, exist_ok=True)
        name, started, local_id = _free_name(root, name), now(), uuid.uuid4().hex
        record = RunRecord(
            run_id=local_id,
            local_id=local_id,
            name=name,
            kind=kind,
            experiment=experiment,
            root=str(root),
            tracking_uri=resolve_tracking_uri(tracking_uri),
            command=command_line(),
            parent={"run_id": parent.run_id, "run_dir": str(parent.run_dir.resolve())} if parent else None,
            params=flatten(params),
            tags=_all_tags(kind, name, tags) | plugin_tags(plugins),
            plugins=new_ones((), plugins),
            started=started,
            order=place_behind(root, started),
        )
        store, state = _announce(record, log)
        run_dir = experiment_dir(root, experiment) / record.run_id / "artifacts"
        run_dir.mkdir(parents=True)
        write_facts(run_dir, params, plugins)
        record.save(run_dir)
        state.save(run_dir)
        _link(root, record, run_dir)
        return cls(run_dir, record, log, store, told=state.store_run_id is None)

    @classmethod
    def _resume(cls, run_dir: Path, log: Log, plugins: Identities) -> Tracker:
        record = RunRecord.load(run_dir)
        if record.moved_from:
            log(f"the run was in {record.moved_from}; from now on it is recorded in {record.tracking_uri}")
        # The sender connects by itself: nobody needs to wait for the store here.
        tracker = cls(run_dir, record, log, None)
        record = tracker._record = RunRecord.load(run_dir)  # until it had the lock, others could change it
        record.status, record.ended = "RUNNING", None
        record.pid, record.host, record.process = os.getpid(), socket.gethostname(), own_identity()
        for sentence in changed(record.plugins, plugins):
            log(sentence)
        record.plugins += new_ones(record.plugins, plugins)
        record.tags |= plugin_tags(plugins)
        record.save(run_dir)
        with (run_dir / "command.txt").open("a") as file:
            file.write(command_text())
        return tracker

    @property
    def run_id(self) -> str:
        """Id of the run; MLflow's own if the store could be reached when the run started."""
        return self._record.run_id

    @property
    def name(self) -> str:
        """The run's name."""
        return self._record.name

    @property
    def synced(self) -> bool:
        """Whether the store has acknowledged everything so far."""
        return self._sender.idle()

    def ref(self) -> ParentRef:
        """This run as the parent of an evaluation."""
        return ParentRef(self.run_id, self.run_dir)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write a point of the curves. Costs a line in a file (well below 1 ms), whatever the store does."""
        self._journal.append(step, metrics)
        self._sender.wake()

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Write results of the whole run."""
        self._journal.append(self._journal.last_step(), metrics, headline=True)
        self._sender.wake()

    def dataset(self, name: str, digest: str, context: str) -> None:
        """Record the identity of data the run reads; ``context`` is what for, such as ``train``."""
        entry = {"name": name, "digest": digest, "context": context}
        if entry not in self._record.datasets:
            self._record.datasets.append(entry)
            self._save()

    def tag(self, tags: Mapping[str, str]) -> None:
        """Set tags of the run."""
        self._record.tags |= tags
        self._save()

    def plugins(self, plugins: Identities) -> None:
        """Replace what is known of plugins, such as of an extension that has failed meanwhile."""
        names = {(plugin["kind"], plugin["name"]) for plugin in plugins}
        kept = [plugin for plugin in self._record.plugins if (plugin["kind"], plugin["name"]) not in names]
        self._record.plugins = [*kept, *new_ones((), plugins)]
        self.tag(plugin_tags(plugins))

    def checkpoint(self, path: Path, meta: Mapping[str, Any]) -> None:
        """Register a kept checkpoint (a folder with ``backbone.pt`` and ``meta.json``) as a LoggedModel."""
        # The rest is in meta.json: with thousands of checkpoints the record would take seconds to write.
        self._record.checkpoints[self._relative(path)] = {"step": int(meta.get("step", 0))}
        self._save()

    def checkpoint_removed(self, path: Path) -> None:
        """Forget a checkpoint that was deleted."""
        if self._record.checkpoints.pop(self._relative(path), None) is not None:
            self._save()

    def reconcile(self, on_disk: Mapping[Path, int], done: int) -> list[Path]:
        """Make the record agree with the disk: a process that was killed may not have told of its last checkpoint.

        Args:
            on_disk: folder -> step of each complete checkpoint, oldest first.
            done: steps after which the run goes on; a later checkpoint that nobody has told of is written again.

        Returns:
            The folders that the record did not have.
        """
        known = self._record.checkpoints
        names = {self._relative(path): step for path, step in on_disk.items()}
        kept = {n: known.get(n, {"step": step}) for n, step in names.items() if n in known or step <= done}
        if list(kept.items()) != list(known.items()):
            self._record.checkpoints = kept
            self._save()
        return [path for path in on_disk if self._relative(path) in kept.keys() - known.keys()]

    def rewind(self, step: int) -> None:
        """Drop metrics beyond a step: a resumed run writes them again, and the store does not get them twice."""
        entries = list(self._journal.entries())
        with edit_sync_state(self.run_dir) as state:
            sent = [entry for entry in entries if entry.end <= state.offset]
            for entry in sent:
                if entry.step > step:
                    state.resent |= {key: max(entry.step, state.resent.get(key, -1)) for key in entry.metrics}
            for entry in entries:
                if state.offset < entry.end <= state.sending and entry.step > step:
                    state.doubtful |= {key: max(entry.step, state.doubtful.get(key, -1)) for key in entry.metrics}
            # Before the cut: nobody could tell afterwards what the store has. Offsets mean other lines then, so a
            # kill in between makes the sender begin anew: the store keeps a point that it gets twice only once.
            state.offset = state.sending = 0
            state.save(self.run_dir)
            self._journal.truncate_after(step)
            ends = [0, *(entry.end for entry in self._journal.entries())]
            state.offset = ends[sum(entry.step <= step for entry in sent)]

    def finish(
        self, status: Literal["FINISHED", "FAILED", "KILLED"], error: Mapping[str, Any] | None = None
    ) -> None:
        """Close the run with a final status, waiting up to 10 s for the store."""
        if error is not None:
            with suppress(OSError):  # a full disk: the status below may still fit
                write_json(self.run_dir / "error.json", error)
        self._record.status, self._record.ended = status, max(now(), self._journal.last_time())
        self._save()
        self._sender.stop(_FLUSH_LIMIT_S)
        self._lock.release()
        if not self.synced:
            self._log(_incomplete(self._record.tracking_uri, self.run_dir))

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Give the run its final status, whatever happens inside."""
        try:
            yield
        except BaseException as error:
            stopped = isinstance(error, KeyboardInterrupt | PreemptedError | StopNow)
            with suppress(OSError):  # the error itself says that the disk is full
                known = error.error if isinstance(error, StopNow) else error
                self.finish("KILLED" if stopped else "FAILED", _error_record(known))
            error.add_note(f"details: {self.run_dir / 'error.json'}")
            raise
        self.finish("FINISHED")

    def _save(self) -> None:
        self._record.save(self.run_dir)
        self._sender.wake()

    def _relative(self, path: Path) -> str:
        return str(path.resolve().relative_to(self.run_dir.resolve()))


def headline(run_dir: Path, metrics: Mapping[str, float], *, log: Log, step: int | None = None) -> None:
    """Write results on a finished run, such as those of an evaluation on its pretrained model.

    They reach the model's run and its newest LoggedModel, waiting up to 10 s for the store.

    Args:
        metrics: ``eval/<protocol>.v<n>/<dataset>/<metric>`` -> value
        step: step of the checkpoint that was evaluated; unset: the last one of the run.
    """
    journal = Journal(run_dir / JOURNAL)
    step = journal.last_step() if step is None else step
    known = {
        (key, entry.step): value
        for entry in journal.entries()
        if entry.headline
        for key, value in entry.metrics.items()
    }
    if any(known.get((key, step)) != value for key, value in metrics.items()):
        journal.append(step, metrics, headline=True)
    uri = RunRecord.load(run_dir).tracking_uri
    sender = Sender(run_dir, uri, log, None)
    sender.stop(_FLUSH_LIMIT_S)
    if not sender.idle():
        log(_incomplete(uri, run_dir))


def describe_experiment(run_dir: Path, text: str, *, log: Log) -> None:
    """Show a Markdown text above the runs of the experiment that a run belongs to."""
    record = RunRecord.load(run_dir)
    store = _connect(record.tracking_uri, log)
    if store is None:
        return
    try:
        store.describe_experiment(record.experiment, text)
    except (StoreError, RejectedError) as error:
        log(f"the overview of experiment '{record.experiment}' was not updated: {error}")


def _announce(record: RunRecord, log: Log) -> tuple[Store | None, SyncState]:
    """Create the run in the store and take over its id; without a store the local id stays."""
    state = SyncState()
    store = _connect(record.tracking_uri, log)
    if store is None:
        return None, state
    try:
        location = experiment_dir(Path(record.root), record.experiment)
        state.experiment_id = store.experiment(record.experiment, location)
        parent_tag = _parent_tag(record)
        tags = record.tags | parent_tag | {"sslbench.local_id": record.local_id}
        run_id, uri = store.create_run(state.experiment_id, record.name, tags, record.started)
    except (StoreError, RejectedError) as error:
        log(_out_of_reach(record.tracking_uri, error))
        return store, SyncState()
    record.run_id = state.store_run_id = run_id
    state.uri, state.artifact_uri = record.tracking_uri, uri
    state.tags = dict(record.tags)
    return store, state


def _parent_tag(record: RunRecord) -> dict[str, str]:
    parent = SyncState.load(Path(record.parent["run_dir"])) if record.parent else SyncState()
    return {"mlflow.parentRunId": parent.store_run_id} if parent.store_run_id else {}


def _connect(uri: str, log: Log) -> Store | None:
    try:
        return connect(uri)
    except (StoreError, RejectedError) as error:
        if not getattr(error, "repeated", False):
            log(_out_of_reach(uri, error))
        return None


def _incomplete(uri: str, run_dir: Path) -> str:
    return (
        f"MLflow store {uri} has not got all of this run; nothing is lost. "
        f"Complete it with: sslbench sync {shlex.quote(str(run_dir))}"
    )


def _out_of_reach(uri: str, error: Exception) -> str:
    return (
        f"MLflow store {uri} is out of reach ({error}). The run goes on and keeps everything in its folder; "
        "complete the store later with: sslbench sync RUN"
    )


def _all_tags(kind: Kind, name: str, tags: Mapping[str, str]) -> dict[str, str]:
    ours = {key if "." in key else f"sslbench.{key}": str(value) for key, value in tags.items()}
    basic = {
        "mlflow.runName": name,
        "mlflow.user": user_name(),
        "mlflow.source.name": " ".join(command_line().split()[:2]),
        "mlflow.source.type": "LOCAL",
        "sslbench.kind": kind,
    }
    commit = git_commit(Path.cwd())
    return basic | ({"mlflow.source.git.commit": commit["commit"]} if commit else {}) | ours


def _error_record(error: BaseException) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "hint": getattr(error, "hint", None),
        "exit_code": int(getattr(error, "exit_code", ExitCode.UNEXPECTED)),
        "traceback": traceback.format_exception(error),
    }


def _link(root: Path, record: RunRecord, run_dir: Path) -> None:
    """``<root>/<name>`` -> run directory."""
    while True:
        try:
            (root / record.name).symlink_to(os.path.relpath(run_dir, root))
        except FileExistsError:  # a run of the same name was faster
            record.name = record.tags["mlflow.runName"] = _free_name(root, record.name)
            record.save(run_dir)
        else:
            return


def _free_name(root: Path, name: str) -> str:
    """The name, with a number if a run or a folder has it already: a name stands for one run."""
    safe = file_name(name)
    taken = (safe, *(f"{safe}-{number}" for number in range(2, 10_000)))
    return next(candidate for candidate in taken if not os.path.lexists(root / candidate))
