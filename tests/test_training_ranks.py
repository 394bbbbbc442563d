"""One process, two that hold the whole model, and two that share it train alike and read each other's states."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Cli
from sslbench_plugins.methods import byol, supervised, swav
from torch import Tensor
from training_kit import CPU, Run, make, spawn

from sslbench import comm
from sslbench.engine.stopping import StopSignal
from sslbench.engine.trained import WholeBackbone

pytestmark = pytest.mark.slow  # starts two processes

LARS = {"name": "lars", "lr": 0.5, "trust": 0.1, "weight_decay": 0.01}
FEW: dict[str, Any] = {"hidden": 9, "out_dim": 5}
GENTLE = {"name": "sgd", "lr": 0.01}
TOLERANCES = {"fp16": 2e-3}
"""Half precision rounds to 1e-3. Of the others 1e-5."""
RUNS: dict[str, tuple[Any, dict[str, Any], dict[str, Any]]] = {
    "byol-adamw": (byol.BYOL, FEW, {"optim": {"lr": 0.01}, "train": {"clip_grad": 0.1}}),
    "byol-lars": (byol.BYOL, FEW, {"optim": LARS}),
    "byol-lars-separate": (byol.BYOL, FEW, {"optim": LARS | {"lars_norm": "separate"}}),
    "swav-sgd": (
        swav.SwAV,
        {"prototypes": 5, "hidden": 9, "out_dim": 5, "freeze_steps": 2},
        {"optim": {"name": "sgd"}},
    ),
    "shared-norm": (byol.BYOL, FEW | {"norm": True}, {"optim": GENTLE}),
    "recomputed": (byol.BYOL, FEW | {"norm": True}, {"optim": GENTLE, "train": {"checkpoint_activations": True}}),
    "accumulated": (supervised.Supervised, {}, {"train": {"accumulate": 3}, "optim": {"name": "sgd"}}),
    "fp16": (byol.BYOL, FEW, {"train": {"precision": "fp16"}, "optim": {"lr": 0.01}}),
}


def a_run(name: str, parallel: str) -> Run:
    cls, options, core = RUNS[name]
    return Run(make(cls, **options), **{**core, "train": {**core.get("train", {}), "parallel": parallel}})


def on_ranks() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in RUNS:
        for parallel in ("ddp", "fsdp"):
            run = a_run(name, parallel)
            exported = WholeBackbone(run.method, CPU)
            run.train()
            state, backbone = run.trained.state(), run.trained.exported_state()
            found[name, parallel] = {
                "lines": run.log.lines,
                "state": state if comm.rank() == 0 else None,
                "backbone": backbone if comm.rank() == 0 else None,
                "probed": exported().state_dict(),
                "sharded": sum(comm.is_sharded(p) for p in run.method.parameters()),
            }
    return found


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(on_ranks, tmp_path_factory.mktemp("ranks"))


def tensors(state: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(state, Tensor):
        return {prefix: state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {key: value for name, part in items for key, value in tensors(part, f"{prefix}.{name}").items()}


def assert_equal_states(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    found, expected = tensors(found), tensors(expected)
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert type(found[key]) is Tensor, key
        torch.testing.assert_close(
            found[key], value, rtol=tolerance, atol=tolerance, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", sorted(RUNS.keys() - {"shared-norm", "recomputed"}))
def test_two_ranks_end_where_one_does(name: str, parallel: str, of_ranks: list[dict[str, Any]]) -> None:
    alone = a_run(name, "ddp").train()
    tolerance = TOLERANCES.get(name, 1e-5)
    first, second = (results[name, parallel] for results in of_ranks)
    assert first["lines"] == second["lines"]
    for line, expected in zip(first["lines"], alone.log.lines, strict=True):
        assert line == pytest.approx(expected, rel=max(tolerance, 1e-4), abs=tolerance)
    assert_equal_states(first["state"], alone.trained.state(), tolerance)
    assert_equal_states(first["backbone"], alone.trained.exported_state(), tolerance)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_computing_again_changes_no_bit_though_ranks_share_statistics(
    parallel: str, of_ranks: list[dict[str, Any]]
) -> None:
    kept, again = (of_ranks[0][name, parallel]["state"] for name in ("shared-norm", "recomputed"))
    assert_equal_states(again, kept, 0.0)


@pytest.mark.parametrize("name", RUNS)
def test_probes_see_the_whole_backbone_on_every_rank(name: str, of_ranks: list[dict[str, Any]]) -> None:
    for results in of_ranks:
        assert results[name, "fsdp"]["sharded"] > 0
        assert_equal_states(results[name, "fsdp"]["probed"], of_ranks[0][name, "fsdp"]["backbone"], 0.0)


def resumed() -> dict[Any, Any]:
    """From each setting to the other in the middle of a run."""
    found: dict[Any, Any] = {}
    for name in ("byol-adamw", "byol-lars", "fp16"):
        for before in ("ddp", "fsdp"):
            half = comm.broadcast_object(a_run(name, before).train(stop=2).trained.state())
            found[name, before] = half
            for after in ("ddp", "fsdp"):
                found[name, before, after] = a_run(name, after).train(start=2, state=half).trained.state()
    return found if comm.rank() == 0 else {}


def test_a_state_continues_with_either_setting_and_in_one_process(tmp_path: Path) -> None:
    found = spawn(resumed, tmp_path)[0]
    assert len(found) == 18
    for (name, *settings), state in found.items():
        whole = a_run(name, "ddp").train().trained.state()
        ended = state if len(settings) == 2 else a_run(name, "ddp").train(start=2, state=state).trained.state()
        assert_equal_states(ended, whole, TOLERANCES.get(name, 1e-5))


def stopping() -> dict[str, Any]:
    """One rank asks; the other goes on for a step without waiting for it."""
    stop, first, answers, waited = StopSignal(), Path("first"), [], False
    with stop.listening():
        for step in range(8):
            if comm.rank() == 1 and step == 0:
                waited = not _appears(first)
            if comm.rank() == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            answers.append(stop.agreed())
            if comm.rank() == 0 and step == 0:
                first.touch()
    return {"answers": answers, "waited": waited}


def _appears(file: Path, seconds: float = 60) -> bool:
    deadline = time.monotonic() + seconds
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    return file.exists()


def test_all_ranks_stop_after_the_same_step_and_none_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    first, second = spawn(stopping, tmp_path)
    assert first["answers"] == second["answers"]
    assert first["answers"].index(True) == 4
    assert not second["waited"]


def test_a_sharded_run_goes_on_in_one_process(cli: Cli, workdir: Path) -> None:
    options = ("--dataset", "digits", "--backbone", "conv4", "train.batch_size=64", "probe.images=100",
        "method.hidden=8", "method.out_dim=8", "checkpoint.every_steps=2", "--no-evals")  # fmt: skip
    fsdp = ("--devices", "2", "train.parallel=fsdp", "run.name=shared", "--limit", "4")
    cli("pretrain", "--method", "byol", *options, *fsdp)
    cli("pretrain", "--resume", "shared", "train.limit=6", "train.parallel=ddp")
    states = [
        torch.load(path, weights_only=True) for path in sorted(workdir.glob("runs/shared/checkpoints/*/state.pt"))
    ]
    assert [state["step"] for state in states] == [4, 6]
    assert not any(hasattr(value, "to_local") for state in states for value in tensors(state).values())
