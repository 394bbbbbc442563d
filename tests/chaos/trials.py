"""Inflicting a fault again and again, and counting what came of it."""

from __future__ import annotations

import random
import shutil
import traceback
from collections.abc import Callable
from pathlib import Path

from chaos.fault import Finding

Trial = Callable[[Path, random.Random], int]
"""Inflicts a fault once in an empty folder; returns the training steps that had to be done again.

Raises anything if a promise was broken.
"""


def trials(trial: Trial, held: str) -> Callable[[Path, int, int], Finding]:
    """What a :class:`~chaos.fault.Fault` needs, from one trial; each has a folder and random numbers of its own.

    Args:
        held: what was compared, in one line; it is the result if nothing was found.
    """

    def inflict(folder: Path, times: int, seed: int) -> Finding:
        lost, broken = [], []
        for number in range(times):
            place = folder / f"trial-{number:03}"
            place.mkdir()
            try:
                lost.append(trial(place, random.Random(f"{seed}/{number}")))
            except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
                (place / "failure.txt").write_text(traceback.format_exc())
                broken.append(f"trial {number}: {first_line(error)}")
            else:
                shutil.rmtree(place, ignore_errors=True)  # of a failure everything stays
        result = held if not broken else f"{len(broken)} of {times} failed; {broken[0]}"
        return Finding(times, len(lost), max(lost, default=0), result)

    return inflict


def first_line(error: BaseException) -> str:
    """What an error says, on one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
