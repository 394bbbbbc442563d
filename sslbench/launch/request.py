"""What the user asks of the launcher: how many processes on how many machines, and how they find each other."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace

from sslbench.errors import ConfigError, LaunchError
from sslbench.launch.addresses import free_port, own_address
from sslbench.launch.environment import (
    VARIABLES,
    first_host,
    is_worker,
    slurm_nodes,
    slurm_port,
    tasks_of_step,
)

AUTO = "auto"


@dataclass(frozen=True)
class LaunchRequest:
    """The launch options of a command as they were typed."""

    devices: str | None = None
    nnodes: str | None = None
    node_rank: int | None = None
    rdzv_endpoint: str | None = None
    launch_id: str | None = None
    max_restarts: int = 3
    peer_timeout: float = 600.0

    def starts_processes(self, environ: Mapping[str, str] = os.environ) -> bool:
        """Whether this process is a launcher, rather than the only process or one that was launched.

        Raises:
            SslbenchError: the options do not fit each other or the environment.
        """
        if is_worker(environ):
            return False
        if self.nnodes is None:
            self._check_unused()
        if self.devices is None and self.nnodes is None:
            return False
        self._check_environment(environ)
        self.nodes()
        return self.devices != "1" or self.nnodes is not None

    def nodes(self) -> tuple[int, int]:
        """Fewest and most machines."""
        found = re.fullmatch(r"(\d+)(?::(\d+))?", self.nnodes or "1")
        if found:
            fewest, most = int(found[1]), int(found[2] or found[1])
            if 1 <= fewest <= most:
                return fewest, most
        raise ConfigError(
            f"--nnodes {self.nnodes}: neither a number nor MIN:MAX", hint="--nnodes 2 or --nnodes 1:4"
        )

    def processes(self, gpus: int | None) -> int:
        """How many processes this machine gets.

        Args:
            gpus: CUDA devices of this machine; None: the run uses the CPU.
        """
        wanted = self.devices or AUTO
        if wanted == AUTO:
            if gpus is None:
                raise ConfigError(
                    "--devices auto counts CUDA devices, and this run uses the CPU",
                    hint="--devices 2, for example",
                )
            return gpus
        if not wanted.isdigit() or wanted == "0":
            raise ConfigError(f"--devices {wanted}: neither a number nor auto", hint="--devices 2")
        if gpus is not None and int(wanted) > gpus:
            raise LaunchError(
                f"--devices {wanted}, but this machine has {gpus} CUDA device{'s' if gpus != 1 else ''}",
                hint=f"--devices {gpus}, or train.device=cpu" if gpus else "train.device=cpu, or sslbench doctor",
            )
        return int(wanted)

    def words(self) -> str:
        """The options that start the same processes for another command on this machine."""
        several = [f"--nnodes {self.nnodes}", f"--rdzv-endpoint {self.rdzv_endpoint}"]
        several = several if self.nodes() != (1, 1) else []
        return " ".join([f"--devices {self.devices or AUTO}", *several])

    def _check_unused(self) -> None:
        given = {
            "--rdzv-endpoint": self.rdzv_endpoint,
            "--node-rank": self.node_rank,
            "--launch-id": self.launch_id,
        }
        for name, value in given.items():
            if value is not None:
                raise ConfigError(f"{name} is for several machines", hint="add --nnodes N, or drop it")

    def _check_environment(self, environ: Mapping[str, str]) -> None:
        if all(name in environ for name in VARIABLES):
            raise ConfigError(
                "--devices starts processes, and this process was already started by a launcher",
                hint="drop --devices and --nnodes, or start the command without that launcher",
            )
        if self.nnodes is None and tasks_of_step(environ) > 1:
            raise ConfigError(
                f"--devices in each of {tasks_of_step(environ)} Slurm tasks would start as many separate runs",
                hint="drop --devices: the tasks join by themselves; or one task per node and --nnodes N",
            )


@dataclass(frozen=True)
class Meeting:
    """Where the launchers of all machines meet."""

    host: str
    port: int
    launch_id: str
    announced: bool
    """Whether the others must be told."""


def meeting(request: LaunchRequest, environ: Mapping[str, str] = os.environ) -> Meeting:
    """Find out, or choose, where to meet.

    Raises:
        ConfigError: this is one of several machines and nobody said where.
    """
    endpoint = request.rdzv_endpoint
    name = request.launch_id
    if tasks_of_step(environ) > 1 and endpoint in (None, AUTO):
        name = name or f"slurm-{environ['SLURM_JOB_ID']}.{environ['SLURM_STEP_ID']}"
        return Meeting(first_host(slurm_nodes(environ)), slurm_port(environ), name, announced=False)
    if request.nodes() == (1, 1):  # wherever they would meet
        shared = endpoint if endpoint != AUTO else None
        return Meeting("127.0.0.1", 0, name or shared or new_launch_id(), announced=False)
    if endpoint is None:
        raise ConfigError(
            f"--nnodes {request.nnodes} needs a place where the machines meet",
            hint="on the first one: --rdzv-endpoint auto, which prints the line for the others",
        )
    if endpoint == AUTO:
        return Meeting(own_address(), free_port(), name or new_launch_id(), announced=True)
    host, _, port = endpoint.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise ConfigError(f"--rdzv-endpoint {endpoint}: not HOST:PORT", hint="--rdzv-endpoint 10.0.0.1:29400")
    # The address tells launches apart where the user did not: all machines were given the same one.
    return Meeting(host.strip("[]"), int(port), name or f"{host}:{port}", announced=False)


def at(request: LaunchRequest, place: Meeting) -> LaunchRequest:
    """The request with everything that the other machines must know."""
    host = f"[{place.host}]" if ":" in place.host else place.host
    return replace(request, rdzv_endpoint=f"{host}:{place.port}", launch_id=place.launch_id)


def new_launch_id() -> str:
    """An id that no other launch has."""
    return uuid.uuid4().hex[:12]
