"""What the ends of the workers mean: the exit code, who is to blame, and whether to start all of them again."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass

from sslbench.errors import ExitCode
from sslbench.launch.report import Report

_STOPPED = (ExitCode.PREEMPTED, ExitCode.INTERRUPTED)


@dataclass(frozen=True)
class End:
    """How a worker ended."""

    code: int
    """Its exit code; negative: the signal that killed it."""
    report: Report | None = None
    cleared: bool = False
    """Whether the launcher itself ended it, because another one had failed."""

    @property
    def lost(self) -> bool:
        """Whether it only lost contact with the others."""
        return self.report is not None and self.report.lost

    @property
    def decided(self) -> bool:
        """Whether it ended on purpose, so that starting it again would change nothing."""
        if self.report is not None and self.report.final:
            return self.code > 0
        return self.code > 0 and self.code != ExitCode.UNEXPECTED and not self.lost

    def words(self) -> str:
        """How it ended, to go on after its name."""
        if self.code < 0:
            return f"was killed by {_signal_name(-self.code)}"
        if self.report:
            return self.report.message if self.lost else f"ended with exit code {self.code}: {self.report.message}"
        return f"ended with exit code {self.code}"


@dataclass(frozen=True)
class Verdict:
    """What becomes of the launch."""

    code: int
    rank: int | None
    """Whose end decided; None: the user did."""
    final: bool
    """Whether nobody is started again."""


def judge(ends: Mapping[int, End], asked: int | None) -> Verdict:
    """Judge the ends of all workers of this machine.

    Args:
        ends: rank -> end.
        asked: the signal that asked the launch to stop, if one did.
    """
    for rank, end in sorted(ends.items()):
        if end.decided and end.code not in _STOPPED:
            return Verdict(end.code, rank, final=True)
    if all(end.code == 0 for end in ends.values()):
        return Verdict(0, None, final=True)
    if asked is not None:
        code = ExitCode.INTERRUPTED if asked == signal.SIGINT else ExitCode.PREEMPTED
        return Verdict(code, None, final=True)
    for rank, end in sorted(ends.items()):
        if end.code in _STOPPED:
            return Verdict(end.code, rank, final=True)
    failed = [rank for rank, end in sorted(ends.items()) if end.code != 0]
    rank = min(failed, key=lambda rank: (ends[rank].cleared, ends[rank].lost, ends[rank].code > 0))
    return Verdict(ExitCode.LAUNCH, rank, final=False)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
