"""What a fault is and what inflicting it has shown."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Finding:
    """What came of inflicting one fault some times."""

    tried: int
    held: int
    """How many of these times everything was as promised."""
    lost_steps: int
    """Most training steps that had to be done again after one of them."""
    result: str
    """What was compared and found, in one line; of a failure, which."""


@dataclass(frozen=True)
class Fault:
    """One row of the report. Modules of this package list theirs as ``FAULTS``."""

    name: str
    """What is done to the run, in words."""
    inflict: Callable[[Path, int, int], Finding]
    """Do it in an empty folder, so many times, with choices that follow from a seed."""
    times: int
    """How often for the report."""
    quick: int = 0
    """How often in the quick tests; 0: not there."""
