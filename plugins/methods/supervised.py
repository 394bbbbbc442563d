"""Supervised training with labels: the upper bound, never a self-supervised result.

A linear classifier on the pooled features and cross-entropy; optimiser, schedule and views of the supervised
bound in "Self-Supervised Relational Reasoning" (Patacchiola & Storkey, NeurIPS 2020): SGD without weight decay.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from sslbench import comm
from sslbench.errors import ConfigError, PluginError
from sslbench.nn.losses import no_autocast
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl


class SupervisedConfig(MethodConfig):
    """Options of the supervised upper bound."""

    views: tuple[ViewSpec, ...] = (ViewSpec(crop="padded", flip=0.5),)
    """The first view is classified."""


class Supervised(Method):
    """Classifies images with the labels of the pretraining split."""

    name = "supervised"
    accumulates = True
    Config = SupervisedConfig
    uses_labels = True
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "name": "sgd",
            "lr": 0.1,
            "momentum": 0.9,
            "weight_decay": 0.0,
            "schedule": "step",
            "milestones": (0.5, 0.75),
            "gamma": 0.1,
        }
    }

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        if build.num_classes is None:
            raise ConfigError(
                "method 'supervised' needs a labelled data set, and this one has no labels",
                hint="choose a labelled one with --dataset; sslbench list datasets",
            )
        self.backbone = build.backbone()
        self.classifier = nn.Linear(self.backbone.dim, build.num_classes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        if batch.labels is None:
            raise PluginError("method 'supervised' received a batch without labels")
        logits = self.classifier(self.backbone(batch.views[0].images).pooled)
        with no_autocast(logits):
            loss = comm.global_mean(F.cross_entropy(logits.float(), batch.labels, reduction="none"))
        correct = logits.detach().argmax(dim=1) == batch.labels
        return {"loss": loss, "top1": 100 * correct.float().mean()}


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [Supervised]
