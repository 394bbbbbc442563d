"""Under bf16 autocast every method's loss stays fp32 and close to that of fp32, and so does its gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
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
    scrl,
    sela_v2,
    simclr,
    simsiam,
    supervised,
    swav,
    vicreg,
)
from torch import Tensor

from sslbench.plugin.api import Method

CASES: list[tuple[type[Method], int, dict[str, Any]]] = [
    (simclr.SimCLR, 2, {}),
    (barlow.BarlowTwins, 2, {}),
    (vicreg.VICReg, 2, {}),
    (simsiam.SimSiam, 2, {}),
    (nnclr.NNCLR, 2, {"queue": 16}),
    (byol.BYOL, 2, {}),
    (dino.DINO, 3, {"hidden": 16, "prototypes": 12}),
    (mae.MAE, 1, {}),
    (scrl.SCRL, 2, {}),
    (moco.MoCo, 2, {"queue": 16, "knn_weight": 0.4, "knn_topk": 3}),
    (swav.SwAV, 2, {}),
    (deepcluster_v2.DeepClusterV2, 2, {"prototypes": [4, 4]}),
    (sela_v2.SeLaV2, 2, {"prototypes": [4, 4]}),
    (relationnet.RelationNet, 4, {}),
    (rotationnet.RotationNet, 1, {}),
    (deepinfomax.DeepInfoMax, 1, {"global_weight": 1.0}),
    (deepcluster.DeepCluster, 1, {"clusters": 5}),
    (supervised.Supervised, 1, {}),
]


def step(cls: type[Method], views: int, options: dict[str, Any], bf16: bool) -> tuple[Tensor, Tensor]:
    """The loss of a fresh method and the backbone's gradient as one row."""
    method, data = make(cls, **options), batch(32, views=views)
    if hasattr(method, "assignments"):
        method.assignments.copy_(torch.arange(100) % 4)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = method(data)["loss"]
    loss.backward()
    gradients = [p.grad.flatten() for p in method.backbone.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


@pytest.mark.parametrize(("cls", "views", "options"), CASES, ids=lambda value: getattr(value, "name", ""))
def test_bf16_differs_by_less_than_a_hundredth(cls: type[Method], views: int, options: dict[str, Any]) -> None:
    expected, full = step(cls, views, options, bf16=False)
    loss, half = step(cls, views, options, bf16=True)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=0.01, atol=1e-3)
    assert F.cosine_similarity(half, full, dim=0) > 0.9
