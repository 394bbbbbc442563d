"""Bring the store up to date with a run directory. Running it again continues where it stopped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from sslbench.tracking.address import local_path
from sslbench.tracking.journal import Entry, Journal
from sslbench.tracking.note import note
from sslbench.tracking.record import RunRecord, SyncState, edit_sync_state
from sslbench.tracking.store import ORIGIN, Point, RejectedError, Store
from sslbench.untrusted import file_name, read_json

JOURNAL = "metrics.jsonl"
#: Files at the top of a run directory that a remote store gets a copy of.
SMALL_FILES = ("config.yaml", "environment.yaml", "command.txt", JOURNAL, "run.json", "error.json")
META = "meta.json"
MODEL_FILES = ("backbone.pt", META)
_ENTRIES_PER_ROUND = 200


@dataclass
class SyncReport:
    """What a synchronisation did."""

    run_id: str
    name: str
    points: int = 0
    """Metric values sent."""
    refused: list[str] = field(default_factory=list)
    """What the store refused, in words."""
    notes: list[str] = field(default_factory=list)
    """What works in part only, and how to repair it."""
    error: str | None = None
    """Why the store has not got everything; None if it has."""
    children: list[SyncReport] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether the store has everything, evaluations included."""
        return self.error is None and all(child.complete for child in self.children)


class Push:
    """One pass over a run directory: whatever ``sync.json`` does not list as acknowledged is sent.

    Raises:
        StoreError: the store went away. Everything acknowledged so far stays acknowledged.
        RejectedError: the store refused the run itself or its metrics.
    """

    def __init__(self, run_dir: Path, store: Store, report: SyncReport | None = None) -> None:
        self.run_dir = run_dir
        self.store = store
        self.record = RunRecord.load(run_dir)
        self.report = report or SyncReport(self.record.run_id, self.record.name)

    def everything(self) -> None:
        """Send all that is missing."""
        with edit_sync_state(self.run_dir) as state:
            self.state = state
            self._recognise()
            run_id = self._run()
            self._reopen(run_id)
            self._optional("parameters", lambda: self._params(run_id))
            self._optional("data sets", lambda: self._datasets(run_id))
            self._optional("checkpoints", lambda: self._models(run_id))
            self._metrics(run_id)
            self._optional("tags", lambda: self._tags(run_id))
            if self.record.status != "RUNNING":
                self._optional("files", lambda: self._files(run_id))
                self._close(run_id)

    def _optional(self, what: str, send: Callable[[], None]) -> None:
        """What the store refuses must not hold up the rest."""
        try:
            send()
        except RejectedError as error:
            self.report.refused.append(f"{what}: {error}")

    def _recognise(self) -> None:
        """Find out whether this store is the one that the state is about.

        It may be under another address, as after a move, or be another one that has yet to get everything.
        """
        state, uri = self.state, self.store.uri
        if state.uri == uri:
            return
        place = self.store.artifact_uri(state.store_run_id) if state.store_run_id else None
        if place is None:
            state.forget()
        state.uri, state.artifact_uri = uri, place
        folder = local_path(place)
        # Where the files were before: a link at that place is for the user to make.
        state.linked = folder is not None and folder.resolve() != self.run_dir.resolve()
        state.save(self.run_dir)

    def _run(self) -> str:
        if self.state.store_run_id is None:
            self._create_run()
        if not self.state.linked:
            self._link()
        self._check_link()
        return self.state.store_run_id or ""

    def _create_run(self) -> None:
        record, state = self.record, self.state
        location = experiment_dir(Path(record.root), record.experiment)
        state.experiment_id = self.store.experiment(record.experiment, location)
        found = self._known_run(state.experiment_id)
        if found is None:
            local_id = record.local_id or record.run_id
            tags = record.tags | self._parent_tag() | {"sslbench.local_id": local_id}
            found = self.store.create_run(state.experiment_id, record.name, tags, record.started)
        state.store_run_id, state.artifact_uri = found
        state.save(self.run_dir)

    def _known_run(self, experiment_id: str) -> tuple[str, str] | None:
        """The run, if this store got it before it was recorded in another one."""
        record = self.record
        found = self.store.find_run(experiment_id, record.local_id or record.run_id)
        if found is not None or record.local_id:
            return found
        # Earlier versions kept only the id that the first store gave it.
        place = self.store.artifact_uri(record.run_id)
        return None if place is None else (record.run_id, place)

    def _parent_tag(self) -> dict[str, str]:
        if self.record.parent is None:
            return {}
        parent_dir = Path(self.record.parent["run_dir"])
        if SyncState.load(parent_dir).store_run_id is None:
            Push(parent_dir, self.store).everything()
        return {"mlflow.parentRunId": SyncState.load(parent_dir).store_run_id or ""}

    def _link(self) -> None:
        """Make the store's artifact folder lead to the run directory, if it is on this machine.

        Only the store says where that is: ``sync.json`` may come from somebody else.
        """
        if local_path(self.state.artifact_uri) is None:
            return
        self.state.artifact_uri = self.store.artifact_uri(self.state.store_run_id or "")
        folder = local_path(self.state.artifact_uri)
        if folder is None:
            return
        # A folder of runs that is gone was moved, or its disk is not mounted: it is not made anew.
        if folder.resolve() != self.run_dir.resolve() and folder.parents[2].exists():
            with suppress(OSError):  # told below
                folder.parent.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):
                    folder.rmdir()  # MLflow may have made an empty one
                folder.symlink_to(os.path.relpath(self.run_dir.resolve(), folder.parent.resolve()))
        self.state.linked = True

    def _check_link(self) -> None:
        """Say so if MLflow looks for the files where they are not."""
        folder = local_path(self.state.artifact_uri) if self.state.linked else None
        if folder is None or folder.resolve() == self.run_dir:
            return
        old, new = self._moved_folder(folder)
        repair = f"ln -s {shlex.quote(str(new))} {shlex.quote(str(old))}"
        if os.path.lexists(old):
            repair = f"if what is there is a copy that nobody needs, remove it; then {repair}"
        self.report.notes.append(f"MLflow looks for its files in {folder}; to see them there: {repair}")

    def _moved_folder(self, folder: Path) -> tuple[Path, Path]:
        """What a link has to stand in for: the whole folder of runs if it is gone, else this run's."""
        old, new = folder.parent.parent.parent, self.run_dir.parent.parent.parent
        same_below = folder.parts[-3:] == self.run_dir.parts[-3:] and folder.name == "artifacts"
        return (old, new) if same_below and not os.path.lexists(old) else (folder, self.run_dir)

    def _reopen(self, run_id: str) -> None:
        if self.record.status == "RUNNING" and self.state.status not in (None, "RUNNING"):
            self.store.set_status(run_id, "RUNNING", None)
            self.state.status, self.state.ended = "RUNNING", None

    def _params(self, run_id: str) -> None:
        new = {key: value for key, value in self.record.params.items() if key not in self.state.params}
        if new:
            self.store.log_params(run_id, new)
            self.state.params += list(new)

    def _datasets(self, run_id: str) -> None:
        for dataset in self.record.datasets[self.state.datasets :]:
            self.store.log_dataset(run_id, dataset["name"], dataset["digest"], dataset["context"])
            self.state.datasets += 1

    def _metrics(self, run_id: str) -> None:
        self._resolve_doubts(run_id)
        while self._send_points(run_id):
            pass

    def _resolve_doubts(self, run_id: str) -> None:
        """Ask for the points of a round that a killed process had begun, before they were written anew.

        MLflow keeps a point that it gets twice only once, but the new ones have other times: it would keep both.
        """
        for key, step in list(self.state.doubtful.items()):
            last = self.store.last_step(run_id, key)
            if last is not None:
                self.state.resent[key] = max(min(last, step), self.state.resent.get(key, -1))
            del self.state.doubtful[key]

    def _send_points(self, run_id: str) -> bool:
        """One round; False if there was nothing left."""
        journal = Journal(self.run_dir / JOURNAL)
        entries = list(islice(journal.entries(self.state.offset), _ENTRIES_PER_ROUND))
        if not entries:
            return False
        self.state.sending = entries[-1].end
        self.state.save(self.run_dir)
        points = [point for entry in entries for point in self._points(entry)]
        self.store.log_points(run_id, points)
        self.report.points += len(points)
        self.state.offset = entries[-1].end
        self.state.save(self.run_dir)
        return True

    def _points(self, entry: Entry) -> Iterator[Point]:
        model_id = self._newest_model() if entry.headline else None
        for key, value in entry.metrics.items():
            if entry.step > self.state.resent.get(key, -1):
                yield Point(key, value, entry.step, entry.time, model_id)

    def _newest_model(self) -> str | None:
        models = self.state.models
        return next((models[path] for path in reversed(self.record.checkpoints) if path in models), None)

    def _models(self, run_id: str) -> None:
        self._finish_creation()
        for path in [path for path in self.state.models if path not in self.record.checkpoints]:
            self._delete_model(path)
        for path in sorted(self.record.checkpoints, key=lambda path: path != self.state.creating):
            if path not in self.state.models and (self.run_dir / path / META).is_file():
                self._create_model(run_id, path)
        if self.record.parent is not None and self.state.used_model is None:
            self._use_parent_model(run_id)

    def _finish_creation(self) -> None:
        """Know the LoggedModel that was being made when the process ended, before another one is begun.

        Its checkpoint may be gone by now, and the record may not know that yet.
        """
        path = self.state.creating
        if path is None or (path in self.record.checkpoints and (self.run_dir / path / META).is_file()):
            return
        found = self.store.find_model(self.state.experiment_id or "", self._origin(path))
        if found is not None:
            self.state.models[path] = found[0]
        self.state.creating = None

    def _origin(self, path: str) -> str:
        plain = re.sub(r"[^\w./-]", "_", path)
        return f"{self.record.run_id}:{plain}"

    def _create_model(self, run_id: str, path: str) -> None:
        try:
            meta = self.record.checkpoints[path] | read_json(self.run_dir / path / META)
            step = int(meta.get("step", 0))
        except (OSError, ValueError, TypeError) as error:
            self.report.notes.append(f"checkpoint {path} is not in MLflow: {META} cannot be read ({error})")
            return
        params = {key: str(value) for key, value in meta.items() if isinstance(value, str | int | float)}
        params |= {
            key: self.record.tags[f"sslbench.{key}"]
            for key in ("method", "dataset", "seed")
            if f"sslbench.{key}" in self.record.tags
        }
        origin = self._origin(path)
        tags = {"sslbench.checkpoint": str(self.run_dir / path), "sslbench.run": self.record.name, ORIGIN: origin}
        name = f"{self._short_name()}-step{step}"
        experiment_id = self.state.experiment_id or ""
        begun = self.store.find_model(experiment_id, origin)
        self.state.creating = path
        self.state.save(self.run_dir)
        model_id, location = begun or self.store.create_model(experiment_id, run_id, name, step, params, tags)
        self._model_files(model_id, location, self.run_dir / path)
        self.store.finalize_model(model_id)
        self.state.models[path], self.state.creating = model_id, None

    def _short_name(self) -> str:
        """Method and seed: lists of models cut names after 20 letters."""
        method, seed = (self.record.tags.get(f"sslbench.{key}") for key in ("method", "seed"))
        return f"{method}-s{seed}" if method and seed else self.record.name

    def _model_files(self, model_id: str, location: str, checkpoint: Path) -> None:
        folder = self._moved_along(local_path(location))
        for file in (checkpoint / name for name in MODEL_FILES):
            if not file.exists() or not self._is_own(file):
                continue
            if folder is None:
                self.store.upload_to_model(model_id, file)
            else:
                _same_file(file, folder / file.name)

    def _moved_along(self, folder: Path | None) -> Path | None:
        """``<root>/<experiment>/models/<id>/artifacts``, below the folder of runs where it is now."""
        if folder is None or len(folder.parents) < 4 or folder.parents[3].exists():
            return folder
        return Path(self.record.root) / folder.relative_to(folder.parents[3])

    def _delete_model(self, path: str) -> None:
        folder = self._moved_along(self.store.delete_model(self.state.models[path]))
        del self.state.models[path]
        if folder is not None:
            for name in MODEL_FILES:
                (folder / name).unlink(missing_ok=True)

    def _use_parent_model(self, run_id: str) -> None:
        parent_dir = Path((self.record.parent or {})["run_dir"])
        models = SyncState.load(parent_dir).models
        newest = [models[path] for path in RunRecord.load(parent_dir).checkpoints if path in models]
        if newest:
            self.store.use_model(run_id, newest[-1])
            self.state.used_model = newest[-1]

    def _tags(self, run_id: str) -> None:
        wanted = self.record.tags | {"mlflow.note.content": note(self.record, self.run_dir)}
        changed = {key: value for key, value in wanted.items() if self.state.tags.get(key) != value}
        if changed:
            self.store.set_tags(run_id, changed)
            self.state.tags |= changed

    def _files(self, run_id: str) -> None:
        if self.state.linked:
            return
        for file in self._files_to_upload():
            name = str(file.relative_to(self.run_dir))
            changed = file.stat().st_mtime
            if self.state.uploaded.get(name) != changed:
                self.store.upload(run_id, file, str(Path(name).parent) if "/" in name else None)
                self.state.uploaded[name] = changed

    def _files_to_upload(self) -> list[Path]:
        results = sorted((self.run_dir / "evals").rglob("*.json"))
        files = [self.run_dir / name for name in SMALL_FILES if (self.run_dir / name).exists()] + results
        return [file for file in files if self._is_own(file)]

    def _is_own(self, file: Path) -> bool:
        """Whether it is in the run directory: a link in somebody else's may lead to anything of ours."""
        return file.resolve().is_relative_to(self.run_dir.resolve())

    def _close(self, run_id: str) -> None:
        final = (self.record.status, self.record.ended)
        if (self.state.status, self.state.ended) != final:
            self.store.set_status(run_id, *final)
            self.state.status, self.state.ended = final


def experiment_dir(root: Path, experiment: str) -> Path:
    """Folder of an experiment's runs; the artifact location of experiments that sslbench creates."""
    return root / file_name(re.sub(r"[^\w.-]+", "-", experiment))


def _same_file(source: Path, target: Path) -> None:
    """A hard link, or a copy on another file system."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
