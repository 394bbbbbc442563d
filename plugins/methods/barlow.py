"""Barlow Twins: features of two views agree one by one and are uncorrelated with each other.

Zbontar et al., "Barlow Twins: Self-Supervised Learning via Redundancy Reduction", ICML 2021: loss (equation 1) of
the cross-correlation matrix (equation 2), projector and optimiser (section 2.2), views (appendix A, which takes
BYOL's). Statistics and correlations are those of the global batch, and so is their gradient: several processes
train as one. The published program sums the matrix by a collective that is not differentiable, so that on W
processes it follows 1/W of this gradient; ``scale: 0.024/W`` gives the same.
"""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field
from torch import Tensor

from sslbench.nn.decorrelation import check_batch, gather_views, off_diagonal_energy, standardized
from sslbench.nn.heads import mlp
from sslbench.nn.losses import no_autocast
from sslbench.nn.two_views import BYOL_VIEWS, TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Build, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class BarlowTwinsConfig(TwoViewConfig):
    """Options of Barlow Twins."""

    views: tuple[ViewSpec, ...] = BYOL_VIEWS
    """Two views of one size; they differ in blur and solarisation (BYOL, appendix B; crop area in the paper:
    0.08-1.0)."""
    hidden: int = Field(512, ge=1)
    """Width of the projector's two hidden layers (paper: 8192)."""
    out_dim: int = Field(512, ge=2)
    """Width of the embeddings (paper: 8192, and wider was better)."""
    redundancy: float = Field(0.005, ge=0)
    """Weight lambda of the redundancy term (paper: 0.005; published program: 0.0051)."""
    scale: float = Field(0.024, gt=0)
    """Factor on the loss, a sum over features, as in the published program. Adaptive optimisers cancel it; LARS
    does so for weights, not for biases and normalisation parameters (0.024 of rate 0.2 is the paper's 0.0048), nor
    against the weight decay."""


class BarlowTwins(Method):
    """Makes the cross-correlation matrix of the two views' embeddings the identity."""

    name = "barlow"
    Config = BarlowTwinsConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: BarlowTwinsConfig

    def __init__(self, cfg: BarlowTwinsConfig, build: Build) -> None:
        super().__init__(cfg, build)
        check_batch(build)
        self.backbone = build.backbone()
        self.projector = mlp(self.backbone.dim, cfg.hidden, cfg.hidden, cfg.out_dim, final_bias=False)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = self.projector(self.backbone(stack_views(batch)).pooled).chunk(2)
        with no_autocast(first):
            correlation = cross_correlation(first, second)
            invariance = (1 - correlation.diagonal()).square().sum()
            redundancy = off_diagonal_energy(correlation)
        loss = self.cfg.scale * (invariance + self.cfg.redundancy * redundancy)
        return {"loss": loss, "invariance": invariance.detach(), "redundancy": redundancy.detach()}


def cross_correlation(first: Tensor, second: Tensor) -> Tensor:
    """``[D,D]`` over the rows of all ranks: feature i of one view against feature j of the other (equation 2).

    Args:
        first, second: ``[B,D]`` embeddings; row i of both shows the same image.
    """
    a, b = gather_views(first, second)
    return standardized(a).T @ standardized(b) / len(a)


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [BarlowTwins]
