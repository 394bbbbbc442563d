"""Who joins whom: variables of torchrun and of Slurm, options of the launcher, and what ends of workers mean."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sslbench.errors import ConfigError, LaunchError, SslbenchError
from sslbench.launch.addresses import free_port, is_own_address, own_address
from sslbench.launch.agent import known_options
from sslbench.launch.environment import LAUNCH, LAUNCHER, RESTARTS, first_host, settle_environment, tasks_of_step
from sslbench.launch.identity import TAG, Asked, _find, launch_id
from sslbench.launch.report import Report, read_report, report_file, write_final_report, write_report
from sslbench.launch.request import LaunchRequest, at, meeting
from sslbench.launch.verdict import End, Verdict, judge

STEP = {
    "SLURM_JOB_ID": "1042",
    "SLURM_STEP_ID": "0",
    "SLURM_NTASKS": "4",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
}


def test_a_task_of_srun_finds_its_place() -> None:
    environ = dict(STEP)
    assert settle_environment(environ)
    assert environ["RANK"] == "3"
    assert environ["WORLD_SIZE"] == "4"
    assert environ["LOCAL_RANK"] == "1"
    assert environ["MASTER_ADDR"] == "gpu07"
    assert 1024 < int(environ["MASTER_PORT"]) < 32768


def test_all_tasks_of_a_step_agree_on_a_port_that_another_step_does_not_use() -> None:
    first, second, other = (dict(STEP, SLURM_PROCID=rank) for rank in "012")
    other["SLURM_STEP_ID"] = "1"
    for environ in (first, second, other):
        settle_environment(environ)
    assert first["MASTER_PORT"] == second["MASTER_PORT"] != other["MASTER_PORT"]


def test_what_the_user_says_about_the_meeting_place_stays() -> None:
    environ = STEP | {"MASTER_ADDR": "login", "MASTER_PORT": "29500"}
    settle_environment(environ)
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("login", "29500")


@pytest.mark.parametrize(
    "changed",
    [
        {"SLURM_STEP_ID": None},  # a batch script
        {"SLURM_STEP_ID": "4294967291"},  # as newer versions number it
        {"SLURM_STEP_ID": "4294967290"},  # an interactive shell
        {"SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks=1
        {"SLURM_STEP_NUM_TASKS": None, "SLURM_NTASKS": "1"},
        dict.fromkeys(STEP),  # no Slurm at all
    ],
)
def test_a_bare_command_in_a_batch_script_joins_nobody(changed: dict[str, str | None]) -> None:
    environ = {name: value for name, value in (STEP | changed).items() if value is not None}
    before = dict(environ)
    assert not settle_environment(environ)
    assert environ == before


def test_a_slurm_step_that_lacks_variables_names_them() -> None:
    environ = {name: STEP[name] for name in STEP if name not in ("SLURM_LOCALID", "SLURM_STEP_NODELIST")}
    with pytest.raises(LaunchError, match=r"4 tasks .* lacks SLURM_LOCALID, SLURM_STEP_NODELIST"):
        settle_environment(environ)


def test_variables_of_torchrun_win_over_those_of_slurm() -> None:
    ours = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "1"}
    environ = STEP | ours
    assert settle_environment(environ)
    assert {name: environ[name] for name in ours} == ours


PLACE = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "a", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("RANK", "first", "not a number"),
        ("RANK", "-1", "not a number"),
        ("RANK", "1.0", "not a number"),
        ("RANK", "²", "not a number"),
        ("RANK", "2", "not below WORLD_SIZE=2"),
        ("RANK", "3", "not below WORLD_SIZE=2"),
        ("WORLD_SIZE", "-2", "not a number"),
        ("WORLD_SIZE", "two", "not a number"),
        ("WORLD_SIZE", "0", "no processes"),
        ("LOCAL_RANK", "-1", "not a number"),
        ("LOCAL_RANK", "2", "not below WORLD_SIZE=2"),
        ("MASTER_PORT", "0", "not a port"),
        ("MASTER_PORT", "65536", "not a port"),
    ],
)
def test_a_place_that_cannot_be_is_refused_by_name(name: str, value: str, why: str) -> None:
    assert settle_environment(dict(PLACE))
    with pytest.raises(LaunchError, match=f"has {name}={value}, which is {why}") as caught:
        settle_environment(PLACE | {name: value})
    assert "torchrun" in (caught.value.hint or "")
    assert caught.value.exit_code == 6


def test_a_rank_beyond_the_world_ends_at_once(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**PLACE, "RANK": "3", "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(name, value)
    found = cli("pretrain", "--method", "random", "--dataset", "digits", "--backbone", "conv4", check=6)
    assert "RANK=3, which is not below WORLD_SIZE=2" in found.stderr


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[03-05,9],login1", "gpu03"),
        ("gpu[12,14]", "gpu12"),
        ("r[1-2]n[01-04]-ib,x", "r1n01-ib"),
        ("rack-a-[007-009]", "rack-a-007"),
        ("", ""),
    ],
)
def test_the_first_host_of_a_node_list(nodes: str, first: str) -> None:
    assert first_host(nodes) == first


def test_the_tasks_of_a_step() -> None:
    assert tasks_of_step(STEP) == 4
    assert tasks_of_step({}) == 1


def test_what_identifies_a_launch() -> None:
    assert launch_id({}) is None
    assert launch_id(STEP) == "slurm-1042.0"
    assert launch_id({"TORCHELASTIC_RUN_ID": "mine"}) == "mine"
    assert launch_id({LAUNCH: "ours", "TORCHELASTIC_RUN_ID": "mine"}) == "ours"
    unnamed = launch_id({"TORCHELASTIC_RUN_ID": "none"})
    assert unnamed == launch_id({"TORCHELASTIC_RUN_ID": "none"}) != "none"


def test_a_worker_remembers_how_often_it_was_started_again() -> None:
    script = (
        "import os; from sslbench.launch.environment import settle_environment as settle; settle(); settle(); "
        f"print(os.environ['{RESTARTS}'], os.environ['TORCHELASTIC_RESTART_COUNT'])"
    )
    environ = {**os.environ, LAUNCHER: str(os.getpid()), "TORCHELASTIC_RESTART_COUNT": "2"}
    environ.pop(RESTARTS, None)
    # In a process of its own: it asks to be killed together with its launcher.
    said = subprocess.run([sys.executable, "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert said.stdout.split() == ["2", "0"]


def recorded(root: Path, name: str, status: str, identity: str, start: str = "") -> Path:
    tags = {TAG: identity, "sslbench.config_hash": "c", "sslbench.start": start}
    record = {"run_id": name, "name": name, "kind": "pretrain", "status": status, "tags": tags}
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(record))
    return folder


FIRST = {LAUNCH: "x", RESTARTS: "0"}
AGAIN = {LAUNCH: "x", RESTARTS: "1"}


@pytest.mark.parametrize(
    ("status", "identity", "environ", "continues"),
    [
        ("FINISHED", "10.0.0.1:29400", FIRST, False),  # an address that is used again
        ("FINISHED", "10.0.0.1:29400", AGAIN, True),
        ("RUNNING", "10.0.0.1:29400", FIRST, True),  # the launcher was killed and typed again
        ("FAILED", "10.0.0.1:29400", FIRST, True),
        ("FINISHED", "0123abcd", FIRST, True),  # nobody else has this id
        ("FINISHED", "mine", {}, False),  # torchrun
        ("FINISHED", "mine", {"TORCHELASTIC_RESTART_COUNT": "1"}, True),
    ],
)
def test_which_run_a_launch_continues(
    tmp_path: Path, status: str, identity: str, environ: dict[str, str], continues: bool
) -> None:
    folder = recorded(tmp_path, "one", status, identity)
    assert _find(tmp_path, Asked(identity, "c", None, ""), environ) == (folder if continues else None)


def test_a_run_that_is_not_what_was_asked_for_is_passed_over(tmp_path: Path) -> None:
    folder = recorded(tmp_path, "one", "KILLED", "h:1", start="sha")
    recorded(tmp_path, "two", "FINISHED", "h:1", start="sha")
    recorded(tmp_path, "numbered-2", "KILLED", "h:1", start="other")
    assert _find(tmp_path, Asked("h:1", "c", None, "sha"), FIRST) == folder
    assert _find(tmp_path, Asked("h:1", "c", "one", "sha"), FIRST) == folder
    assert _find(tmp_path, Asked("h:1", "c", "numbered", "other"), FIRST) == tmp_path / "numbered-2"
    for other in (Asked("h:1", "c", "three", "sha"), Asked("h:1", "c", None, ""), Asked("h:1", "d", None, "sha")):
        assert _find(tmp_path, other, AGAIN) is None


def test_options_that_older_versions_of_torch_lack_are_left_out() -> None:
    def older(death_sig: int) -> None: ...
    def newer(death_sig: int, timeout: int) -> None: ...

    assert known_options(older, timeout=10) == {}
    assert known_options(newer, timeout=10) == {"timeout": 10}


@pytest.mark.parametrize(
    ("request_", "environ", "message"),
    [
        (LaunchRequest(devices="2", nnodes="0"), {}, "neither a number nor MIN:MAX"),
        (LaunchRequest(devices="2", nnodes="3:2"), {}, "neither a number nor MIN:MAX"),
        (LaunchRequest(rdzv_endpoint="auto"), {}, "--rdzv-endpoint is for several machines"),
        (LaunchRequest(devices="2", rdzv_endpoint="h:1"), {}, "--rdzv-endpoint is for several machines"),
        (LaunchRequest(devices="1", node_rank=1), {}, "--node-rank is for several machines"),
        (LaunchRequest(devices="2"), STEP, "each of 4 Slurm tasks"),
        (
            LaunchRequest(devices="2"),
            dict.fromkeys(("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"), "1"),
            "already started by a launcher",
        ),
    ],
)
def test_options_that_do_not_fit(request_: LaunchRequest, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        request_.starts_processes(environ)


def test_who_starts_processes() -> None:
    assert LaunchRequest(devices="2").starts_processes({})
    assert LaunchRequest(devices="1", nnodes="2").starts_processes({})
    assert not LaunchRequest(devices="1").starts_processes({})
    assert not LaunchRequest().starts_processes({})
    assert not LaunchRequest(devices="2").starts_processes({LAUNCH: "x"}), "a worker has the same command line"


@pytest.mark.parametrize(
    ("devices", "gpus", "message", "code"),
    [
        ("4", 2, "this machine has 2 CUDA devices", 6),
        ("1", 0, "this machine has 0 CUDA devices", 6),
        ("auto", None, "this run uses the CPU", 2),
        ("two", None, "neither a number nor auto", 2),
        ("0", None, "neither a number nor auto", 2),
    ],
)
def test_devices_that_are_not_there(devices: str, gpus: int | None, message: str, code: int) -> None:
    with pytest.raises(SslbenchError, match=message) as caught:
        LaunchRequest(devices=devices).processes(gpus)
    assert caught.value.exit_code == code


def test_auto_takes_every_cuda_device() -> None:
    assert LaunchRequest(devices="auto").processes(8) == 8
    assert LaunchRequest(devices="3").processes(None) == 3


def test_machines_meet_where_the_user_says() -> None:
    with pytest.raises(ConfigError, match="--nnodes 2 needs a place"):
        meeting(LaunchRequest(devices="1", nnodes="2"), {})
    with pytest.raises(ConfigError, match="not HOST:PORT"):
        meeting(LaunchRequest(devices="1", nnodes="2", rdzv_endpoint="somewhere"), {})
    typed = LaunchRequest(devices="1", nnodes="2", rdzv_endpoint="10.0.0.1:29400")
    assert meeting(typed, {}).launch_id == meeting(typed, {}).launch_id
    place = meeting(LaunchRequest(devices="1", nnodes="2", rdzv_endpoint="auto"), {})
    assert place.announced
    assert is_own_address(place.host)
    typed = at(LaunchRequest(devices="1", nnodes="2", rdzv_endpoint="auto"), place)
    assert meeting(typed, {}) == meeting(typed, {})
    assert (meeting(typed, {}).host, meeting(typed, {}).port) == (place.host, place.port)


def test_launchers_of_a_slurm_step_meet_without_being_told() -> None:
    places = [meeting(LaunchRequest(devices="8", nnodes="4"), dict(STEP, SLURM_PROCID=n)) for n in "03"]
    assert places[0] == places[1]
    assert places[0].host == "gpu07"


def test_addresses_of_this_machine() -> None:
    assert is_own_address("127.0.0.1")
    assert is_own_address(own_address())
    assert not is_own_address("192.0.2.7")
    assert 0 < free_port() < 65536


LOST = Report("Launch error", "rank 0: rank 1 is gone", None, lost=True)
TOLD = Report("Data error", "no images", "look for them", lost=False)
DONE = Report("Error", "an evaluation failed", None, lost=False, final=True)
KILLED = -signal.SIGKILL


@pytest.mark.parametrize(
    ("ends", "asked", "verdict"),
    [
        ({0: End(0), 1: End(0)}, None, Verdict(0, None, final=True)),
        ({0: End(6, LOST), 1: End(KILLED)}, None, Verdict(6, 1, final=False)),
        ({0: End(6, LOST), 1: End(KILLED, None, cleared=True)}, None, Verdict(6, 0, final=False)),
        ({0: End(1), 1: End(6, LOST)}, None, Verdict(6, 0, final=False)),
        ({0: End(1), 1: End(1)}, None, Verdict(6, 0, final=False)),
        ({0: End(1, DONE), 1: End(1, DONE)}, None, Verdict(1, 0, final=True)),
        ({0: End(1, DONE), 1: End(0)}, None, Verdict(1, 0, final=True)),
        ({0: End(0, DONE), 1: End(KILLED)}, None, Verdict(6, 1, final=False)),
        ({0: End(6, LOST), 1: End(4, TOLD)}, None, Verdict(4, 1, final=True)),
        ({0: End(7), 1: End(7)}, None, Verdict(7, 0, final=True)),
        ({0: End(6), 1: End(6, LOST)}, None, Verdict(6, 0, final=True)),
        ({0: End(75), 1: End(75)}, None, Verdict(75, 0, final=True)),
        ({0: End(75), 1: End(75)}, signal.SIGTERM, Verdict(75, None, final=True)),
        ({0: End(130), 1: End(75)}, signal.SIGINT, Verdict(130, None, final=True)),
        ({0: End(-signal.SIGTERM), 1: End(6, LOST)}, signal.SIGTERM, Verdict(75, None, final=True)),
        ({0: End(5, TOLD), 1: End(75)}, signal.SIGUSR1, Verdict(5, 0, final=True)),
        ({0: End(0), 1: End(0)}, signal.SIGTERM, Verdict(0, None, final=True)),
    ],
)
def test_what_ends_of_workers_mean(ends: dict[int, End], asked: int | None, verdict: Verdict) -> None:
    assert judge(ends, asked) == verdict


def test_a_worker_tells_its_launcher_why_it_ended(tmp_path: Path) -> None:
    environ = {"SSLBENCH_LAUNCH_FOLDER": str(tmp_path), "RANK": "1"}
    write_report(LaunchError("over", hint="again"), lost=True, environ=environ)
    assert read_report(tmp_path, 1) == Report("Launch error", "over", "again", lost=True)
    write_final_report("an evaluation failed", environ)
    assert read_report(tmp_path, 1) == Report("Error", "an evaluation failed", None, lost=False, final=True)
    report_file(tmp_path, 1).write_text("{")
    assert read_report(tmp_path, 1) is None
    write_report(LaunchError("over"), lost=False, environ={})
