"""Relational reasoning: tell pairs of views of one image from pairs of views of two.

Patacchiola & Storkey, "Self-Supervised Relational Reasoning for Representation Learning", NeurIPS 2020: K views of
each image, all pairs of views, a small relation head on the two views' features (section 3), binary focal loss.
Accuracies are those of positive and of negative pairs; the published program reported two mixtures of both.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from sslbench import comm
from sslbench.nn.focal import binary_cross_entropy, binary_focal_loss
from sslbench.nn.multi_crop import encode_views
from sslbench.nn.relation import Aggregation, RelationHead
from sslbench.plugin.api import Batch, Build, Jitter, Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl

_LOSSES = {"focal": binary_focal_loss, "bce": binary_cross_entropy}


class RelationNetConfig(MethodConfig):
    """Options of relational reasoning."""

    views: tuple[ViewSpec, ...] = (
        ViewSpec(
            count=4,
            scale=(0.08, 1.0),
            interpolation="bilinear",
            jitter=Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2),
            gray=0.2,
        ),
    )
    """The K views of each image (paper: 32 for CIFAR). The number of pairs grows with K squared, the cost of the
    backbone with K."""
    aggregation: Aggregation = "cat"
    """How the features of two views become one input of the relation head."""
    hidden: int = Field(256, ge=1)
    """Hidden width of the relation head. A strong head solves the task alone and the backbone learns little."""
    loss: Literal["focal", "bce"] = "focal"
    """`focal`: binary focal loss with gamma 2 and equal weights of 0.5, as in the paper's experiments; `bce`:
    binary cross-entropy, as in the authors' demonstration."""

    @model_validator(mode="after")
    def _at_least_two_views(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if count < 2:
            raise ValueError(f"views must give at least two views of each image, got {count}")
        return self


class RelationNet(Method):
    """Classifies all pairs of views of the global batch as of one image or of two."""

    name = "relationnet"
    Config = RelationNetConfig
    defaults: ClassVar[dict[str, Any]] = {
        "train": {"batch_size": 64},
        "optim": {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "schedule": "constant"},
    }
    cfg: RelationNetConfig

    def __init__(self, cfg: RelationNetConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.relation = RelationHead(self.backbone.dim, cfg.hidden, cfg.aggregation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        features = encode_views(self.backbone, batch.views).unflatten(0, (len(batch.views), len(batch)))
        logits = self.relation(features)
        same = 1 - torch.arange(2, device=logits.device)[:, None]
        losses = _LOSSES[self.cfg.loss](logits, same)
        found, rejected = ((logits.detach() > 0) == (same > 0)).float().mean(dim=(0, 2))
        return {
            "loss": comm.global_mean(losses.flatten()),
            "accuracy": 50 * (found + rejected),
            "accuracy_positive": 100 * found,
            "accuracy_negative": 100 * rejected,
        }


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [RelationNet]
