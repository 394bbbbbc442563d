"""Handing jobs to Slurm, or to this machine, through submitit; and waiting for them."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from sslbench.errors import ConfigError, ExitCode, LaunchError
from sslbench.launch.slurm_job import RunJob, go_on

Cluster = Literal["slurm", "local"]

_POLL_S = 1.0
_QUEUE_S = 15.0
_LATE_FILES_S = 5.0
"""A network file system may show a finished job's result some seconds after the job has left the queue."""
_OF_A_JOB = ("SLURM_", "SLURMD_", "SRUN_", "SUBMITIT_")
_OF_THE_SITE = ("SLURM_CONF", "SLURM_CLUSTERS")
_OF_A_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_MINUTES_PER_HOUR = 60
_LEAST_SAVE_S = 10
LOCAL_REQUEUES = 5
"""submitit starts a job on this machine six times at most."""


@dataclass(frozen=True)
class JobLine:
    """What one job runs."""

    name: str
    """Of the run, or of what is evaluated."""
    group: str
    """What all jobs of one command line have in their names."""
    start: tuple[str, ...]
    """Words after ``sslbench``."""
    resume: tuple[str, ...] | None = None
    """The words once the run exists; None: always ``start``."""
    run: Path | None = None
    """The link of a new run."""
    gpu: bool = True
    """Whether it uses one where there is one."""


@dataclass(frozen=True)
class Resources:
    """What each job asks for."""

    nodes: int
    devices: int
    """Processes on each node."""
    gpus: bool
    """Whether each process wants a GPU."""
    cpus: int
    """For each process."""
    mem: float | None
    """GB on each node; None: what the cluster gives."""
    hours: float
    save_seconds: int
    """How long before the end a run is told to save."""
    requeues: int
    partition: str | None = None
    account: str | None = None
    array_limit: int | None = None
    sbatch: dict[str, str | bool] = field(default_factory=dict)
    """More parameters of ``sbatch``, without the dashes; True: a switch."""
    setup: tuple[str, ...] = ()
    """Lines of shell before the job."""

    @property
    def minutes(self) -> int:
        """Slurm counts in whole ones."""
        return max(1, round(self.hours * _MINUTES_PER_HOUR))

    @property
    def patience(self) -> float:
        """Seconds for a run to save; what is left of ``save_seconds`` is for going back into the queue."""
        return 0.8 * self.save_seconds


@dataclass(frozen=True)
class Submitted:
    """A job in the queue."""

    job: Any
    """submitit's."""
    line: JobLine

    @property
    def id(self) -> str:
        return str(self.job.job_id)

    @property
    def log(self) -> Path:
        """Of the first task."""
        return Path(self.job.task(0).paths.stdout)


@dataclass(frozen=True)
class Ending:
    """How a job ended."""

    code: int
    tail: str
    """The end of its log, if it failed."""


def require_submitit() -> None:
    """Fail with what to type if submitit is not installed."""
    if find_spec("submitit") is None:
        raise LaunchError("sslbench submit needs the package submitit", hint="pip install 'sslbench[slurm]'")


def choose_cluster(wanted: str, *, needed: bool) -> Cluster:
    """``auto``: Slurm where its commands are, else this machine.

    Args:
        needed: whether its commands are to be used.
    """
    if wanted not in ("auto", "slurm", "local"):
        raise ConfigError(f"--cluster {wanted}: no such cluster", hint="--cluster auto, slurm or local")
    has_slurm = shutil.which("sbatch") is not None and shutil.which("srun") is not None
    if wanted == "slurm" and not has_slurm and needed:
        raise LaunchError(
            "--cluster slurm: the commands sbatch and srun are not here",
            hint="submit from a login node, or run the job on this machine: --cluster local",
        )
    return "slurm" if wanted == "slurm" or (wanted == "auto" and has_slurm) else "local"


def parameters(cluster: Cluster, name: str, resources: Resources) -> dict[str, Any]:
    """What submitit's executor is told; for Slurm these are parameters of ``sbatch``.

    Raises:
        ConfigError: they contradict each other, or are not for this cluster.
    """
    seconds = 60 * (resources.minutes if cluster == "slurm" else resources.hours * _MINUTES_PER_HOUR)
    _refuse_more_saving_than_running(resources, seconds)
    return _slurm(name, resources) if cluster == "slurm" else _local(name, resources)


def _refuse_more_saving_than_running(resources: Resources, seconds: float) -> None:
    """A job that is told to save right at its start goes back into the queue again and again."""
    if resources.save_seconds < seconds / 2:
        return
    least_hours = (2 * resources.save_seconds // 60 + 1) / _MINUTES_PER_HOUR
    fits = seconds / 2 > _LEAST_SAVE_S
    raise ConfigError(
        f"--save-seconds {resources.save_seconds} is not below half of the time limit of {seconds:.0f} s "
        f"(--hours {resources.hours:g})",
        hint=(f"--save-seconds {max(_LEAST_SAVE_S, int(seconds / 4))}, or " if fits else "")
        + f"--hours {math.ceil(1000 * least_hours) / 1000:g}",
    )


def _slurm(name: str, resources: Resources) -> dict[str, Any]:
    optional = {
        "mem": None if resources.mem is None else f"{round(resources.mem * 1024)}M",
        "gpus_per_node": resources.devices if resources.gpus else None,
        "partition": resources.partition,
        "account": resources.account,
        "array_parallelism": resources.array_limit,
        "setup": list(resources.setup) or None,
        "additional_parameters": resources.sbatch or None,
    }
    return {
        "job_name": name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.devices,
        "cpus_per_task": resources.cpus,
        "signal_delay_s": resources.save_seconds,
        "stderr_to_stdout": True,
        # srun does not take over the number of cores since Slurm 22.05. And a run that has lost a process is over.
        "srun_args": [f"--cpus-per-task={resources.cpus}", "--kill-on-bad-exit=1"],
        **{key: value for key, value in optional.items() if value is not None},
    }


def _local(name: str, resources: Resources) -> dict[str, Any]:
    if resources.nodes > 1:
        raise ConfigError(f"--nodes {resources.nodes}: this machine is one node", hint="--nodes 1 --devices N")
    _refuse_options_of_slurm(resources)
    minutes = resources.hours * _MINUTES_PER_HOUR
    return {
        "name": name,
        "timeout_min": minutes,
        "tasks_per_node": resources.devices,
        "gpus_per_node": resources.devices if resources.gpus else 0,
        "signal_delay_s": resources.save_seconds,
        "stderr_to_stdout": True,
        "setup": list(resources.setup) or None,
    }


def _refuse_options_of_slurm(resources: Resources) -> None:
    given = {
        "--mem": resources.mem is not None,
        "--partition": resources.partition is not None,
        "--account": resources.account is not None,
        "--array-limit": resources.array_limit is not None,
        "--sbatch": bool(resources.sbatch),
    }
    if named := [option for option, is_given in given.items() if is_given]:
        raise ConfigError(
            f"{', '.join(named)}: for Slurm, and these jobs run on this machine (cluster local)",
            hint="drop them, or submit from a login node: --cluster slurm",
        )


def submit(
    cluster: Cluster, folder: Path, told: dict[str, Any], resources: Resources, lines: Sequence[JobLine]
) -> list[Submitted]:
    """Send jobs off, several as one array.

    Args:
        folder: for scripts, logs and results; all nodes must see it.
        told: :func:`parameters`.
        lines: what each job runs.

    Raises:
        LaunchError: the cluster refuses them.
        ConfigError: the folder is that of another submission.
    """
    import submitit

    jobs = [_job(line, folder, resources) for line in lines]
    kind = submitit.SlurmExecutor if cluster == "slurm" else submitit.LocalExecutor
    with _reserved(folder), _refusals(), _outside_of_jobs():
        executor = kind(folder, max_num_timeout=resources.requeues)
        executor.update_parameters(**told)
        sent = executor.submit_array(jobs)
    return [Submitted(job, line) for job, line in zip(sent, lines, strict=True)]


def _job(line: JobLine, folder: Path, resources: Resources) -> RunJob:
    notes = folder / f"{line.name}.starts"
    return RunJob(line.start, line.resume, line.run, Path.cwd(), notes, resources.patience)


@contextmanager
def _reserved(folder: Path) -> Iterator[None]:
    """The folder stands for one submission; it is gone again if that fails."""
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        raise ConfigError(
            f"{folder.name} has been submitted before: {folder}",
            hint="run.name=ANOTHER; or delete that folder, if its jobs have ended",
        ) from None
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


@contextmanager
def _outside_of_jobs() -> Iterator[None]:
    """A job that is submitted within another one shall not take itself for a part of that.

    submitit has this too, but hides where the cluster's configuration is, and the user's defaults, as well.
    """
    ours = [name for name in os.environ if name.startswith(_OF_A_JOB) and name not in _OF_THE_SITE]
    hidden = {name: os.environ.pop(name) for name in [*ours, *_OF_A_LAUNCH] if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(hidden)


@contextmanager
def _refusals() -> Iterator[None]:
    from submitit.core.utils import FailedJobError, FailedSubmissionError

    try:
        yield
    except (FailedJobError, FailedSubmissionError, RuntimeError) as error:
        raise LaunchError(
            f"the cluster did not take the job: {str(error).strip()}",
            hint="sslbench submit --dry-run shows what is asked for; sinfo shows what there is",
        ) from error


def wait(cluster: Cluster, submitted: Sequence[Submitted]) -> Iterator[tuple[Submitted, Ending]]:
    """Each job as it ends."""
    left, looked = list(submitted), time.monotonic()
    while left:
        gone = [one for one in left if _has_results(one) or (cluster == "local" and one.job.done())]
        if cluster == "slurm" and not gone and time.monotonic() - looked > _QUEUE_S:
            gone, looked = _not_queued(left), time.monotonic()
        _await_results(gone)
        for one in gone:
            left.remove(one)
            yield one, _ending(one, cluster)
        time.sleep(_POLL_S if left else 0)


def _await_results(gone: Sequence[Submitted]) -> None:
    until = time.monotonic() + _LATE_FILES_S
    while not all(map(_has_results, gone)) and time.monotonic() < until:
        time.sleep(_POLL_S / 10)


def _results(one: Submitted) -> list[Path]:
    return [Path(one.job.task(number).paths.result_pickle) for number in range(one.job.num_tasks)]


def _has_results(one: Submitted) -> bool:
    return all(path.exists() for path in _results(one))


def _not_queued(jobs: Sequence[Submitted]) -> list[Submitted]:
    """Those that Slurm has no more: killed, perhaps. squeue is asked since accounting is not everywhere."""
    told = subprocess.run(
        ["squeue", "--noheader", "--me", "--array", "--format=%i"], capture_output=True, text=True
    )
    if told.returncode:
        return []
    queued = set(told.stdout.split())
    return [one for one in jobs if one.id not in queued]


def _ending(one: Submitted, cluster: Cluster) -> Ending:
    """The exit code of the first task that failed."""
    from submitit.core.utils import pickle_load

    for path in _results(one):
        outcome, what = pickle_load(path) if path.exists() else ("error", "")
        if outcome == "error" and _ran_out(what, one.log, cluster):
            return Ending(ExitCode.PREEMPTED, f"its time limits are used up. {go_on(one.line.run)}")
        if outcome == "error":
            found = re.search(r"FailedRun: exit code (\d+)", what)
            return Ending(int(found[1]) if found else ExitCode.LAUNCH, _tail(one.log, what))
    return Ending(ExitCode.OK, "")


def _ran_out(result: str, log: Path, cluster: Cluster) -> bool:
    """Whether a job would have gone back into the queue, had it not been there too often.

    submitit says so, or leaves no result: on this machine it counts starts as well, which it does not tell.
    """
    return "timed-out too many times" in result or (
        cluster == "local" and not result and "Requeued job" in _tail(log, "")
    )


def _tail(log: Path, otherwise: str, lines: int = 20) -> str:
    try:
        return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return otherwise
