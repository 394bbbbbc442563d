"""What a run directory says about its run (``run.json``) and about its copy in the store (``sync.json``)."""

from __future__ import annotations

import fcntl
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from sslbench.engine.records import Kind, Status, record_problem
from sslbench.errors import ConfigError
from sslbench.tracking.address import resolve_tracking_uri
from sslbench.tracking.owner import is_gone, own_identity
from sslbench.untrusted import is_inside, read_json


@dataclass(frozen=True)
class ParentRef:
    """The pretrained model that an evaluation belongs to."""

    run_id: str
    run_dir: Path


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replace a file in one step, so that readers never meet half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(json.dumps(content, indent=1, default=str) + "\n", encoding="utf-8")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@dataclass
class _JsonFile:
    @classmethod
    def load(cls, run_dir: Path) -> Self:
        """Read the file of a run directory; keys of other versions are passed over."""
        raw = read_json(run_dir / cls.file_name())
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in raw.items() if key in known})

    @classmethod
    def file_name(cls) -> str:
        raise NotImplementedError

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / self.file_name(), asdict(self))


def folder_of_runs(run_dir: Path) -> Path:
    """The folder that a run directory lies in: ``<root>/<experiment>/<run id>/artifacts``, or moved on its own."""
    return run_dir.parents[2] if run_dir.name == "artifacts" and len(run_dir.parents) > 2 else run_dir.parent


def _moved_parent(parent: dict[str, str], old_root: Path, root: Path) -> dict[str, str] | None:
    """The pretrained model of an evaluation, if it was moved along."""
    try:
        run_dir = (root / Path(parent["run_dir"]).relative_to(old_root.resolve())).resolve()
    except ValueError:
        return None
    known = run_dir.is_relative_to(root) and (run_dir / RunRecord.file_name()).is_file()
    return {"run_id": parent["run_id"], "run_dir": str(run_dir)} if known else None


def _is_at(named: str, root: Path) -> bool:
    """Whether a record names this folder of runs, and not whichever one the command happens to run in."""
    path = Path(named)
    return path.is_absolute() and path.parts[1:2] != ("proc",) and path.resolve() == root


def _refuse_links_out(run_dir: Path) -> None:
    """A link in somebody else's run directory may lead to anything of ours: to be sent, or to be written to.

    Raises:
        ConfigError: naming the link.
    """
    for folder, folders, files in os.walk(run_dir):
        for path in (Path(folder, name) for name in (*folders, *files)):
            if path.is_symlink() and not _leads_into(path, run_dir):
                raise ConfigError(f"{path} is a link that leads out of the run", hint="remove it")


def _leads_into(link: Path, folder: Path) -> bool:
    try:
        return link.resolve().is_relative_to(folder)
    except (OSError, RuntimeError):  # links that lead to each other
        return False


@dataclass
class RunRecord(_JsonFile):
    """Everything needed to tell the store about a run. Only the run's own process writes it."""

    run_id: str
    name: str
    kind: Kind
    experiment: str
    root: str
    tracking_uri: str
    command: str
    parent: dict[str, str] | None = None
    params: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    status: Status = "RUNNING"
    started: float = 0.0
    order: float = 0.0
    """When it started, or just behind the run before it, if the clock has been set back since then."""
    ended: float | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    process: str = field(default_factory=own_identity)
    """Tells the process from later ones with the same number."""
    datasets: list[dict[str, str]] = field(default_factory=list)
    plugins: list[dict[str, str]] = field(default_factory=list)
    """Identities of the plugins that took part; of one that was changed before a resume, both."""
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path inside the run directory -> step of the kept checkpoints, oldest first."""
    local_id: str = ""
    """By which every store that gets a copy finds the run again; empty in records of earlier versions."""
    moved_from: str | None = None
    """The folder of runs that the record names, if the run lies in another one now. Never saved."""

    @classmethod
    def file_name(cls) -> str:
        return "run.json"

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / self.file_name(), asdict(self) | {"moved_from": None})

    @classmethod
    def load(cls, run_dir: Path) -> RunRecord:
        """Read ``run.json``.

        A run that was moved, or that comes from somebody else, writes nowhere but below the folder it lies in now,
        and talks to the store of this command, not to the one it names.

        Raises:
            ConfigError: the folder is not a run directory, or its record is damaged.
        """
        try:
            record = super().load(run_dir)
            record._check()
        except FileNotFoundError:
            raise ConfigError(
                f"{run_dir} is not a run directory: it has no run.json",
                hint="sslbench list runs   shows all of them",
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{run_dir / 'run.json'} is damaged: {error}") from None
        record._settle_at(run_dir.resolve())
        return record

    def _check(self) -> None:
        """The types and letters that the rest relies on.

        Raises:
            ValueError: naming what is wrong.
        """
        problem = record_problem(asdict(self))
        if problem is not None:
            raise ValueError(problem)
        self.checkpoints = {path: meta for path, meta in self.checkpoints.items() if is_inside(path)}

    def _settle_at(self, here: Path) -> None:
        """Make the record true for the place where it was found."""
        root = folder_of_runs(here)
        self.moved_from = None if _is_at(self.root, root) else self.root
        if self.moved_from is None:
            return
        _refuse_links_out(here)
        self.root, self.tracking_uri = str(root), resolve_tracking_uri(None)
        if self.parent is not None:
            self.parent = _moved_parent(self.parent, Path(self.moved_from), root)

    def is_abandoned(self) -> bool:
        """Whether it says RUNNING although its process on this machine is gone."""
        return self.status == "RUNNING" and is_gone(self.pid, self.host, self.process)


@dataclass
class SyncState(_JsonFile):
    """What the store has acknowledged."""

    uri: str | None = None
    """Address of the store that all this is about."""
    store_run_id: str | None = None
    experiment_id: str | None = None
    artifact_uri: str | None = None
    linked: bool = False
    """Whether the store's artifact folder is the run directory."""
    offset: int = 0
    """Journal bytes that the store has."""
    sending: int = 0
    """Journal bytes that it may have: the end of the last round that was begun."""
    resent: dict[str, int] = field(default_factory=dict)
    """Metric -> last step the store got before the journal was cut back: those points are not sent again."""
    doubtful: dict[str, int] = field(default_factory=dict)
    """Metric -> last step of a round that was begun before the journal was cut back: the store has to be asked."""
    params: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: int = 0
    models: dict[str, str] = field(default_factory=dict)
    """Checkpoint -> id of its LoggedModel."""
    creating: str | None = None
    """The checkpoint whose LoggedModel was begun: the store may have it although its answer was lost."""
    used_model: str | None = None
    """The LoggedModel that this evaluation read."""
    uploaded: dict[str, float] = field(default_factory=dict)
    """File -> its modification time when a remote store got a copy."""
    status: str | None = None
    ended: float | None = None
    """With that status: a run that was finished, resumed and finished again has another end."""

    @classmethod
    def file_name(cls) -> str:
        return "sync.json"

    def forget(self) -> None:
        """Nothing has been acknowledged: this is about another store now."""
        fresh = SyncState()
        for known in fields(self):
            setattr(self, known.name, getattr(fresh, known.name))

    @classmethod
    def load(cls, run_dir: Path) -> SyncState:
        """Read ``sync.json``; without one nothing has been acknowledged."""
        try:
            return super().load(run_dir)
        except FileNotFoundError:
            return cls()
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{run_dir / cls.file_name()} is damaged: {error}") from None


@contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Exclude other threads and processes on this machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def edit_sync_state(run_dir: Path) -> Iterator[SyncState]:
    """Load, lock and save what the store has acknowledged."""
    with file_lock(run_dir / ".sync.lock"):
        state = SyncState.load(run_dir)
        try:
            yield state
        finally:
            state.save(run_dir)


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """``{"optim": {"lr": 0.1}}`` to ``{"optim.lr": "0.1"}``; lists and empty mappings become JSON."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = _plain(value)
    return flat


def _plain(value: Any) -> str:
    if isinstance(value, list | tuple | Mapping):
        return json.dumps(value, default=str)
    return str(value)


Log = Callable[[str], None]
