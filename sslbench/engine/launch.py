"""Joining the processes that a launcher such as torchrun has started; the first of them records the run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from sslbench import comm
from sslbench.config.schema import TrainOptions
from sslbench.engine.setup import choose_device
from sslbench.errors import LaunchError
from sslbench.tracking import Tracker

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OURS = VARIABLES[:3]


@contextmanager
def joined_world(options: TrainOptions) -> Iterator[bool]:
    """Be one of the processes that torchrun's variables describe; without them, a world of one.

    Yields:
        Whether this process is the one that reports results.

    Raises:
        LaunchError: some of the variables are missing, or the other processes cannot be reached.
    """
    if not _is_launched():
        yield True
        return
    try:
        comm.join(choose_device(options))
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise LaunchError(
            f"process {os.environ['RANK']} of {os.environ['WORLD_SIZE']} could not join the others "
            f"at {address}: {error}",
            hint="check that MASTER_ADDR and MASTER_PORT are those of rank 0 on every node",
        ) from error
    try:
        yield comm.rank() == 0
    finally:
        comm.leave()


def _is_launched() -> bool:
    """Whether a launcher started this process."""
    if not any(name in os.environ for name in _OURS):
        return False
    missing = [name for name in VARIABLES if name not in os.environ]
    if missing:
        given = ", ".join(name for name in VARIABLES if name in os.environ)
        raise LaunchError(
            f"the environment has {given}, but not {', '.join(missing)}: this is only part of a launch",
            hint=f"start with torchrun, which sets all of them, or: unset {' '.join(_OURS)}",
        )
    return True


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
    def checkpoint(self, path: Path, meta: Mapping[str, Any]) -> None: ...
    def checkpoint_removed(self, path: Path) -> None: ...
    def rewind(self, step: int) -> None: ...
    def finish(
        self, status: Literal["FINISHED", "FAILED", "KILLED"], error: Mapping[str, Any] | None = None
    ) -> None: ...


def open_tracker(**arguments: Any) -> Tracker:
    """:meth:`Tracker.open` on the first process of a world; the others get a :class:`Bystander` of its run."""
    tracker = Tracker.open(**arguments) if comm.rank() == 0 else None
    opened = comm.broadcast_object((tracker.run_dir, tracker.run_id, tracker.name) if tracker else None)
    return tracker or Bystander(*opened)
