"""The first process of a world records the run; the others train along."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from sslbench import comm
from sslbench.tracking import Tracker
from sslbench.tracking.plugins import Identities


class Bystander(Tracker):
    """What a process has that trains along without recording: another one has the tracker of its run."""

    def __init__(self, run_dir: Path, run_id: str, name: str) -> None:
        self.run_dir = run_dir
        self._id = run_id
        self._name = name

    @property
    def run_id(self) -> str:
        return self._id

    @property
    def name(self) -> str:
        return self._name

    def log(self, step: int, metrics: Mapping[str, float]) -> None: ...
    def summary(self, metrics: Mapping[str, float]) -> None: ...
    def dataset(self, name: str, digest: str, context: str) -> None: ...
    def plugins(self, plugins: Identities) -> None: ...
    def checkpoint(self, path: Path, meta: Mapping[str, Any]) -> None: ...
    def checkpoint_removed(self, path: Path) -> None: ...
    def reconcile(self, on_disk: Mapping[Path, int], done: int) -> list[Path]:
        return []

    def rewind(self, step: int) -> None: ...
    def finish(
        self, status: Literal["FINISHED", "FAILED", "KILLED"], error: Mapping[str, Any] | None = None
    ) -> None: ...


def open_tracker(**arguments: Any) -> Tracker:
    """:meth:`Tracker.open` on the first process of a world; the others get a :class:`Bystander` of its run."""
    tracker = Tracker.open(**arguments) if comm.rank() == 0 else None
    opened = comm.broadcast_object((tracker.run_dir, tracker.run_id, tracker.name) if tracker else None)
    return tracker or Bystander(*opened)
