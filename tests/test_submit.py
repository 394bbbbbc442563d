"""Commands sent to a cluster: submitit's local executor runs them for real."""

from __future__ import annotations

import inspect
import json
import os
import pickle
import re
import shlex
import signal
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest
import torch
from faults_kit import Command, command, run_dir, status

from sslbench.commands.joblines import _new_run
from sslbench.commands.options import Session
from sslbench.commands.submitting import _pairs
from sslbench.errors import ConfigError
from sslbench.launch.slurm_job import FailedRun, Task, launch_environment
from sslbench.launch.submission import LOCAL_REQUEUES, Ending, JobLine, Resources, Submitted, parameters, wait
from sslbench.plugin.catalog import Catalog

__all__ = ["command"]

TINY = (
    "--method simclr --backbone conv4 method.hidden=8 method.out_dim=4 --dataset digits train.batch_size=256 "
    "train.device=cpu probe.every=0 run.evals=[]"
)
LIMIT_S = 240


def plan(command: Command, line: str) -> dict:
    return json.loads(command(f"submit --cluster slurm --dry-run --json {line}").out)


def words(job: dict) -> list[str]:
    return shlex.split(job["command"])


# What is submitted


def test_seeds_become_an_array_of_runs_with_names_fixed_now(command: Command) -> None:
    found = plan(command, f"-- pretrain {TINY} --seeds 3,1 run.name=exp --limit 5")
    first, second = found["jobs"]
    assert [job["run"] for job in found["jobs"]] == ["exp-s3", "exp-s1"]
    assert "--seeds" not in words(first)
    assert words(first)[-2:] == ["run.seed=3", "run.name=exp-s3"]
    assert words(second)[-2:] == ["run.seed=1", "run.name=exp-s1"]
    assert words(first)[words(first).index("--limit") :][:2] == ["--limit", "5"]
    assert found["folder"] == str(Path("runs/.jobs/exp").absolute())


def test_a_run_without_a_name_gets_one_and_the_command_may_follow_without_dashes(command: Command) -> None:
    (job,) = plan(command, f"pretrain {TINY}")["jobs"]
    assert job["run"].startswith("simclr-digits-conv4-s1-")
    assert f"run.name={job['run']}" in words(job)


def test_the_resources_are_those_of_sbatch(command: Command) -> None:
    line = (
        "--nodes 2 --devices 4 --cpus 6 --mem 3.5 --hours 1.5 --partition gpu --account me --array-limit 2 "
        f"--sbatch qos=high --save-seconds 60 -- pretrain {TINY} train.device=auto"
    )
    told = plan(command, line)["parameters"]
    assert told["nodes"] == 2
    assert told["ntasks_per_node"] == told["gpus_per_node"] == 4
    assert told["cpus_per_task"] == 6
    assert told["mem"] == "3584M"
    assert told["time"] == 90
    assert (told["partition"], told["account"]) == ("gpu", "me")
    assert told["array_parallelism"] == 2
    assert told["additional_parameters"] == {"qos": "high"}
    assert told["signal_delay_s"] == 60


def test_a_run_on_the_cpu_asks_for_no_gpu(command: Command) -> None:
    assert "gpus_per_node" not in plan(command, f"pretrain {TINY}")["parameters"]


def test_slurm_takes_the_parameters() -> None:
    from submitit.slurm.slurm import _get_default_parameters, _make_sbatch_string

    resources = Resources(
        1,
        2,
        True,
        8,
        4.0,
        12.0,
        120,
        10,
        "gpu",
        "me",
        2,
        _pairs(["qos=high", "--exclusive"]),
        ("module load cuda",),
    )
    told = parameters("slurm", "exp", resources)
    assert set(told) <= set(_get_default_parameters())
    script = _make_sbatch_string(command="python", folder="logs", map_count=3, **told)
    for line in ("--qos=high", "--array=0-2%2", "--gpus-per-node=2", "--signal=USR2@120", "--time=720"):
        assert f"#SBATCH {line}" in script
    assert "#SBATCH --exclusive\n" in script
    assert "\nmodule load cuda\n" in script
    assert "srun --unbuffered" in script


def test_results_that_a_file_system_shows_late_count(tmp_path: Path) -> None:
    file, log = tmp_path / "result.pkl", tmp_path / "log"
    paths = SimpleNamespace(result_pickle=file, stdout=log)
    job = SimpleNamespace(num_tasks=1, task=lambda number: SimpleNamespace(paths=paths), done=lambda: True)
    late = threading.Timer(0.5, lambda: file.write_bytes(pickle.dumps(("success", None))))
    late.start()
    ((_, ending),) = wait("local", [Submitted(job, JobLine("one", "one", ()))])
    late.join()
    assert ending == Ending(0, "")


# What is refused before it costs queue time


@pytest.mark.parametrize(
    ("line", "code", "says"),
    [
        (f"pretrain {TINY} optim.nmae=sgd", 2, "did you mean 'name'"),
        (f"pretrain {TINY} --seeds 1,1", 2, "different numbers"),
        ("pretrain --recipe no/such", 2, "no recipe is named"),
        ("pretrian", 2, "did you mean 'pretrain'"),
        (f"pretrain {TINY} --devices 2", 2, "submit --nodes N --devices N"),
        ("eval linear nothing", 5, "no run in"),
        (f"--nodes 2 pretrain {TINY}", 2, "one node"),
        (f"--sbatch =x pretrain {TINY}", 2, "not KEY=VALUE"),
        (f"--sbatch exclusive --mem 2 pretrain {TINY}", 2, "--mem, --sbatch: for Slurm"),
        (
            f"--partition gpu --account me --array-limit 1 pretrain {TINY}",
            2,
            "--partition, --account, --array-limit",
        ),
        (f"--cluster pbs pretrain {TINY}", 2, "no such cluster"),
        ("pretrain --help", 2, "shows something and runs nothing: sslbench pretrain --help"),
        ("eval --help", 2, "type it without submit"),
        (f"--hours 0.05 pretrain {TINY}", 2, "--save-seconds 120 is not below half of the time limit of 180 s"),
        (f"--hours 0.001 --save-seconds 10 pretrain {TINY}", 2, "Next: --hours"),
    ],
)
def test_what_cannot_run_is_not_submitted(command: Command, line: str, code: int, says: str) -> None:
    local = "" if "--cluster" in line else "--cluster local"
    assert says in command(f"submit {local} {line}", code).err
    assert not Path("runs/.jobs").exists()


def resources(hours: float, save_seconds: int) -> Resources:
    return Resources(1, 1, False, 1, None, hours, save_seconds, 10)


@pytest.mark.parametrize(
    ("hours", "save_seconds", "advice"),
    [
        (1, 7200, "--save-seconds 900, or --hours 4.017"),
        (1, 1800, "--save-seconds 900, or --hours 1.017"),
        (0.01, 120, "--save-seconds 15, or --hours 0.084"),
        (0.01, 30, "--save-seconds 15, or --hours 0.034"),
    ],
)
@pytest.mark.parametrize("cluster", ["slurm", "local"])
def test_a_run_is_not_told_to_save_in_the_first_half_of_its_time(
    cluster: Literal["slurm", "local"], hours: float, save_seconds: int, advice: str
) -> None:
    with pytest.raises(ConfigError, match=rf"--save-seconds {save_seconds} .*--hours {hours:g}") as caught:
        parameters(cluster, "exp", resources(hours, save_seconds))
    if cluster == "slurm":  # which counts in minutes
        assert caught.value.hint == advice
    for option, value in re.findall(r"--(\S+) ([0-9.]+)", caught.value.hint or ""):
        changed = {"hours": hours, "save_seconds": save_seconds} | {option.replace("-", "_"): float(value)}
        assert parameters(cluster, "exp", resources(changed["hours"], int(changed["save_seconds"])))


def test_a_job_on_this_machine_goes_on_as_often_as_it_can(command: Command) -> None:
    line = f"--dry-run pretrain {TINY}"
    assert "5 times at most" in command(f"submit --cluster local --requeues 6 {line}").err
    assert "at most" not in command(f"submit --cluster local --requeues 5 {line}").err
    assert "at most" not in command(f"submit --cluster local {line}").err
    assert "at most" not in command(f"submit --cluster slurm --requeues 20 {line}").err


def test_submitit_starts_a_job_on_this_machine_once_more_than_it_goes_on() -> None:
    from submitit.local.local import Controller

    assert inspect.signature(Controller.run).parameters["max_retry"].default == LOCAL_REQUEUES + 1


@pytest.mark.parametrize(
    ("result", "log", "code"),
    [
        ("UncompletedJobError: Job not requeued because: timed-out too many times.", "", 75),
        (None, "submitit INFO - Requeued job 12 (3 remaining timeouts)\n", 75),
        (None, "Killed\n", 6),
        ("FailedRun: exit code 7", "Requeued job 12 (3 remaining timeouts)\n", 7),
    ],
)
def test_a_job_without_time_left_tells_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, result: str | None, log: str, code: int
) -> None:
    monkeypatch.setattr("sslbench.launch.submission._LATE_FILES_S", 0.0)
    paths = SimpleNamespace(result_pickle=tmp_path / "result.pkl", stdout=tmp_path / "log")
    paths.stdout.write_text(log)
    if result is not None:
        paths.result_pickle.write_bytes(pickle.dumps(("error", result)))
    job = SimpleNamespace(num_tasks=1, task=lambda number: SimpleNamespace(paths=paths), done=lambda: True)
    ((_, ending),) = wait("local", [Submitted(job, JobLine("one", "one", (), run=tmp_path / "one"))])
    assert ending.code == code
    assert ("submit ... -- pretrain --resume one" in ending.tail) == (code == 75)


def test_without_slurm_or_submitit_the_error_says_what_to_do(
    command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert "--cluster local" in command(f"submit --cluster slurm pretrain {TINY}", 6).err
    shown = command(f"submit --dry-run pretrain {TINY}")
    assert "for this machine (--cluster local)" in shown.err
    monkeypatch.setitem(sys.modules, "submitit", None)
    assert "pip install 'sslbench[slurm]'" in command(f"submit pretrain {TINY}", 6).err


def test_a_taken_name_is_refused_and_last_is_fixed_now(command: Command) -> None:
    command("pretrain --method random --backbone conv4 --dataset digits run.evals=[] run.name=first")
    assert "a run named 'first'" in command(f"submit --cluster local pretrain {TINY} run.name=first", 2).err
    (job,) = plan(command, "pretrain --resume last")["jobs"]
    assert words(job)[-2:] == ["--resume", "first"]
    for line in ("eval knn", "eval knn last", "eval knn first k=5", "eval knn k=5"):
        (job,) = plan(command, line)["jobs"]
        assert str(run_dir("first")) in words(job)
        assert job["run"] == "knn-first"
        assert "last" not in words(job)
        assert ("k=5" in words(job)) == ("k=5" in line)
    Path("runs/.jobs/again").mkdir(parents=True)
    assert "submitted before" in command(f"submit --cluster local pretrain {TINY} run.name=again", 2).err


def test_a_job_that_starts_again_keeps_what_is_not_in_the_configuration_of_its_run(workdir: Path) -> None:
    given = ["pretrain", "--init-from", "first", "--peer-timeout=30", "--limit", "5", "--json"]
    line = _new_run(Session(Catalog(), None, workdir), given, "next", "next", gpu=False)
    assert line.resume is not None
    resumed = ["pretrain", "--resume", "next", "--init-from", "first", "--peer-timeout", "30", "--json"]
    assert list(line.resume)[-len(resumed) :] == resumed


def test_ranks_find_each_other_by_torchruns_variables() -> None:
    task = Task(rank=5, tasks=8, local_rank=1, nodes=2, host="n1", attempt="", slurm=True)
    found = launch_environment(task, 29511)
    assert found == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "n1",
        "MASTER_PORT": "29511",
    }
    assert launch_environment(task._replace(rank=0, tasks=1, nodes=1), 1) == {}


def test_a_failed_run_is_an_exception_that_ends_a_process_with_its_code() -> None:
    assert isinstance(FailedRun(7), Exception)
    assert FailedRun(7).code == 7


# Jobs that run


def submitted(command: Command, line: str) -> list[dict]:
    return json.loads(command(f"submit --cluster local --json {line}").out)


def child_of(pid: int) -> int | None:
    """The only child of a process."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    words = children.read_text().split() if children.exists() else []
    return int(words[0]) if words else None


def wait_for(condition, what: str, log: Path):  # type: ignore[no-untyped-def]
    until = time.monotonic() + LIMIT_S
    while time.monotonic() < until:
        if found := condition():
            return found
        time.sleep(0.02)
    pytest.fail(f"{what}: {log.read_text() if log.exists() else 'no log'}")


def weights(name: str) -> dict[str, torch.Tensor]:
    newest = max(run_dir(name).glob("checkpoints/step-*"))
    return torch.load(newest / "state.pt", weights_only=True)["method"]


@pytest.mark.slow
def test_an_array_of_two_seeds_runs_to_its_end(command: Command) -> None:
    found = command(
        f"submit --cluster local --wait --json pretrain {TINY} train.epochs=1 --seeds 1,2 run.name=two"
    )
    jobs = json.loads(found.out)
    assert [job["exit_code"] for job in jobs] == [0, 0]
    assert [job["run"] for job in jobs] == ["two-s1", "two-s2"]
    assert [status(job["run"]) for job in jobs] == ["FINISHED", "FINISHED"]
    assert "5 steps" in Path(jobs[0]["log"]).read_text()
    shown = command("submit --cluster local --wait eval knn two-s2")
    assert "knn-two-s2" in shown.out
    assert "tail -f" in shown.out


@pytest.mark.slow
def test_a_failing_job_shows_its_exit_code_and_log(command: Command) -> None:
    line = f"pretrain {TINY} optim.name=sgd optim.lr=1e30 run.name=bad"
    found = command(f"submit --cluster local --wait {line}", 7)
    assert "exit code 7" in found.err
    assert "diverged" in found.err
    assert status("bad") == "FAILED"


@pytest.mark.slow
def test_a_job_at_its_time_limit_saves_and_goes_on_to_the_same_bits(command: Command) -> None:
    line = f"pretrain {TINY} train.epochs=12 train.log_every=1"
    command(f"{line} run.name=whole")
    (job,) = submitted(command, f"{line} run.name=parts")
    log, journal = Path(job["log"]), Path("runs/parts/metrics.jsonl")
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 5, "no step", log)
    task = child_of(int(job["id"]))
    assert task is not None
    os.kill(task, signal.SIGUSR2)  # what submitit sends at the time limit
    wait_for(lambda: child_of(int(job["id"])) not in (None, task), "not started again", log)
    wait_for(lambda: status("parts") == "FINISHED", "not finished", log)
    text = log.read_text()
    assert "Resuming after step" in text
    starts = Path(log.parent, "parts.starts").read_text().splitlines()
    assert [json.loads(line)["words"][-2:] for line in starts][1] == ["--resume", "parts"]
    whole, parts = weights("whole"), weights("parts")
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    assert len(list(Path("runs").glob("parts*"))) == 1


@pytest.mark.slow
def test_a_job_whose_time_is_used_up_is_continued_by_what_it_says(command: Command) -> None:
    limits = "--cluster local --wait --hours 0.012 --save-seconds 20 --requeues 0"
    found = command(f"submit {limits} pretrain {TINY} train.epochs=100000 run.name=long", 75)
    assert "time limits are used up" in found.err
    assert "submit ... -- pretrain --resume long" in found.err
    (log,) = Path("runs/.jobs/long").glob("*.out")
    assert "does not go back into the queue any more. To go on: sslbench submit" in log.read_text()
    assert status("long") == "KILLED"
    (job,) = plan(command, "pretrain --resume long")["jobs"]
    assert words(job)[-2:] == ["--resume", "long"]


@pytest.mark.slow
def test_a_job_stopped_before_its_first_step_starts_the_same_run(command: Command) -> None:
    (job,) = submitted(command, f"pretrain {TINY} train.epochs=1 run.name=early")
    log = Path(job["log"])
    task = wait_for(lambda: child_of(int(job["id"])), "no task", log)
    wait_for(lambda: child_of(task), "no run", log)
    os.kill(task, signal.SIGUSR2)
    wait_for(lambda: Path("runs/early/run.json").exists() and status("early") == "FINISHED", "not finished", log)
    assert len(list(Path("runs").glob("early*"))) == 1


@pytest.mark.slow
def test_two_tasks_of_a_job_train_together_and_are_requeued_together(command: Command) -> None:
    line = f"pretrain {TINY} train.epochs=6 train.log_every=1 run.name=pair"
    (job,) = submitted(command, f"--devices 2 {line}")
    log, journal = Path(job["log"]), Path("runs/pair/metrics.jsonl")
    wait_for(lambda: journal.exists() and len(journal.read_text().splitlines()) > 3, "no step", log)
    children = Path(f"/proc/{job['id']}/task/{job['id']}/children").read_text().split()
    for task in children:
        os.kill(int(task), signal.SIGUSR2)
    wait_for(lambda: "Resuming after step" in log.read_text(), "not resumed", log)
    wait_for(lambda: status("pair") == "FINISHED", "not finished", log)
    record = json.loads((run_dir("pair") / "run.json").read_text())
    assert record["tags"]["sslbench.world"] == "2"
