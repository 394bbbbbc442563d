"""SimSiam: predict one view's projection from the other's, with a stop-gradient and nothing else against collapse.

Chen & He, "Exploring Simple Siamese Representation Learning", CVPR 2021: negative cosine similarity (equation 1),
stop-gradient (equation 3), symmetrised (equation 4), projector and predictor with a bottleneck (section 3), a
learning rate of the predictor that does not decay (section 4.2), views of MoCo v2. The normalisation of the
projector's output has no learnt scale and shift.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslbench import comm
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Blur, Build, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class SimSiamConfig(TwoViewConfig):
    """Options of SimSiam."""

    views: tuple[ViewSpec, ...] = (ViewSpec(count=2, scale=(0.2, 1.0), jitter=Jitter(), gray=0.2, blur=Blur()),)
    """Two views of one size (the paper's of CIFAR-10 are not blurred)."""
    hidden: int = Field(512, ge=1)
    """Width of the projector's hidden layers (paper: 2048)."""
    projector_layers: int = Field(3, ge=2)
    """Linear layers of the projector (paper: 3 for ImageNet, 2 for CIFAR-10)."""
    out_dim: int = Field(512, ge=2)
    """Width of projections and predictions (paper: 2048)."""
    bottleneck: int = Field(128, ge=1)
    """Hidden width of the predictor (paper: 512, a quarter of `out_dim`)."""
    constant_predictor_lr: bool = True
    """The predictor keeps the peak learning rate: it should follow the latest representations (section 4.2)."""


class SimSiam(Method):
    """Predicts each view's projection from the other view's."""

    name = "simsiam"
    accumulates = True
    Config = SimSiamConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: SimSiamConfig

    def __init__(self, cfg: SimSiamConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        widths = [self.backbone.dim, *[cfg.hidden] * (cfg.projector_layers - 1), cfg.out_dim]
        self.projector = mlp(*widths, final_bias=False, final_norm="plain")
        self.predictor = mlp(cfg.out_dim, cfg.bottleneck, cfg.out_dim)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        projections = self.projector(self.backbone(stack_views(batch)).pooled)
        z1, z2 = projections.chunk(2)
        p1, p2 = self.predictor(projections).chunk(2)
        loss = comm.global_mean(negative_cosine(p1, z2) + negative_cosine(p2, z1)) / 2
        return {"loss": loss, "spread": spread(projections)}

    def param_groups(self) -> list[dict[str, Any]] | None:
        if not self.cfg.constant_predictor_lr:
            return None
        predictor = {id(parameter) for parameter in self.predictor.parameters()}
        named = list(self.named_parameters())
        return [
            {"params": [(name, p) for name, p in named if id(p) not in predictor]},
            {"params": [(name, p) for name, p in named if id(p) in predictor], "schedule": "constant"},
        ]


def negative_cosine(prediction: Tensor, projection: Tensor) -> Tensor:
    """fp32 ``[N]`` in [-1, 1]: equation 1, with the gradient cut on the side of the projection (equation 3).

    Args:
        prediction, projection: ``[N,D]``.
    """
    with no_autocast(prediction):
        return -F.cosine_similarity(prediction.float(), projection.detach().float(), dim=1)


def spread(projections: Tensor) -> Tensor:
    """About 1 where the directions of rows ``[N,D]`` are spread out, 0 where all are one: collapse (figure 2).

    The standard deviation of a feature of unit rows, times the square root of D.
    """
    directions = F.normalize(projections.detach().float(), dim=1)
    return directions.var(dim=0, correction=0).sum().sqrt()


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [SimSiam]
