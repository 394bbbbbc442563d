"""How much memory is free on the host: what the kernel offers, within the limits of our control groups."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

_UNKNOWN = 8 << 30
"""Assumed where the system does not tell (not Linux)."""


def free_host_memory(root: Path = Path("/")) -> int:
    """Bytes that processes may still take before the host swaps or a control group's limit ends them.

    Args:
        root: below which ``proc`` and ``sys`` are found.
    """
    return max(0, min([_available(root / "proc/meminfo"), *_group_rooms(root)]))


def _available(meminfo: Path) -> int:
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text().splitlines() if ":" in line)
        return int(lines["MemAvailable"].split()[0]) << 10
    except (OSError, ValueError, KeyError, IndexError):
        return _UNKNOWN


def _group_rooms(root: Path) -> Iterator[int]:
    """Room below the limit of each control group that this process is in, of either version."""
    try:
        groups = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for _number, controllers, path in (line.split(":", 2) for line in groups if line.count(":") >= 2):
        if not controllers:
            yield from _rooms(root / "sys/fs/cgroup", path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            yield from _rooms(root / "sys/fs/cgroup/memory", path, *names)


def _rooms(mount: Path, path: str, limit: str, usage: str, reclaimable: str) -> Iterator[int]:
    """Of a group and of those above it: each limit holds. In a container the group is often the mount itself."""
    inside = Path(path.lstrip("/"))
    for group in [mount / inside, *(mount / parent for parent in inside.parents), mount]:
        try:
            room = int((group / limit).read_text()) - int((group / usage).read_text())
            yield room + _statistic(group / "memory.stat", reclaimable)
        except (OSError, ValueError):
            continue  # no such group, or "max": no limit


def _statistic(file: Path, name: str) -> int:
    lines = (line.split() for line in file.read_text().splitlines())
    return next((int(line[1]) for line in lines if line and line[0] == name), 0)
