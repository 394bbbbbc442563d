"""Contrastive learning without batch normalisation: any number of processes computes the same but for rounding.

A plugin for ``sslbench -p``. With ``sharp_from`` it has what really diverges: a weight whose curvature jumps.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sslbench.nn.heads import mlp
from sslbench.nn.losses import nt_xent
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import Backbone, Batch, Build, Features, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class Plain(Backbone):
    name = "plain"
    dim = 8
    stride = 4

    def __init__(self, cfg: Any, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.conv = nn.Conv2d(3, 8, 5, stride=4, padding=2)

    def forward(self, images: Tensor) -> Features:
        feature_map = self.conv(images).relu()
        return Features(feature_map.mean((2, 3)), feature_map)


class Config(TwoViewConfig):
    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, jitter=Jitter(), gray=0.2),)
    sharp_from: int | None = None
    """The step from which on training diverges at rates above 1e-12; unset: it never does."""


class Contrast(Method):
    name = "contrast"
    Config = Config

    def __init__(self, cfg: Config, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.projector = mlp(8, 16, 8, norm=False)
        self.sharp = nn.Parameter(torch.ones(()))
        self.sharp_from = cfg.sharp_from

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = self.projector(self.backbone(stack_views(batch)).pooled).chunk(2)
        steep = self.sharp_from is not None and batch.step >= self.sharp_from
        bowl = (1e12 if steep else 1e-3) * self.sharp**2
        return {"loss": nt_xent(first, second, 0.5) + 0.5 * bowl}


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [Contrast]


@hookimpl
def sslbench_backbones() -> list[type[Backbone]]:
    return [Plain]
