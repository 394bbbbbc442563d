"""A training step never waits for the device. Seen on the CPU: nothing is read from a tensor or copied into one.

On CUDA, reading a number, a shape that depends on values, and a tensor made from Python numbers each stop the
host until the device has caught up.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from methods_kit import batch, make
from sslbench_plugins.methods import (
    barlow,
    byol,
    deepcluster,
    deepcluster_v2,
    deepinfomax,
    dino,
    mae,
    moco,
    nnclr,
    relationnet,
    rotationnet,
    sela_v2,
    simclr,
    simsiam,
    swav,
    vicreg,
)
from torch.utils._python_dispatch import TorchDispatchMode

from sslbench import rng
from sslbench.plugin.api import Method, Progress

WAITING = {"lift_fresh", "_local_scalar_dense", "nonzero", "equal", "masked_select", "bincount", "_unique2"}
STEP = Progress(30, 50, 10)
CASES: list[tuple[type[Method], int, dict[str, Any]]] = [
    (simclr.SimCLR, 2, {}),
    (barlow.BarlowTwins, 2, {}),
    (vicreg.VICReg, 2, {}),
    (simsiam.SimSiam, 2, {}),
    (nnclr.NNCLR, 2, {"queue": 16}),
    (byol.BYOL, 2, {}),
    (dino.DINO, 3, {"hidden": 16, "prototypes": 12}),
    (mae.MAE, 1, {}),
    (moco.MoCo, 2, {"queue": 16, "knn_weight": 0.4, "knn_topk": 3, "enqueue": "before-neighbours"}),
    (swav.SwAV, 2, {"queue": 16, "queue_from_epoch": 0, "hard": True}),
    (deepcluster_v2.DeepClusterV2, 2, {"prototypes": [4, 4]}),
    (sela_v2.SeLaV2, 2, {"prototypes": [4, 4]}),
    (relationnet.RelationNet, 4, {}),
    (rotationnet.RotationNet, 1, {}),
    (deepinfomax.DeepInfoMax, 1, {"global_weight": 1.0, "cells": 9}),
    (deepcluster.DeepCluster, 1, {"clusters": 5, "garble": {"mean": [0.5] * 3, "std": [0.5] * 3}}),
]


class WaitingOperations(TorchDispatchMode):
    """Notes the operations for which a host would wait."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = operation.overloadpacket.__name__
        if name in WAITING or _picks_by_values(name, args):
            self.seen.append(name)
        return operation(*args, **(kwargs or {}))


def _picks_by_values(name: str, args: Any) -> bool:
    return name in ("index", "index_put_") and any(i is not None and i.dtype == torch.bool for i in args[1])


@pytest.mark.parametrize(("cls", "views", "options"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_a_step_reads_nothing_from_the_device(
    cls: type[Method], views: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # On the CPU numpy draws random numbers; on a device its own arithmetic does.
    monkeypatch.setattr(rng, "hash_uniform", rng._hash_on_device)
    method, images = make(cls, **options), batch(views=views, step=STEP.step)
    with WaitingOperations() as operations:
        method(images)["loss"].backward()
        method.before_step(STEP)
        method.after_step(STEP)
    assert operations.seen == []


@pytest.mark.parametrize("read", [lambda x: x[[0, 1]], lambda x: x[x > 0], lambda x: float(x.sum())])
def test_what_waits_is_noticed(read: Any) -> None:
    with WaitingOperations() as operations:
        read(torch.ones(3))
    assert operations.seen
