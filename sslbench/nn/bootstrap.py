"""The networks that BYOL and SCRL share: online encoder, predictor, and a target encoder that follows by EMA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor, nn

from sslbench import comm
from sslbench.nn.ema import EMA, cosine_momentum
from sslbench.nn.heads import mlp
from sslbench.nn.losses import byol_distance
from sslbench.nn.two_views import BYOL_VIEWS, TwoViewConfig, stack_views
from sslbench.plugin.api import (
    Backbone,
    Batch,
    Build,
    Features,
    Method,
    Progress,
    ViewSpec,
)

_WIDE_BACKBONE = 512

Pool = Callable[[Features], Tensor]
"""From the features of all views, ``[2B,...]``, to the rows ``[2N,D]`` that are compared; view 1's come first."""


class BootstrapConfig(TwoViewConfig):
    """Options of methods that predict a target network's output."""

    views: tuple[ViewSpec, ...] = BYOL_VIEWS
    """Two views of one size; they differ in blur and solarisation (BYOL, appendix B)."""
    hidden: int | None = Field(None, ge=1)
    """Hidden width of projector and predictor; unset: 4096 for backbones of 512 features or more, else 512."""
    out_dim: int = Field(256, ge=1)
    """Width of projections and predictions."""
    momentum: float = Field(0.99, ge=0, le=1)
    """EMA momentum of the target at the first step; it rises to 1 along a cosine."""
    target_init: Literal["independent", "copy"] = "independent"
    """The target starts from its own random weights (as both authors' codes do) or from the online weights."""


class Bootstrap(Method):
    """Predicts, from one view, the target network's projection of the other view."""

    Config = BootstrapConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4, "warmup_epochs": 1.0}
    }
    cfg: BootstrapConfig

    def __init__(self, cfg: BootstrapConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.projector = self._head(self.backbone.dim)
        self.predictor = self._head(cfg.out_dim)
        self.target_backbone, self.target_projector = self._targets(build)

    def _targets(self, build: Build) -> tuple[EMA, EMA]:
        if self.cfg.target_init == "copy":
            return EMA.copy_of(self.backbone), EMA.copy_of(self.projector)
        return EMA(build.backbone()), EMA(self._head(self.backbone.dim))

    def _head(self, in_dim: int) -> nn.Sequential:
        hidden = self.cfg.hidden or default_hidden(self.backbone)
        return mlp(in_dim, hidden, self.cfg.out_dim, final_bias=False)

    def loss(self, batch: Batch, pool: Pool, weights: Tensor | None = None) -> Tensor:
        """The symmetric loss, averaged over the rows of all ranks (BYOL, section 3.1).

        Args:
            batch: two views.
            pool: picks the rows that are compared.
            weights: ``[N]`` of the row pairs; None for ones.

        Returns:
            fp32 scalar in [0, 8].
        """
        images = stack_views(batch)
        predictions = self.predictor(self.projector(pool(self.backbone(images))))
        targets = self.target_projector(pool(self.target_backbone(images)))
        p1, p2 = predictions.chunk(2)
        t1, t2 = targets.chunk(2)
        return comm.global_mean(byol_distance(p1, t2) + byol_distance(p2, t1), weights)

    def after_step(self, progress: Progress) -> None:
        momentum = cosine_momentum(self.cfg.momentum, progress.fraction)
        self.target_backbone.update(self.backbone, momentum)
        self.target_projector.update(self.projector, momentum)


def default_hidden(backbone: Backbone) -> int:
    """The papers' 4096 for ImageNet backbones; 512 for narrow ones, whose step it would otherwise dominate."""
    return 4096 if backbone.dim >= _WIDE_BACKBONE else 512
