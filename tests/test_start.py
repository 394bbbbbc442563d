"""From a command to its first step: what is imported where, and the process that talks to MLflow."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sslbench.engine import untraced
from sslbench.tracking.process import StoreProcess, open_store
from sslbench.tracking.store import RejectedError, StoreError

RUN = "pretrain --method simclr --dataset digits --backbone conv4 --limit 1 --no-evals probe.every=0"
#: Each takes about as long as the rest of a start.
LATER = ("mlflow", "pandas", "sqlalchemy", "torch._dynamo", "torch._inductor", "sympy", "torchvision", "sklearn")


def test_a_run_starts_without_what_it_does_not_need(workdir: Path) -> None:
    code = (
        f"import sys; from sslbench.cli import run; code = run({RUN.split()!r});"
        f"print(code, *sorted(set({LATER!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0", done.stdout + done.stderr
    assert "MLflow" not in done.stderr
    assert (workdir / "mlflow.db").exists()


@pytest.mark.parametrize(
    ("ours", "kind", "options"),
    [
        (untraced.SGD, torch.optim.SGD, {"momentum": 0.9, "nesterov": True, "foreach": True}),
        (untraced.Adam, torch.optim.Adam, {"fused": True}),
        (untraced.AdamW, torch.optim.AdamW, {"fused": True, "weight_decay": 0.1}),
    ],
)
def test_an_optimiser_steps_as_torchs_own(ours: type, kind: type, options: dict[str, object]) -> None:
    def trained(cls: type) -> tuple[torch.Tensor, dict[str, object]]:
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 3)
        optimizer = cls(layer.parameters(), lr=0.1, **options)
        for step in range(6):
            if step == 3:  # as a run that resumes
                state = optimizer.state_dict()
                optimizer = cls(layer.parameters(), lr=0.1, **options)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            layer(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        return layer.weight.detach(), optimizer.state_dict()

    (weight, state), (expected, expected_state) = trained(ours), trained(kind)
    assert torch.equal(weight, expected)
    assert state["param_groups"] == expected_state["param_groups"]


@pytest.fixture
def process() -> StoreProcess:
    return StoreProcess()


def test_errors_of_the_store_come_back_as_they_are(process: StoreProcess, tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("this is no database")
    with pytest.raises((StoreError, RejectedError), match="file is not a database"):
        process.call("open", f"sqlite:///{tmp_path / 'mlflow.db'}", False, {})
    with pytest.raises(StoreError, match="no attribute"):
        process.call("no such function")
    process.close()


def test_a_call_does_not_outlive_the_process(process: StoreProcess) -> None:
    os.kill(process._child.pid, signal.SIGKILL)
    with pytest.raises(StoreError, match="has ended"):
        process.call("open", "sqlite:///mlflow.db", False, {})
    assert not process.alive


def test_signals_for_the_run_leave_the_process_alone(process: StoreProcess, tmp_path: Path) -> None:
    with pytest.raises(StoreError):  # it is up now
        process.call("no such function")
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        os.kill(process._child.pid, number)
    with pytest.raises(StoreError, match="no attribute"):
        process.call("no such function")
    process.close()


def test_the_process_ends_with_a_killed_command(tmp_path: Path) -> None:
    code = (
        "from sslbench.tracking.process import store_process; import time;"
        "print(store_process()._child.pid, flush=True); time.sleep(600)"
    )
    command = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    assert command.stdout is not None
    child = int(command.stdout.readline())
    command.kill()
    command.wait()
    command.stdout.close()
    deadline = time.monotonic() + 60
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False


def test_a_store_that_cannot_be_opened_is_tried_again(workdir: Path) -> None:
    folder = workdir / "later"
    folder.write_text("a file")
    with pytest.raises((StoreError, RejectedError)):
        open_store(f"sqlite:///{folder / 'mlflow.db'}", patient=False)
    folder.unlink()
    assert open_store(f"sqlite:///{folder / 'mlflow.db'}", patient=False)
