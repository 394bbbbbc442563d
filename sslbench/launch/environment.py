"""What a launcher (our own, torchrun, Slurm's srun) says in the environment about the place of this process.

Imports nothing heavy: it is asked before the settings that must be made ahead of torch.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
from collections.abc import Mapping, MutableMapping
from typing import NoReturn

from sslbench.errors import LaunchError

VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OURS = VARIABLES[:3]
_NUMBERS = (*_OURS, "MASTER_PORT")
_LAST_PORT = 65535

#: Set by our launcher in its workers: the id of the launch, the launcher's process, the folder for reports.
LAUNCH, LAUNCHER, FOLDER = "SSLBENCH_LAUNCH", "SSLBENCH_LAUNCHER", "SSLBENCH_LAUNCH_FOLDER"
#: Set by a worker: how often its launcher has started the processes again.
RESTARTS = "SSLBENCH_RESTARTS"
#: The options that start such a launch again, for hints.
OPTIONS = "SSLBENCH_LAUNCH_OPTIONS"

_FIRST_SPECIAL_STEP = 0xFFFFFFF0  # numbers of the batch script, of interactive shells and of Slurm's own steps
_FIRST_PORT, _PORTS = 15000, 15000  # below the ports that systems hand out by themselves
_PR_SET_PDEATHSIG = 1


def settle_environment(environ: MutableMapping[str, str] = os.environ) -> bool:
    """Whether several processes were started to run together; Slurm's variables are then put into torchrun's.

    Raises:
        LaunchError: some of the variables are missing, are no numbers, or contradict each other.
    """
    if LAUNCHER in environ:
        _die_with(int(environ[LAUNCHER]))
        # A machine that came back counts from zero: what ranks agree on must not depend on it.
        environ.setdefault(RESTARTS, environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        environ["TORCHELASTIC_RESTART_COUNT"] = "0"
    if not any(name in environ for name in _OURS):
        environ.update(_slurm_place(environ))
    if not any(name in environ for name in _OURS):
        return False
    missing = [name for name in VARIABLES if not environ.get(name)]
    if missing:
        given = ", ".join(name for name in VARIABLES if environ.get(name))
        raise LaunchError(
            f"the environment has {given}, but not {', '.join(missing)}: this is only part of a launch",
            hint=f"start with --devices N or torchrun, which set all of them, or: unset {' '.join(_OURS)}",
        )
    _check_numbers(environ)
    return True


def _check_numbers(environ: Mapping[str, str]) -> None:
    """Ranks that cannot be would wait for each other until the timeout."""
    for name in _NUMBERS:
        if not re.fullmatch("[0-9]+", environ[name]):
            _refuse(name, environ[name], "not a number from 0 on")
    world = int(environ["WORLD_SIZE"])
    if world == 0:
        _refuse("WORLD_SIZE", environ["WORLD_SIZE"], "no processes at all")
    for name in ("RANK", "LOCAL_RANK"):
        if int(environ[name]) >= world:
            _refuse(name, environ[name], f"not below WORLD_SIZE={world}: ranks are counted from 0")
    if not 0 < int(environ["MASTER_PORT"]) <= _LAST_PORT:
        _refuse("MASTER_PORT", environ["MASTER_PORT"], f"not a port from 1 to {_LAST_PORT}")


def _refuse(name: str, value: str, why: str) -> NoReturn:
    raise LaunchError(
        f"the environment has {name}={value}, which is {why}",
        hint=f"start with --devices N or torchrun, which set it, or: unset {' '.join(_OURS)}",
    )


def is_worker(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether our own launcher started this process."""
    return LAUNCH in environ


def launch_words(environ: Mapping[str, str] = os.environ) -> str:
    """What to append to a command that goes on with a run, so that it runs as this one does."""
    words = environ.get(OPTIONS, "")
    return f" {words}" if words else ""


def tasks_of_step(environ: Mapping[str, str] = os.environ) -> int:
    """How many tasks the Slurm step has that this process belongs to; 1 outside a step.

    A batch script and an interactive shell see the job's number of tasks, but are one process.
    """
    step = environ.get("SLURM_STEP_ID", "")
    if not step.isdigit() or int(step) >= _FIRST_SPECIAL_STEP:
        return 1
    tasks = environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1"))
    return int(tasks) if tasks.isdigit() else 1


def first_host(nodes: str) -> str:
    """The first name of a Slurm node list such as ``gpu[03-05,9],login1``."""
    first = re.match(r"(?:\[[^]]*\]|[^,\[])+", nodes.strip())
    return re.sub(r"\[([^],-]+)[^]]*\]", r"\1", first[0]) if first else ""


def slurm_port(environ: Mapping[str, str]) -> int:
    """A port that all tasks of a step agree on without talking."""
    return _FIRST_PORT + (int(environ["SLURM_JOB_ID"]) + 7 * int(environ.get("SLURM_STEP_ID", 0))) % _PORTS


def slurm_nodes(environ: Mapping[str, str]) -> str:
    """The nodes of this step, or of its job."""
    names = ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
    return next((environ[name] for name in names if environ.get(name)), "")


def _slurm_place(environ: Mapping[str, str]) -> dict[str, str]:
    tasks = tasks_of_step(environ)
    if tasks < 2:
        return {}
    missing = [name for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_JOB_ID") if name not in environ]
    missing += [] if slurm_nodes(environ) or "MASTER_ADDR" in environ else ["SLURM_STEP_NODELIST"]
    if missing:
        raise LaunchError(
            f"this is one of {tasks} tasks of a Slurm step, but the environment lacks {', '.join(missing)}",
            hint="start all tasks with srun, or a single one: srun --ntasks=1",
        )
    return {
        "RANK": environ["SLURM_PROCID"],
        "WORLD_SIZE": str(tasks),
        "LOCAL_RANK": environ["SLURM_LOCALID"],
        "MASTER_ADDR": environ.get("MASTER_ADDR") or first_host(slurm_nodes(environ)),
        "MASTER_PORT": environ.get("MASTER_PORT") or str(slurm_port(environ)),
    }


def _die_with(launcher: int) -> None:
    """End when the launcher is killed: nobody else would end this process, and it would hold on to the run."""
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    except (OSError, AttributeError, TypeError):
        return  # not Linux
    if os.getppid() != launcher:  # it was gone already
        raise LaunchError("the launcher has ended before this process began")
