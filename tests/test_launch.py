"""Runs of several processes: joining, one recorder, and the results of one process."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Cli

from sslbench import comm
from sslbench.config.schema import TrainOptions
from sslbench.errors import LaunchError
from sslbench.launch.environment import VARIABLES
from sslbench.launch.joining import joined_world

PLUGIN = '''
"""Contrastive learning without batch normalisation, which would see the rows of one process only."""
import torch
from torch import nn
from sslbench.nn.heads import mlp
from sslbench.nn.losses import nt_xent
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import Backbone, Features, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class Plain(Backbone):
    name = "plain"
    dim = 8
    stride = 4

    def __init__(self, cfg, image_size):
        super().__init__(cfg, image_size)
        self.conv = nn.Conv2d(3, 8, 5, stride=4, padding=2)

    def forward(self, images):
        feature_map = self.conv(images).relu()
        return Features(feature_map.mean((2, 3)), feature_map)


class Config(TwoViewConfig):
    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, jitter=Jitter(), gray=0.2),)


class Contrast(Method):
    name = "contrast"
    Config = Config

    def __init__(self, cfg, build):
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.projector = mlp(8, 16, 8, norm=False)

    def forward(self, batch):
        first, second = self.projector(self.backbone(stack_views(batch)).pooled).chunk(2)
        return {"loss": nt_xent(first, second, 0.5)}


@hookimpl
def sslbench_methods():
    return [Contrast]


@hookimpl
def sslbench_backbones():
    return [Plain]
'''
OPTIONS = (
    "--method", "contrast", "--backbone", "plain", "--dataset", "digits", "train.batch_size=63",
    "train.epochs=1", "optim.name=sgd", "optim.lr=0.1", "train.log_every=2", "probe.images=200",
    "checkpoint.every_steps=8", "run.evals=[knn,linear]", "evals.linear.epochs=3", "--json",
)  # fmt: skip


@pytest.fixture
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.usefixtures("_no_launcher")
def test_without_a_launcher_a_process_is_its_own_world() -> None:
    with joined_world(TrainOptions(device="cpu")) as reports:
        assert reports
        assert comm.world() == 1


@pytest.mark.usefixtures("_no_launcher")
def test_half_a_launch_names_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(LaunchError, match="not LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        joined_world(TrainOptions(device="cpu")),
    ):
        pass


def launch(command: tuple[str, ...], workdir: Path, world: int) -> list[str]:
    """Standard output of each process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "sslbench", *command],
            cwd=workdir,
            env={**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]
    done = [process.communicate(timeout=180) for process in processes]
    assert [p.returncode for p in processes] == [0] * world, "\n".join(err for _, err in done)
    return [out for out, _ in done]


def journal(run: Path) -> dict[int, dict[str, float]]:
    points: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        entry = json.loads(line)
        points.setdefault(entry["step"], {}).update(entry["metrics"])
    return points


@pytest.mark.slow
def test_two_processes_train_and_evaluate_as_one_does(cli: Cli, workdir: Path) -> None:
    (workdir / "contrast.py").write_text(PLUGIN)
    command = ("-p", "contrast.py", "pretrain", *OPTIONS)
    cli(*command, "run.name=one")
    printed = launch((*command, "run.name=two"), workdir, world=2)
    assert json.loads(printed[0])["evals"]
    assert printed[1] == ""
    assert sorted(path.name for path in (workdir / "runs").glob("two*")) == ["two"]
    one, two = ((workdir / "runs" / name).resolve() for name in ("one", "two"))
    assert_equal_checkpoints(one, two)
    assert_equal_curves(journal(one), journal(two))
    launch(("-p", "contrast.py", "pretrain", "--resume", "two", "train.epochs=1"), workdir, world=2)


def assert_equal_checkpoints(one: Path, two: Path) -> None:
    names = sorted(path.name for path in one.glob("checkpoints/step-*"))
    assert names == sorted(path.name for path in two.glob("checkpoints/step-*"))
    files = [torch.load(run / "checkpoints" / names[-1] / "backbone.pt", weights_only=True) for run in (one, two)]
    for key, value in files[0].items():
        # Sums in another order; weights reach 0.1, and the rate of 0.1 carries differences of rounding along.
        torch.testing.assert_close(files[1][key], value, rtol=1e-4, atol=2e-5)


def assert_equal_curves(one: dict[int, dict[str, float]], two: dict[int, dict[str, float]]) -> None:
    assert one.keys() == two.keys()
    losses = [step for step in one if "train/loss" in one[step]]
    assert len(losses) > 5
    for step in losses:
        assert one[step]["train/loss"] == pytest.approx(two[step]["train/loss"], rel=1e-4)
    last = max(one)
    for key in ("probe/knn_top1", "eval/knn.v1/digits/top1", "eval/linear.v1/digits/val_top1"):
        assert one[last][key] == pytest.approx(two[last][key], abs=1.5), key
