"""What a worker leaves behind for its launcher: why it ended, beyond the exit code."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from sslbench.errors import SslbenchError
from sslbench.launch.environment import FOLDER


@dataclass(frozen=True)
class Report:
    """The error that a worker ended with."""

    title: str
    message: str
    hint: str | None
    lost: bool
    """Whether it only lost contact with the others: then the cause is somewhere else."""
    final: bool = False
    """Whether starting it again would change nothing, whatever the exit code is."""


def write_report(error: SslbenchError, *, lost: bool, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher; without one of ours nothing happens."""
    _write(Report(error.title, error.message, error.hint, lost), environ)


def write_final_report(message: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tell the launcher that the work is done as far as it can be."""
    _write(Report(SslbenchError.title, message, None, lost=False, final=True), environ)


def _write(report: Report, environ: Mapping[str, str]) -> None:
    if FOLDER not in environ:
        return
    with suppress(OSError):  # a full disk: the exit code says the most important
        report_file(Path(environ[FOLDER]), int(environ["RANK"])).write_text(json.dumps(asdict(report)))


def read_report(folder: Path, rank: int) -> Report | None:
    """What a worker has told, if it could."""
    try:
        return Report(**json.loads(report_file(folder, rank).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def report_file(folder: Path, rank: int) -> Path:
    """Where it is."""
    return folder / f"rank-{rank}.json"


def regrouping_file(folder: Path) -> Path:
    """Is there while workers are stopped only to start again with those of another machine."""
    return folder / "regrouping"


def is_regrouping(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether that is why this worker was asked to stop."""
    return FOLDER in environ and regrouping_file(Path(environ[FOLDER])).exists()
