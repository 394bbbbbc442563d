"""One process makes what several want, and the others wait for it, at a file that any number of them can open."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

Log = Callable[[str], None]


@contextmanager
def locked(path: Path, log: Log, doing: str) -> Iterator[bool]:
    """Wait until no other process holds the lock. It ends with the process.

    Args:
        path: of the lock's file, in a folder that exists.
        doing: what another process does meanwhile, for the log.

    Yields:
        Whether the lock is held; False on a file system without locks.

    Raises:
        OSError: the file cannot be written.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that {doing} ({path.parent})")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


@contextmanager
def locked_if_possible(path: Path, log: Log, doing: str) -> Iterator[None]:
    """The same where nothing breaks without a lock: then several processes do the same work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("a").close()
    except OSError:
        yield
        return
    with locked(path, log, doing):
        yield
