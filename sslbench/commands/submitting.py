"""The command that sends other commands to a cluster: submit."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sslbench.commands.options import AsJson, DryRun, Session
from sslbench.errors import ConfigError, ExitCode

if TYPE_CHECKING:
    from sslbench.launch.submission import Cluster, Ending, JobLine, Submitted

JOBS = ".jobs"


def submit(
    context: typer.Context,
    command: Annotated[
        list[str],
        typer.Argument(
            metavar="COMMAND", help="A command line of sslbench after --: pretrain or eval, with its options."
        ),
    ],
    cluster: Annotated[
        str, typer.Option(help="slurm, local (this machine), or auto: slurm where its commands are.")
    ] = "auto",
    nodes: Annotated[int, typer.Option(min=1, help="Nodes of each job.")] = 1,
    devices: Annotated[
        int, typer.Option(min=1, help="Processes on each node, with a GPU each unless train.device=cpu.")
    ] = 1,
    cpus: Annotated[int, typer.Option(min=1, help="Cores for each process.")] = 8,
    mem: Annotated[float | None, typer.Option(min=0, help="GB of memory on each node; 0: all of it.")] = None,
    hours: Annotated[float, typer.Option(min=0.001, help="Time limit of a job.")] = 12.0,
    requeues: Annotated[
        int,
        typer.Option(
            min=0,
            help="How often a job may reach its time limit, save, and go on later; on this machine 5 at most.",
        ),
    ] = 10,
    save_seconds: Annotated[
        int,
        typer.Option(min=10, help="How long before the time limit a run is told to save: less than half of it."),
    ] = 120,
    partition: Annotated[str | None, typer.Option(help="Slurm's partition.")] = None,
    account: Annotated[str | None, typer.Option(help="Slurm's account.")] = None,
    sbatch: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Another option of sbatch, such as qos=high. Repeatable."),
    ] = None,
    setup: Annotated[
        list[str] | None,
        typer.Option(metavar="LINE", help="Shell to run before the job, such as 'module load cuda'. Repeatable."),
    ] = None,
    array_limit: Annotated[
        int | None, typer.Option(min=1, help="Slurm: how many jobs of the array run at the same time.")
    ] = None,
    logs: Annotated[
        Path | None, typer.Option(help="Folder for logs, seen by all nodes; default: .jobs in the runs folder.")
    ] = None,
    wait: Annotated[
        bool, typer.Option("--wait", help="Wait for the jobs; the exit code is that of the first that fails.")
    ] = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
) -> None:
    """Send a pretraining or an evaluation to Slurm. A job that reaches its time limit goes on by itself."""
    from sslbench.commands.joblines import job_lines
    from sslbench.engine.console import Console
    from sslbench.launch.submission import Resources, choose_cluster, parameters, require_submitit
    from sslbench.launch.submission import submit as send
    from sslbench.report.listing import print_json

    require_submitit()
    session: Session = context.obj
    lines = job_lines(context, [word for word in command if word != "--dry-run"])
    dry_run = dry_run or "--dry-run" in command
    chosen = choose_cluster(cluster, needed=not dry_run)
    if (cluster, chosen) == ("auto", "local"):
        Console().info("sbatch and srun are not here: the jobs are for this machine (--cluster local)")
    resources = Resources(
        nodes=nodes,
        devices=devices,
        gpus=lines[0].gpu,
        cpus=cpus,
        mem=mem,
        hours=hours,
        save_seconds=save_seconds,
        requeues=_requeues(context, chosen, requeues),
        partition=partition,
        account=account,
        array_limit=array_limit,
        sbatch=_pairs(sbatch or ()),
        setup=tuple(setup or ()),
    )
    folder = _folder(logs or session.runs / JOBS, lines[0])
    told = parameters(chosen, folder.name, resources)
    if dry_run:
        _print_plan(chosen, folder, told, lines, as_json)
        return
    submitted = send(chosen, folder, told, resources, lines)
    if not as_json:
        _print_jobs(chosen, folder, submitted)
    elif not wait:
        print_json([_described(one, None) for one in submitted])
    if wait:
        _wait(chosen, submitted, as_json)


def _requeues(context: typer.Context, cluster: str, wanted: int) -> int:
    """What the cluster can do of it."""
    from sslbench.engine.console import Console
    from sslbench.launch.submission import LOCAL_REQUEUES

    if cluster == "slurm" or wanted <= LOCAL_REQUEUES:
        return wanted
    asked = context.get_parameter_source("requeues")
    if asked is not None and asked.name == "COMMANDLINE":
        Console().info(f"--requeues {wanted}: on this machine a job goes on {LOCAL_REQUEUES} times at most")
    return LOCAL_REQUEUES


def _pairs(words: Sequence[str]) -> dict[str, str | bool]:
    """``KEY=VALUE`` or ``--KEY=VALUE``; a word without a value is a switch."""
    pairs: dict[str, str | bool] = {}
    for word in words:
        key, has_value, value = word.lstrip("-").partition("=")
        if not key:
            raise ConfigError(f"--sbatch {word}: not KEY=VALUE", hint="--sbatch qos=high --sbatch constraint=a100")
        pairs[key] = value if has_value else True
    return pairs


def _folder(logs: Path, first: JobLine) -> Path:
    """Where the scripts and logs of this submission go; a new run's name stands for one submission."""
    name = first.group if first.run else f"{first.group}-{time.strftime('%Y%m%d-%H%M%S')}"
    return logs.expanduser().absolute() / name


def _print_plan(cluster: str, folder: Path, told: dict[str, Any], lines: Sequence[JobLine], as_json: bool) -> None:
    from sslbench.report.listing import print_json
    from sslbench.report.show import out

    commands = [f"sslbench {shlex.join(line.start)}" for line in lines]
    if as_json:
        jobs = [{"run": line.name, "command": text} for line, text in zip(lines, commands, strict=True)]
        print_json({"cluster": cluster, "folder": str(folder), "parameters": told, "jobs": jobs})
        return
    for key, value in {"cluster": cluster, "folder": folder, **told}.items():
        out().print(f"{key:>22}  {value}", markup=False)
    for text in commands:
        out().print(f"{'job':>22}  {text}", markup=False, soft_wrap=True)


def _described(one: Submitted, ending: Ending | None) -> dict[str, Any]:
    about = {"id": one.id, "run": one.line.name, "log": str(one.log), "command": shlex.join(one.line.start)}
    return about if ending is None else {**about, "exit_code": ending.code}


def _print_jobs(cluster: str, folder: Path, jobs: Sequence[Submitted]) -> None:
    from sslbench.report.show import out

    rows = [("job", "run", "log"), *((one.id, one.line.name, one.log.name) for one in jobs)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)) for row in rows]
    for text in [*lines, "", f"logs    {folder}", *_next(cluster, jobs)]:
        out().print(text, markup=False, soft_wrap=True)


def _next(cluster: str, jobs: Sequence[Submitted]) -> list[str]:
    """What to type to follow the jobs, and to end them."""
    first = jobs[0]
    number = first.id.split("_")[0]
    ids = " ".join(one.id for one in jobs)
    watch = f"squeue -j {number}" if cluster == "slurm" else f"ps -o pid,etime,args -p {ids.replace(' ', ',')}"
    end = f"scancel {number}" if cluster == "slurm" else f"kill {ids}"
    return [f"next    {watch}", f"        tail -f {shlex.quote(str(first.log))}", f"        {end}   ends them all"]


def _wait(cluster: Cluster, jobs: Sequence[Submitted], as_json: bool) -> None:
    """Show each job's end, and end with the exit code of the first that failed."""
    from sslbench.engine.console import Console
    from sslbench.launch.submission import wait
    from sslbench.report.listing import print_json

    console, endings = Console(), {}
    for one, ending in wait(cluster, jobs):
        endings[one.id] = ending
        console.info(f"{one.id}  {one.line.name}  exit code {ending.code}")
        if ending.code:
            console.info(f"{ending.tail}\n  the whole log: {one.log}")
    if as_json:
        print_json([_described(one, endings[one.id]) for one in jobs])
    code = next((ending.code for ending in endings.values() if ending.code), ExitCode.OK)
    if code:
        raise typer.Exit(code)


COMMANDS: dict[str, Callable[..., None]] = {"submit": submit}
SETTINGS = {"submit": {"allow_interspersed_args": False}}
"""All that follows the name of the other command belongs to that one."""
