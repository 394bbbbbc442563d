"""Runs that ``--devices`` starts: results, errors, exit codes, and starting again after a process has died."""

from __future__ import annotations

import os
import random
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from chaos import launching
from chaos.children import NOWHERE, Child, typed
from chaos.runs import View, expect_same, whole
from faults_kit import Command, command

from sslbench.launch import rendezvous
from sslbench.launch.addresses import free_port

__all__ = ["command"]

TINY = (
    "pretrain --method simclr --backbone conv4 method.hidden=8 method.out_dim=4 --dataset digits data.workers=0 "
    f"train.batch_size=64 train.epochs=1 train.log_every=1 probe.every=0 run.evals=[] run.tracking_uri={NOWHERE}"
)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2")
FAILING = '''
"""A method whose second rank fails at the third step."""
from sslbench import comm
from sslbench.errors import DataError
from sslbench_plugins.methods.simclr import SimCLR
from sslbench.plugin.hooks import hookimpl


class Failing(SimCLR):
    name = "failing"

    def before_step(self, progress):
        if progress.step == 2 and comm.rank() == 1:
            raise {error}


@hookimpl
def sslbench_methods():
    return [Failing]
'''


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ("--devices auto train.device=cpu", 2, "Config error: --devices auto counts CUDA devices"),
        ("--devices two train.device=cpu", 2, "Config error: --devices two"),
        ("--devices 2 train.device=cpu optim.lrr=1", 2, "optim.lrr"),
        ("--devices 2 --nnodes 2 train.device=cpu", 2, "Config error: --nnodes 2 needs a place"),
        ("--launch-id x", 2, "Config error: --launch-id is for several machines"),
        ("--devices 1 --nnodes 2 --rdzv-endpoint h:70000 train.device=cpu", 2, "h:70000: not HOST:PORT"),
    ],
)
def test_wrong_options_start_nothing(command: Command, options: str, code: int, message: str) -> None:
    assert message in command(f"{TINY} {options}", code).err
    assert not Path("runs").exists()


def test_a_port_of_another_program_is_named(command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that listens and never answers."""
    monkeypatch.setattr(rendezvous, "_ATTEMPT_S", 0.5)
    monkeypatch.setattr(rendezvous, "_TAKEN_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        line = f"{TINY} --devices 1 --nnodes 2 --rdzv-endpoint 127.0.0.1:{port} train.device=cpu"
        assert f"port {port} of this machine is in use by another program" in command(line, 6).err


def test_a_machine_that_nobody_knows_is_named(command: Command) -> None:
    where = "--rdzv-endpoint no.such.host.invalid:29400"
    assert f"{where}: nothing here knows" in command(f"{TINY} --devices 1 --nnodes 2 {where}", 6).err


@pytest.mark.slow
def test_a_machine_joins_and_another_is_asked_to_stop(tmp_path: Path) -> None:
    where = f"--nnodes 1:2 --rdzv-endpoint 127.0.0.1:{free_port()}"
    line = f"{TINY} train.epochs=500 run.name=both --devices 1 {where}"
    view = View(tmp_path)
    first = Child(line, tmp_path)
    assert first.wait_for(lambda: view.last_step() >= 5)
    second = Child(line, tmp_path)
    assert first.wait_for(lambda: "Resuming after step" in first.said)
    reached = view.last_step()
    assert first.wait_for(lambda: view.last_step() >= reached + 5)
    second.send(signal.SIGTERM)
    second.end(75)
    said = first.end(75)
    assert "Another machine has come" in said
    assert said.count("Preempted") == 1, "at the end, not when the machine came"
    assert "Launch error" not in said
    assert said.count("Run both: simclr") == 2


def test_two_devices_make_one_run(tmp_path: Path) -> None:
    said = typed(f"{TINY} train.limit=2 run.name=two --devices 2", tmp_path)
    assert said.count("Run two: simclr") == 1
    assert View(tmp_path).last_step() == 2
    assert not list((tmp_path / "runs" / ".launch").iterdir())


def test_a_run_without_a_checkpoint_begins_again_in_its_folder(tmp_path: Path) -> None:
    line = f"{TINY} train.limit=6 run.name=early"
    view = View(tmp_path)
    child = Child(line, tmp_path)
    assert child.wait_for(lambda: view.last_step() >= 2)
    assert child.kill()
    assert not view.resumable()
    before = view.the_run()
    assert "begins again with its first step" in typed("pretrain --resume early", tmp_path)
    assert view.the_run() == before
    expect_same(before, whole(line))


@pytest.mark.slow
def test_torchrun_gives_the_same_run(tmp_path: Path) -> None:
    line = f"{TINY} train.limit=8 checkpoint.every_steps=4"
    (tmp_path / "ours").mkdir()
    typed(f"{line} --devices 2", tmp_path / "ours")
    (tmp_path / "torchrun").mkdir()
    done = subprocess.run(
        [*TORCHRUN, "--standalone", "-m", "sslbench", *line.split()],
        cwd=tmp_path / "torchrun",
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expect_same(View(tmp_path / "torchrun").the_run(), View(tmp_path / "ours").the_run())


@pytest.mark.slow
def test_torchrun_starts_a_run_again_where_it_was(tmp_path: Path) -> None:
    line = f"{TINY} checkpoint.every_steps=2"
    view = View(tmp_path)
    with (tmp_path / "log").open("w") as log:
        torchrun = subprocess.Popen(
            [*TORCHRUN, "--max-restarts", "2", "--master-port", "29631", "-m", "sslbench", *line.split()],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
        )
        launching._wait(lambda: view.last_step() >= 5, [torchrun])
        os.kill(launching.ranks_of(torchrun.pid)[1], signal.SIGKILL)
        assert torchrun.wait(240) == 0, (tmp_path / "log").read_text()
    assert "Resuming after step" in (tmp_path / "log").read_text()
    assert len(list(tmp_path.glob("runs/digits/*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        ('DataError("image 7 is gone", hint="bring it back")', 4, "Data error: rank 1 on .*image 7 is gone"),
        ('ValueError("odd")', 6, "Launch error: rank 1 on .*ended with exit code 1.*odd.*log: .*after 1 restarts"),
    ],
)
def test_the_error_of_another_rank_is_told(tmp_path: Path, error: str, code: int, message: str) -> None:
    (tmp_path / "failing.py").write_text(FAILING.format(error=error))
    line = f"-p failing.py {TINY.replace('simclr', 'failing')} --devices 2 --max-restarts 1"
    child = Child(line, tmp_path)
    said = child.end(code)
    assert re.search(message, " ".join(said.split())), said
    assert said.count("Restart 1 of 1") == (1 if code == 6 else 0)


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait(tmp_path: Path) -> None:
    view = View(tmp_path)
    child = Child(f"{TINY} train.epochs=50 --devices 2", tmp_path)
    assert child.wait_for(lambda: view.last_step() >= 2)
    child.send(signal.SIGINT)
    child.end(130)


@pytest.mark.slow
def test_evaluations_are_shared(tmp_path: Path) -> None:
    typed(f"{TINY} train.limit=2 run.name=two", tmp_path)
    assert "top1" in typed("eval knn two --devices 2", tmp_path)
    assert "top1" in typed("eval knn two", tmp_path)


@pytest.mark.slow
def test_a_killed_rank_is_started_again(tmp_path: Path) -> None:
    launching.a_rank_is_killed(tmp_path, random.Random(3))


@pytest.mark.slow
def test_a_launcher_that_is_asked_to_stop_saves(tmp_path: Path) -> None:
    launching.the_launcher_is_asked_to_stop(tmp_path, random.Random(3))


@pytest.mark.slow
def test_a_rank_that_hangs_is_noticed(tmp_path: Path) -> None:
    launching.a_rank_hangs(tmp_path, random.Random(3))


@pytest.mark.slow
def test_a_machine_that_comes_back_goes_on(tmp_path: Path) -> None:
    try:
        with launching.two_machines():
            pass
    except PermissionError as error:
        pytest.skip(f"no network namespaces here: {error}")
    launching.a_machine_is_killed(tmp_path, random.Random(3))
