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
from typing import Any, Literal, Self

from sslbench.errors import ConfigError, LaunchError

Kind = Literal["pretrain", "eval", "import"]
Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]


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
        raw = json.loads((run_dir / cls.file_name()).read_text())
        known = {f.name for f in fields(cls)}
        return cls(**{key: value for key, value in raw.items() if key in known})

    @classmethod
    def file_name(cls) -> str:
        raise NotImplementedError

    def save(self, run_dir: Path) -> None:
        write_json(run_dir / self.file_name(), asdict(self))


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
    ended: float | None = None
    host: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    datasets: list[dict[str, str]] = field(default_factory=list)
    checkpoints: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Path inside the run directory -> meta of the kept checkpoints, oldest first."""

    @classmethod
    def file_name(cls) -> str:
        return "run.json"

    @classmethod
    def load(cls, run_dir: Path) -> RunRecord:
        """Read ``run.json``.

        Raises:
            ConfigError: the folder is not a run directory, or its record is damaged.
        """
        try:
            return super().load(run_dir)
        except FileNotFoundError:
            raise ConfigError(
                f"{run_dir} is not a run directory: it has no run.json",
                hint="sslbench list runs   shows all of them",
            ) from None
        except (ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{run_dir / 'run.json'} is damaged: {error}") from None

    def is_abandoned(self) -> bool:
        """Whether it says RUNNING although its process on this machine is gone."""
        if self.status != "RUNNING" or self.host != socket.gethostname():
            return False
        try:
            os.kill(self.pid, 0)
        except ProcessLookupError:
            return True
        except PermissionError:
            return False
        return False


@dataclass
class SyncState(_JsonFile):
    """What the store has acknowledged."""

    store_run_id: str | None = None
    experiment_id: str | None = None
    artifact_uri: str | None = None
    linked: bool = False
    """Whether the store's artifact folder is the run directory."""
    offset: int = 0
    """Journal bytes that the store has."""
    resent: dict[str, int] = field(default_factory=dict)
    """Metric -> last step the store got before the journal was cut back: those points are not sent again."""
    params: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    datasets: int = 0
    models: dict[str, str] = field(default_factory=dict)
    """Checkpoint -> id of its LoggedModel."""
    used_model: str | None = None
    """The LoggedModel that this evaluation read."""
    uploaded: dict[str, float] = field(default_factory=dict)
    """File -> its modification time when a remote store got a copy."""
    status: str | None = None

    @classmethod
    def file_name(cls) -> str:
        return "sync.json"

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


class RunLock:
    """Held by the process that works on a run, so that a second one is refused. Ends with the process.

    Raises:
        LaunchError: another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / ".run.lock").open("a+")
        try:
            # Not flock: decoding processes would inherit it and hold on to it when this process is killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            self._file.seek(0)
            owner = self._file.read().strip() or "another process"
            raise LaunchError(
                f"{run_dir} is in use by {owner}", hint="wait until it ends, or stop it first; then try again"
            ) from None
        except OSError:
            return  # a file system without locks
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._file.flush()

    def release(self) -> None:
        """Let others work on the run."""
        self._file.close()


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
