"""A timed window over training steps, and how quiet the machine was meanwhile. Standard library only.

Every measured program is a process of its own; it calls :meth:`Window.step` after each step and prints
:meth:`Window.result`. The cores may be shared: a window in which other processes used them, or the hypervisor
stole from them, says so, and the caller repeats it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")
_TICKS = os.sysconf("SC_CLK_TCK")


class Usage(NamedTuple):
    """CPU seconds since the machine started."""

    busy: float
    """Of all processes."""
    stolen: float
    """Taken by the hypervisor."""
    own: float
    """Of this process and its children."""


class Window:
    """A warm-up, then steps for about ``seconds``.

    Args:
        seconds: least length of the window; it ends with a step.
        warmup: seconds of the warm-up.
        warmup_steps: also so many steps, which empties what a loader has fetched ahead; given up after 3 s,
            because what is fetched ahead does not matter where a step takes that long.
        synchronize: waits until the device has done what was asked of it.
    """

    def __init__(
        self,
        seconds: float,
        warmup: float = 1.5,
        warmup_steps: int = 10,
        synchronize: Callable[[], None] = lambda: None,
    ) -> None:
        self.length = seconds
        self.warmup = warmup
        self.warmup_steps = warmup_steps
        self.synchronize = synchronize
        self.steps = 0
        """Steps in the window so far."""
        self.seconds = 0.0
        self._warm = 0
        self._created = time.perf_counter()
        self._began: float | None = None

    @property
    def running(self) -> bool:
        """Whether the warm-up is over."""
        return self._began is not None

    def step(self) -> bool:
        """Count a step; True if the window is over."""
        if self._began is None:
            self._warm += 1
            if self._is_warm():
                self.synchronize()
                self._before = usage()
                self._began = time.perf_counter()
            return False
        self.steps += 1
        if time.perf_counter() - self._began < self.length:
            return False
        self.synchronize()
        self.seconds = time.perf_counter() - self._began
        self._after = usage()
        return True

    def _is_warm(self) -> bool:
        passed = time.perf_counter() - self._created
        return passed >= self.warmup and (self._warm >= self.warmup_steps or passed >= 3)

    def result(self, batch: int) -> dict[str, float]:
        """Source images per second, and the cores that were used by this program, by others, and stolen.

        Images per CPU second count all processes of the program; unlike the rate they mean something on a machine
        that others use.
        """
        result = {
            "images_per_second": self.steps * batch / self.seconds,
            "steps": self.steps,
            "seconds": self.seconds,
        }
        if self._before is None or self._after is None:
            return result
        busy, stolen, own = (
            (after - before) / self.seconds for before, after in zip(self._before, self._after, strict=True)
        )
        if own > 0:  # the counters move in hundredths of a second
            result["images_per_cpu_second"] = result["images_per_second"] / own
        return result | {"cores": own, "others": max(0.0, busy - own), "stolen": stolen}


def usage() -> Usage | None:
    """None where the kernel does not tell."""
    try:
        user, nice, system, _, _, irq, softirq, stolen = (
            int(word) for word in (PROC / "stat").read_text().split("\n", 1)[0].split()[1:9]
        )
    except (OSError, ValueError):
        return None
    return Usage((user + nice + system + irq + softirq) / _TICKS, stolen / _TICKS, _own())


def _own() -> float:
    """Of this process, its living descendants, and those they have waited for."""
    parents: dict[int, int] = {}
    used: dict[int, int] = {}
    for folder in PROC.iterdir():
        if not folder.name.isdigit():
            continue
        try:
            # The name before the last parenthesis may hold anything.
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents[int(folder.name)] = int(fields[1])
        used[int(folder.name)] = sum(int(field) for field in fields[11:15])
    return sum(ticks for process, ticks in used.items() if _descends(process, parents)) / _TICKS


def _descends(process: int, parents: dict[int, int]) -> bool:
    while process and process != os.getpid():
        process = parents.get(process, 0)
    return process == os.getpid()
