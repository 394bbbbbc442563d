"""Which run belongs to a launch, so that processes that are started again continue it."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslbench import comm
from sslbench.config.compose import Selection
from sslbench.engine.checkpoint import start_of
from sslbench.engine.runs import pretrained_runs
from sslbench.launch.environment import LAUNCH, RESTARTS, tasks_of_step
from sslbench.untrusted import file_name

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


def run_of_launch(
    root: Path, config_hash: str, name: str | None, init_from: Path | None, backbone: Selection | None = None
) -> Path | None:
    """The run that an earlier start of this launch has begun with the same options, equal on all ranks.

    Args:
        name: what the user calls the run, if anything.
        init_from: the run whose weights it starts from.
        backbone: which may begin with weights of its own.
    """
    identity = launch_id()
    if identity is None:
        return None
    own = backbone.cls.initial_weights(backbone.cfg) if backbone and not init_from else None
    asked = Asked(identity, config_hash, name, start_of(init_from) if init_from else own or "")
    found = _find(root, asked, os.environ) if comm.rank() == 0 else None
    path: Path | None = comm.broadcast_object(found)
    return path


@dataclass(frozen=True)
class Asked:
    """What a launch wants to run."""

    identity: str
    config_hash: str
    name: str | None
    start: str
    """Identifies the weights it starts from."""

    def fits(self, record: Mapping[str, Any]) -> bool:
        """Whether the run of a record is what would be begun now."""
        tags = record.get("tags") or {}
        wanted = {TAG: self.identity, "sslbench.config_hash": self.config_hash, "sslbench.start": self.start}
        return self._names(str(record.get("name"))) and all(tags.get(tag, "") == wanted[tag] for tag in wanted)

    def _names(self, name: str) -> bool:
        """A run whose name was taken has a number after it."""
        return self.name is None or re.fullmatch(re.escape(file_name(self.name)) + r"(-\d+)?", name) is not None


def _find(root: Path, asked: Asked, environ: Mapping[str, str]) -> Path | None:
    for record, path in reversed(pretrained_runs(root)):
        if asked.fits(record) and (record.get("status") != "FINISHED" or _is_restart(asked.identity, environ)):
            return Path(path)
    return None


def name_of_run(root: Path, identity: str) -> str | None:
    """The name of the newest run of a launch."""
    names = [
        record.get("name")
        for record, _ in pretrained_runs(root)
        if (record.get("tags") or {}).get(TAG) == identity
    ]
    return names[-1] if names else None


def _is_restart(identity: str, environ: Mapping[str, str]) -> bool:
    """Whether a finished run is continued, for evaluations that are left; a name used again is a new launch.

    An address where machines meet is used again; an id that a launcher of ours has made up never is.
    """
    counts = [environ.get(name, "0") for name in (RESTARTS, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")]
    made_up = LAUNCH in environ and ":" not in identity
    return made_up or any(count not in ("", "0") for count in counts)


def _parent() -> str:
    """The launcher's process, told apart from later ones with the same number."""
    number = os.getppid()
    try:
        words = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return str(number)
    return f"{number}-{words[19]}"
