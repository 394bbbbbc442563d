"""Every error a user can meet, with its exit code and what to type next."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from enum import IntEnum


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


class PreemptedError(SslbenchError):
    """The run was asked to stop, saved its state and can be resumed."""

    exit_code = ExitCode.PREEMPTED
    title = "Preempted"


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest known word, or an empty string."""
    close = get_close_matches(word, list(known), n=1, cutoff=0.55)
    return f"; did you mean '{close[0]}'?" if close else ""
