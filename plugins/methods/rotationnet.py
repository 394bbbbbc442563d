"""RotationNet: tell by how many quarter turns an image was rotated.

Gidaris, Singh & Komodakis, "Unsupervised Representation Learning by Predicting Image Rotations", ICLR 2018. Head,
views and optimiser are those of the baseline in "Self-Supervised Relational Reasoning" (Patacchiola & Storkey,
NeurIPS 2020): a linear layer, padded crops and flips, Adam.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.losses import no_autocast
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl


class RotationNetConfig(MethodConfig):
    """Options of rotation prediction."""

    views: tuple[ViewSpec, ...] = (ViewSpec(crop="padded", flip=0.5),)
    """The one view that is rotated."""

    @model_validator(mode="after")
    def _one_view(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if count != 1:
            raise ValueError(f"views must give one view of each image, got {count}")
        return self


class RotationNet(Method):
    """Classifies the rotation of each image in all four of them."""

    name = "rotationnet"
    accumulates = True
    Config = RotationNetConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"}
    }

    def __init__(self, cfg: RotationNetConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.classifier = nn.Linear(self.backbone.dim, 4)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images, turns = four_rotations(batch.views[0].images)
        logits = self.classifier(self.backbone(images).pooled)
        with no_autocast(logits):
            loss = comm.global_mean(F.cross_entropy(logits.float(), turns, reduction="none"))
        return {"loss": loss, "accuracy": 100 * (logits.detach().argmax(dim=1) == turns).float().mean()}


def four_rotations(images: Tensor) -> tuple[Tensor, Tensor]:
    """Square images turned counter-clockwise by 0, 90, 180 and 270 degrees.

    Args:
        images: ``[B,3,S,S]``.

    Returns:
        ``[4B,3,S,S]``, all images unturned, then all turned once and so on; int64 ``[4B]`` quarter turns.
    """
    turned = torch.cat([torch.rot90(images, turns, dims=(2, 3)) for turns in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [RotationNet]
