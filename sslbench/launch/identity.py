"""Which run belongs to a launch, so that processes that are started again continue it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sslbench import comm
from sslbench.engine.runs import pretrained_runs
from sslbench.launch.environment import LAUNCH, tasks_of_step

TAG = "sslbench.launch"


def launch_id(environ: Mapping[str, str] = os.environ) -> str | None:
    """What stays the same when the processes of a launch are started again; None: this is no launch."""
    if LAUNCH in environ:
        return environ[LAUNCH]
    torchrun = environ.get("TORCHELASTIC_RUN_ID")
    if torchrun is not None:
        # "none" is what all launches have whose user did not name them.
        return torchrun if torchrun != "none" else f"torchrun-{socket.gethostname()}-{_parent()}"
    if tasks_of_step(environ) > 1:
        return f"slurm-{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"
    return None


def run_of_launch(root: Path, config_hash: str) -> Path | None:
    """The run that an earlier start of this launch has begun with the same options, equal on all ranks."""
    identity = launch_id()
    if identity is None:
        return None
    found = _find(root, identity, config_hash) if comm.rank() == 0 else None
    path: Path | None = comm.broadcast_object(found)
    return path


def _find(root: Path, identity: str, config_hash: str) -> Path | None:
    for record, path in reversed(pretrained_runs(root)):
        tags = record.get("tags") or {}
        if tags.get(TAG) == identity and tags.get("sslbench.config_hash") == config_hash:
            return path if record.get("status") != "FINISHED" or _is_restart(os.environ) else None
    return None


def name_of_run(root: Path, identity: str) -> str | None:
    """The name of the newest run of a launch."""
    names = [
        record.get("name")
        for record, _ in pretrained_runs(root)
        if (record.get("tags") or {}).get(TAG) == identity
    ]
    return names[-1] if names else None


def _is_restart(environ: Mapping[str, str]) -> bool:
    """Whether a finished run is continued, for evaluations that are left; a name used again is a new launch."""
    counts: list[Any] = [environ.get(name, "0") for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    return LAUNCH in environ or any(count not in ("", "0") for count in counts)


def _parent() -> str:
    """The launcher's process, told apart from later ones with the same number."""
    number = os.getppid()
    try:
        words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(number)
    return f"{number}-{words[19]}"
