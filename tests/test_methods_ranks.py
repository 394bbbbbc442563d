"""Two processes give the loss and the averaged gradients of one process on the whole batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from methods_kit import batch, make, rows
from sslbench_plugins.methods import (
    byol,
    deepcluster,
    deepinfomax,
    relationnet,
    rotationnet,
    scrl,
    simclr,
    supervised,
    swav,
)
from torch import Tensor, nn

from sslbench.plugin.api import Batch, Method

pytestmark = pytest.mark.slow  # starts two processes

METHODS = {
    "simclr": (simclr.SimCLR, {}),
    "simclr-log-mean": (simclr.SimCLR, {"loss": "log-mean"}),
    "byol": (byol.BYOL, {}),
    "scrl": (scrl.SCRL, {"boxes": {"per_image": 3}}),
    "scrl-no-box-on-rank-1": (scrl.SCRL, {}),
    "supervised": (supervised.Supervised, {}),
    "swav": (swav.SwAV, {"prototypes": 12}),
    "swav-hard": (swav.SwAV, {"prototypes": 12, "hard": True, "assign": (1,)}),
    "relationnet": (relationnet.RelationNet, {}),
    "relationnet-max": (relationnet.RelationNet, {"aggregation": "max", "loss": "bce"}),
    "deepcluster": (deepcluster.DeepCluster, {"clusters": 5}),
    "deepinfomax": (deepinfomax.DeepInfoMax, {"global_weight": 0.5, "cells": 20}),
    "rotationnet": (rotationnet.RotationNet, {}),
}
VIEWS = {"relationnet": 4, "relationnet-max": 4}
SIZE, SPLIT = 6, 4  # rank 0 has four images, rank 1 two


def whole_batch(name: str) -> Batch:
    whole = batch(SIZE, views=VIEWS.get(name, 2), seed=2)
    without_boxes = {"scrl": slice(1, 2), "scrl-no-box-on-rank-1": slice(SPLIT, SIZE)}.get(name, slice(0))
    whole.views[0].box[without_boxes] = torch.tensor([0.0, 0.0, 0.4, 0.4])
    whole.views[1].box[without_boxes] = torch.tensor([0.6, 0.6, 1.0, 1.0])
    return whole


def row_independent(name: str) -> Method:
    """Without batch normalisation, which would see each rank's rows only."""
    cls, options = METHODS[name]
    method = make(cls, norm=False, **options)
    for module in list(method.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                norm = nn.LayerNorm(child.num_features).requires_grad_(child.weight.requires_grad)
                setattr(module, key, norm)
    return method


def loss_and_gradients(name: str, data: Batch) -> dict[str, Tensor]:
    method = row_independent(name)
    loss = method(data)["loss"]
    loss.backward()
    grads = {key: p.grad for key, p in method.named_parameters() if p.requires_grad}
    return {"loss": loss.detach(), **grads}


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results = {}
    for name in METHODS:
        start, stop = (0, SPLIT) if rank == 0 else (SPLIT, SIZE)
        found = loss_and_gradients(name, rows(whole_batch(name), start, stop))
        for key, value in found.items():
            if key != "loss":
                dist.all_reduce(value)
                value /= 2
        results[name] = found
    torch.save(results, f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Tensor]]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    mp.spawn(run_rank, args=(str(folder),), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", METHODS)
def test_two_ranks_equal_one(name, of_ranks) -> None:
    expected = loss_and_gradients(name, whole_batch(name))
    for found in of_ranks:
        assert found[name].keys() == expected.keys()
        for key, value in expected.items():
            difference = (found[name][key] - value).abs().max()
            assert difference <= 1e-6 + 1e-4 * value.abs().max(), key
