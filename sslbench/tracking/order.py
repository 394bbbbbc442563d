"""Which run came after which, also when the clock was set back between them."""

from __future__ import annotations

import fcntl
from contextlib import suppress
from pathlib import Path

_FILE = ".order"
_STEP_S = 0.001


def place_behind(root: Path, started: float) -> float:
    """When a run started, or a moment behind the last one of this folder if the clock says it was before that.

    So "the newest" and ``last`` mean the run that was started last, and runs of several folders that are put
    together are still in the order of their times.
    """
    with (root / _FILE).open("a+") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        order = round(max(started, _number(file.read(40)) + _STEP_S), 3)
        file.truncate(0)
        file.write(f"{order:.3f}")
    return order


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
