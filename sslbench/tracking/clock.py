"""The time of day, without its jumps."""

from __future__ import annotations

import time


def _elapsed() -> float:
    """Seconds that nobody can set; where the system can tell, those that the machine slept included."""
    clock = getattr(time, "CLOCK_BOOTTIME", None)
    return time.monotonic() if clock is None else time.clock_gettime(clock)


_BEGAN = time.time() - _elapsed()


def now() -> float:
    """Seconds since 1970 by the clock as it was when this process started.

    Clocks are set while runs go on, by hours (a machine without a battery finds its time server) and by years.
    Durations and the order of points within a process stay what they are.
    """
    return _BEGAN + _elapsed()
