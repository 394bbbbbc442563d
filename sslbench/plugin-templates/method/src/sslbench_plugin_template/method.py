"""plugin-template: predict one view's projection from the other's, without negatives or a second network.

This is SimSiam, to be replaced by your own method: Chen & He, "Exploring Simple Siamese Representation Learning",
CVPR 2021, algorithm 1 and section 4.1. The first line above is what `sslbench list methods` shows.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field
from sslbench import comm
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Blur, Build, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl
from torch import Tensor, nn

API_VERSION = "1.0"


class PluginTemplateOptions(TwoViewConfig):
    """Options of `plugin-template`; the text below each is shown by `sslbench info`."""

    views: tuple[ViewSpec, ...] = (
        ViewSpec(count=2, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2, blur=Blur(p=0.5)),
    )
    """Two random views of each image (section 4)."""
    out_dim: int = Field(512, ge=4)
    """Width of the projections; the paper's is 2048."""
    bottleneck: int = Field(4, ge=1)
    """The predictor's hidden layer is narrower than the projections by this factor (section 4.4)."""
    stop_gradient: bool = True
    """Off, the networks may collapse to a constant, as figure 2 shows."""


class PluginTemplate(Method):
    """Two views, one network; gradients do not flow through the side that is predicted."""

    name = "plugin-template"
    Config = PluginTemplateOptions
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    accumulates = True
    cfg: PluginTemplateOptions

    def __init__(self, cfg: PluginTemplateOptions, build: Build) -> None:
        super().__init__(cfg, build)
        width = cfg.out_dim
        self.backbone = build.backbone()
        self.projector = nn.Sequential(
            mlp(self.backbone.dim, width, width, width), nn.BatchNorm1d(width, affine=False)
        )
        self.predictor = mlp(width, max(1, width // cfg.bottleneck), width)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Equation 3, averaged over the images of all processes."""
        projections = self.projector(self.backbone(stack_views(batch)).pooled)
        p1, p2 = self.predictor(projections).chunk(2)
        targets = projections.detach() if self.cfg.stop_gradient else projections
        z1, z2 = targets.chunk(2)
        loss = (negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
        return {"loss": comm.global_mean(loss), "spread": spread(z1)}


def negative_cosine(prediction: Tensor, target: Tensor) -> Tensor:
    """Equation 1 for each row: ``[B,D]`` twice to fp32 ``[B]`` in [-1, 1]."""
    with no_autocast(prediction):
        return -torch.cosine_similarity(prediction.float(), target.float(), dim=1)


def spread(projections: Tensor) -> Tensor:
    """How far directions are apart: 1 if they are isotropic, 0 if all are the same (section 4.1, figure 2)."""
    directions = nn.functional.normalize(projections.detach().float(), dim=1)
    return directions.std(0).mean() * math.sqrt(directions.shape[1])


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [PluginTemplate]
