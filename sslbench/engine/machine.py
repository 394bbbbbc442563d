"""What a process that computes settles about memory and threads before torch is imported.

Both settings only change speed. This module imports nothing heavy: later is too late for either.
"""

from __future__ import annotations

import ctypes
import os

from sslbench.cores import allowed_cores, cpu_quota, usable_cores

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM = 2**31 - 1
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


def prepare_process() -> None:
    """Call it before the first import of torch; what the user has set in the environment stays."""
    keep_freed_memory()
    wait_passively()
    respect_cpu_quota()


def keep_freed_memory() -> None:
    """Have glibc keep the memory of freed tensors for the next ones.

    By default it returns every large buffer to the kernel, which then hands out zeroed pages again: some 10,000
    page faults in each step of a small network, an eighth to a third of its time.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # another C library; nothing but speed is lost
    mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    mallopt(_M_MMAP_MAX, 0)  # a mapping of its own for a large buffer is undone when that is freed


def wait_passively() -> None:
    """Let idle OpenMP threads sleep.

    By default they spin for milliseconds, taking cores from decoding workers and from whatever else runs beside:
    that costs peers a third of their speed, and several times as much on a busy machine.
    """
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "passive"


def respect_cpu_quota() -> None:
    """Start no more threads than the container's CPU quota pays for; torch counts the host's cores."""
    quota = cpu_quota()
    if quota is not None and "OMP_NUM_THREADS" not in os.environ and quota < allowed_cores():
        os.environ["OMP_NUM_THREADS"] = str(quota)


def share_of_cores(processes: int) -> int:
    """Threads for each of so many processes of this machine."""
    return max(1, usable_cores() // processes)
