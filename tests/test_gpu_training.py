"""What only a CUDA device can show of precision, sharding and recomputation."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from methods_kit import batch
from sslbench_plugins.backbones import resnet
from sslbench_plugins.methods import byol
from torch import nn

from sslbench.config.schema import OptimOptions
from sslbench.engine.optim import build_optimizer
from sslbench.engine.precision import Precision, autocast, loss_scaler
from sslbench.engine.recompute import checkpoint_activations
from sslbench.engine.trained import Trained
from sslbench.engine.update import Update
from sslbench.plugin.api import Batch, Build, Method, Progress, View

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
CUDA = torch.device("cuda", 0)
OPTIMISERS: list[dict[str, Any]] = [
    {"name": "adamw", "lr": 1e-3},
    {"name": "lars", "lr": 0.1, "lars_norm": "separate"},
]


def make() -> Method:
    torch.manual_seed(0)
    options = resnet.ResNetOptions()
    method = byol.BYOL(byol.BYOL.Config(), Build(lambda: resnet.ResNet18(options, 32), 8, 100, 50, 10))
    return method.train()


def on_device(images: Batch) -> Batch:
    views = tuple(View(view.images.to(CUDA), *view[1:]) for view in images.views)
    return Batch(views, images.index.to(CUDA), images.draws)


def steps(trained: Trained, model: nn.Module, precision: Precision, count: int = 3) -> None:
    update = Update(trained.method, trained.optimizer, clip=1.0, scaler=trained.scaler, shards=trained.shards)
    for step in range(count):
        with autocast(precision, CUDA):
            loss = model(on_device(batch(step=step, seed=step)))["loss"]
        update.backward(loss)
        update.step(Progress(step, 50, 10))


@pytest.fixture
def _world_of_one(tmp_path: Path) -> Iterator[None]:
    torch.cuda.set_device(CUDA)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("_world_of_one")
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("options", OPTIMISERS, ids=lambda options: options["name"])
def test_shards_of_one_device_train_as_the_whole(options: dict[str, Any], precision: Precision) -> None:
    states = []
    for sharded in (False, True):
        method = make() if sharded else make().to(CUDA)
        optimizer = build_optimizer(OptimOptions(**options), None, method, 8)
        trained = Trained(method, optimizer, loss_scaler(precision, CUDA))
        steps(trained, trained.distribute(CUDA, sharded=sharded), precision)
        states.append(copy.deepcopy(trained.state()["method"]))
    for key, value in states[0].items():
        torch.testing.assert_close(states[1][key].to(value.device), value, rtol=2e-3, atol=2e-3)


def test_recomputation_takes_less_memory() -> None:
    peaks = []
    for again in (False, True):
        backbone = resnet.ResNet50(resnet.ResNetOptions(), 224).to(CUDA)
        if again:
            checkpoint_activations(backbone)
        torch.cuda.reset_peak_memory_stats()
        backbone(torch.randn(16, 3, 224, 224, device=CUDA)).pooled.sum().backward()
        peaks.append(torch.cuda.max_memory_allocated())
    assert peaks[1] < 0.6 * peaks[0]
