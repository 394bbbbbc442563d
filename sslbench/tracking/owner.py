"""Which process a run belongs to, and whether it is still there."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import time
from pathlib import Path
from typing import IO

from sslbench.errors import LaunchError

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_START_FIELD = 19
"""Of ``/proc/PID/stat`` behind the name: the start time in ticks since the machine started."""
_FRESH_S = 600.0


def identity(pid: int) -> str:
    """What no other process shares, also not a later one with the same number; empty where nobody can tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
        return f"{_BOOT.read_text().strip()}:{stat.rpartition(')')[2].split()[_START_FIELD]}"
    except (OSError, IndexError):
        return ""


def own_identity() -> str:
    """Of this process."""
    return identity(os.getpid())


def is_gone(pid: int, host: str, process: str) -> bool:
    """Whether a process has ended for certain; of one on another machine nobody can tell.

    Args:
        process: its :func:`identity`; empty: the number alone decides.
    """
    if host != socket.gethostname():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        return False
    return bool(process) and identity(pid) not in ("", process)


class RunLock:
    """Held by the process that works on a run, so that a second one is refused. Ends with the process.

    Raises:
        LaunchError: another process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._file: IO[str] = (run_dir / ".run.lock").open("a+")
        self._file.seek(0)
        owner = self._file.read(1000)
        try:
            # Not flock: decoding processes would inherit it and hold on to it when this process is killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise _in_use(run_dir, owner) from None
        except OSError:  # a file system without locks: what is written in the file has to do
            if self._is_fresh(owner):
                raise _in_use(run_dir, owner) from None
        self._file.truncate(0)
        self._file.write(f"process {os.getpid()} on {socket.gethostname()} ({own_identity()})")
        self._file.flush()

    def release(self) -> None:
        """Let others work on the run."""
        if not self._file.closed:
            self._file.truncate(0)
            self._file.close()

    def _is_fresh(self, owner: str) -> bool:
        """Whether the process that wrote the file may be at work: it is here, or was elsewhere not long ago."""
        known = re.fullmatch(r"process (\d+) on (\S+) \(([^()]*)\)", owner)
        if known is None or known[1] == str(os.getpid()):
            return False
        if known[2] == socket.gethostname():
            return not is_gone(int(known[1]), known[2], known[3])
        files = (self._run_dir / name for name in (".run.lock", "run.json", "metrics.jsonl"))
        return time.time() - max(file.stat().st_mtime for file in files if file.exists()) < _FRESH_S


def _in_use(run_dir: Path, owner: str) -> LaunchError:
    who = owner.partition(" (")[0].strip() or "another process"
    where = "" if who.endswith(f" on {socket.gethostname()}") else " (another machine: look there)"
    return LaunchError(
        f"{run_dir} is in use by {who}{where}",
        hint="wait until it ends, or stop it first; then try again",
    )
