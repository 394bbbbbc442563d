"""VICReg: views agree while every feature keeps its variance and no two features are correlated.

Bardes et al., "VICReg: Variance-Invariance-Covariance Regularization for Self-Supervised Learning", ICLR 2022:
variance (equations 1 and 2), covariance (equations 3 and 4), invariance (equation 5), their weighted sum
(equation 6), expander (section 4.2), views (appendix C.1). All moments are those of the global batch. As in the
published program the distance of equation 5 is averaged over features, too, and the variance terms are averaged
over the views; equation 6 adds those, which is twice the weight ``variance``.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from sslbench.nn.decorrelation import check_batch, covariance, gather_views, off_diagonal_energy
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.two_views import TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Blur, Build, Jitter, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl

_EPSILON = 1e-4
"""Added to variances, against the infinite slope of the square root at 0 (section 4.1)."""


class VICRegConfig(TwoViewConfig):
    """Options of VICReg."""

    views: tuple[ViewSpec, ...] = (
        ViewSpec(
            count=2,
            scale=(0.2, 1.0),
            jitter=Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1),
            gray=0.2,
            blur=Blur(p=0.5),
            solarize=0.1,
        ),
    )
    """Two views of one size (crop area in the paper: 0.08-1.0)."""
    hidden: int = Field(512, ge=1)
    """Width of the expander's two hidden layers (paper: 8192)."""
    out_dim: int = Field(512, ge=2)
    """Width of the embeddings (paper: 8192)."""
    invariance: float = Field(25.0, ge=0)
    """Weight lambda of the mean squared distance between the views."""
    variance: float = Field(25.0, ge=0)
    """Weight mu of the hinge on each feature's standard deviation, averaged over the views."""
    covariance: float = Field(1.0, ge=0)
    """Weight nu of the squared covariances, summed over the views and divided by the number of features."""


class VICReg(Method):
    """Pulls views together under terms that keep features spread and uncorrelated."""

    name = "vicreg"
    Config = VICRegConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: VICRegConfig

    def __init__(self, cfg: VICRegConfig, build: Build) -> None:
        super().__init__(cfg, build)
        check_batch(build)
        self.backbone = build.backbone()
        self.expander = mlp(self.backbone.dim, cfg.hidden, cfg.hidden, cfg.out_dim, final_bias=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = self.expander(self.backbone(stack_views(batch)).pooled).chunk(2)
        terms = vicreg_terms(first, second)._asdict()
        loss = torch.stack([getattr(self.cfg, name) * term for name, term in terms.items()]).sum()
        return {"loss": loss, **{name: term.detach() for name, term in terms.items()}}


class VICRegTerms(NamedTuple):
    """fp32 scalars over the global batch, not weighted."""

    invariance: Tensor
    variance: Tensor
    covariance: Tensor


def vicreg_terms(first: Tensor, second: Tensor) -> VICRegTerms:
    """The three terms of embeddings ``[B,D]`` of two views; row i of both shows the same image."""
    with no_autocast(first):
        views = gather_views(first, second)
        moments = [covariance(view) for view in views]
        return VICRegTerms(
            invariance=F.mse_loss(*views),
            variance=torch.stack([_hinge(moment.diagonal()) for moment in moments]).mean(),
            covariance=torch.stack([off_diagonal_energy(moment) / len(moment) for moment in moments]).sum(),
        )


def _hinge(variances: Tensor) -> Tensor:
    """Mean of how far standard deviations are below 1 (equation 1)."""
    return F.relu(1 - (variances + _EPSILON).sqrt()).mean()


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [VICReg]
