"""How many cores of this machine a process may count on. Imports nothing heavy: it is asked ahead of torch."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path


def allowed_cores() -> int:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cores() -> int:
    """Cores whose time this process gets: those allowed, within the quota of its control groups."""
    return min(allowed_cores(), cpu_quota() or allowed_cores())


def own_cores(environ: Mapping[str, str] = os.environ) -> int:
    """This process's share of the usable cores, beside the other processes of its run on this machine."""
    if _is_slurm_task(environ) and environ.get("SLURM_CPUS_PER_TASK", "").isdigit():
        # Slurm has told what a task gets, and may have bound it to these cores already.
        return max(1, min(usable_cores(), int(environ["SLURM_CPUS_PER_TASK"])))
    return max(1, usable_cores() // processes_here(environ))


def processes_here(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes of this run are on this machine, as torchrun or Slurm tells."""
    told = environ.get("LOCAL_WORLD_SIZE", "")
    if told.isdigit():
        return max(1, int(told))
    # Such as 8(x2),4: tasks of each node. The most, since a share too small does less harm than one too large.
    listed = environ.get("SLURM_STEP_TASKS_PER_NODE", "") if _is_slurm_task(environ) else ""
    return max([1, *(int(number) for number in re.findall(r"(?:^|,)(\d+)", listed))])


def _is_slurm_task(environ: Mapping[str, str]) -> bool:
    """Whether Slurm started the processes of the run, not a launcher within one task."""
    tasks = environ.get("SLURM_STEP_NUM_TASKS", "")
    return tasks.isdigit() and int(tasks) > 1


def cpu_quota(root: Path = Path("/sys/fs/cgroup"), member: Path = Path("/proc/self/cgroup")) -> int | None:
    """Cores of the smallest quota of our control groups (version 2 or 1), rounded up; None: there is none.

    Args:
        root: where control groups are mounted.
        member: tells which ones we are in.
    """
    return min((quota for group in _groups(root, member) if (quota := _quota(group)) is not None), default=None)


def _groups(root: Path, member: Path) -> Iterator[Path]:
    """Ours and those above it; in a container ours is often the mount itself."""
    yield root
    yield root / "cpu"
    try:
        lines = [line.split(":", 2) for line in member.read_text().splitlines() if line.count(":") >= 2]
    except OSError:
        return
    for _number, controllers, path in lines:
        if not controllers or "cpu" in controllers.split(","):
            inside = Path(path.lstrip("/"))
            mount = root / controllers if controllers else root
            yield from (mount / part for part in (inside, *inside.parents))


def _quota(group: Path) -> int | None:
    try:
        if (group / "cpu.max").exists():
            limit, period = (group / "cpu.max").read_text().split()
        else:
            limit, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return None if limit == "max" or int(limit) < 0 else max(1, -(-int(limit) // int(period)))
    except (OSError, ValueError):
        return None
