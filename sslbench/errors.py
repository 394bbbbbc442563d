"""Every error a user can meet, with its exit code and what to type next."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """Process exit codes. They are part of the public interface."""

    OK = 0
    UNEXPECTED = 1
    CONFIG = 2
    PLUGIN = 3
    DATA = 4
    CHECKPOINT = 5
    LAUNCH = 6
    DIVERGED = 7
    PREEMPTED = 75
    INTERRUPTED = 130


class SslbenchError(Exception):
    """An error with a message for the user: what went wrong, and ``hint``, what to type next."""

    exit_code: ExitCode = ExitCode.UNEXPECTED
    title = "Error"

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class ConfigError(SslbenchError):
    """A wrong option, file or command line."""

    exit_code = ExitCode.CONFIG
    title = "Config error"


class PluginError(SslbenchError):
    """A plugin is unknown, broken, ambiguous or violates a contract."""

    exit_code = ExitCode.PLUGIN
    title = "Plugin error"


class MissingExtraError(PluginError):
    """A plugin needs a package that is an optional extra and is not installed: no fault of the plugin.

    Args:
        plugin: who needs it, such as ``backbone 'timm'``.
        package: its name, also as :attr:`package`.
        extra: what to install, such as ``sslbench[timm]``; unset: the package itself.
    """

    def __init__(self, plugin: str, package: str, extra: str | None = None) -> None:
        super().__init__(
            f"{plugin} needs the package '{package}', which is not installed",
            hint=f"pip install '{extra or package}'",
        )
        self.package = package


class DataError(SslbenchError):
    """A data set is missing, unreadable or not what it should be."""

    exit_code = ExitCode.DATA
    title = "Data error"


class CheckpointError(SslbenchError):
    """A checkpoint is missing, damaged, does not fit, or could not be written."""

    exit_code = ExitCode.CHECKPOINT
    title = "Checkpoint error"


class LaunchError(SslbenchError):
    """The processes or devices of a run could not be set up."""

    exit_code = ExitCode.LAUNCH
    title = "Launch error"


class DivergedError(SslbenchError):
    """The loss is no longer a finite number."""

    exit_code = ExitCode.DIVERGED
    title = "Training diverged"
    step = 0
    """The first one that went wrong, counted from 1."""


class PreemptedError(SslbenchError):
    """The run was asked to stop, saved its state and can be resumed."""

    exit_code = ExitCode.PREEMPTED
    title = "Preempted"


class StopNow(BaseException):
    """A signal during work that has no state to save. No handler of errors may keep it: it is none.

    It becomes the :class:`PreemptedError` that it carries where the work ends.
    """

    def __init__(self, error: PreemptedError) -> None:
        super().__init__(error.message)
        self.error = error
        self.exit_code = error.exit_code


#: What the operating system says when it does not let us write, and what to do about it.
_WRITE_FAILURES = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is larger than allowed here",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "no permission",
    errno.ENOTDIR: "a part of this path is a file, not a folder",
    errno.EIO: "the disk does not work properly",
}


def write_failure(error: BaseException, path: Path | None = None) -> str | None:
    """Why ``path`` could not be written, in words; None if the error is another one.

    torch reports a failed write as RuntimeError without a number, so the disk itself is asked then.
    """
    reason = _WRITE_FAILURES.get(getattr(error, "errno", None) or 0)
    return reason or ("the disk is full" if path and _is_full(path) else None)


def _is_full(path: Path) -> bool:
    folder = next((parent for parent in path.parents if parent.exists()), Path("/"))
    return shutil.disk_usage(folder).free < 1 << 20


class StorageError(SslbenchError):
    """Files of a run could not be written."""

    exit_code = ExitCode.CHECKPOINT
    title = "Storage error"

    @classmethod
    def of(cls, error: OSError) -> StorageError | None:
        """The message for an error of the operating system; None if it is not about storage."""
        reason = write_failure(error)
        if reason is None:
            return None
        where = f"{error.filename}: " if error.filename else ""
        return cls(
            f"{where}{reason}; what was finished before is kept",
            hint="free some space or name another folder (sslbench --runs FOLDER ...) and give the same command "
            "again; a training run continues with: sslbench pretrain --resume last",
        )


def described(error: Exception) -> SslbenchError:
    """Any error as one with a message, an exit code and what to do next."""
    if isinstance(error, SslbenchError):
        return error
    storage = StorageError.of(error) if isinstance(error, OSError) else None
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()))
    return storage or SslbenchError(
        f"unexpected {type(error).__name__}: {error}{notes}",
        hint="run again with SSLBENCH_DEBUG=1 for the traceback; this is a bug of sslbench or a plugin",
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean '{close[0]}'?" if close else ""
