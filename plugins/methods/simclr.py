"""SimCLR: pull two views of an image together, push all other images of the batch away.

Chen et al., "A Simple Framework for Contrastive Learning of Visual Representations", ICML 2020: NT-Xent loss
(equation 1), projection head (section 4.2), views (appendix A, colour strength 1). ``loss: log-mean`` is the
variant of the SimCLR baseline in "Self-Supervised Relational Reasoning" (Patacchiola & Storkey, NeurIPS 2020).
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from sslbench.nn.heads import Activation, mlp
from sslbench.nn.losses import nt_xent, nt_xent_log_of_mean
from sslbench.nn.two_views import SIMCLR_VIEWS, TwoViewConfig, stack_views
from sslbench.plugin.api import Batch, Build, Method, ViewSpec
from sslbench.plugin.hooks import hookimpl

_LOSSES = {"mean-log": nt_xent, "log-mean": nt_xent_log_of_mean}


class SimCLRConfig(TwoViewConfig):
    """Options of SimCLR."""

    views: tuple[ViewSpec, ...] = SIMCLR_VIEWS
    """Two views of one size."""
    hidden: int | None = Field(None, ge=1)
    """Hidden width of the projection head; unset: the backbone's width (as the paper), at least 256."""
    activation: Activation = "relu"
    """Of the projection head; the relational reasoning baseline uses `leaky-relu`."""
    out_dim: int = Field(128, ge=1)
    """Width of the projections."""
    temperature: float = Field(0.5, gt=0)
    """Temperature of the softmax (paper: 0.1 for ImageNet, 0.5 for CIFAR-10)."""
    loss: Literal["mean-log", "log-mean"] = "mean-log"
    """`mean-log`: NT-Xent; `log-mean`: the logarithm of the mean positive probability."""


class SimCLR(Method):
    """Contrasts the two views of each image with all other images of the global batch."""

    name = "simclr"
    Config = SimCLRConfig
    defaults: ClassVar[dict[str, Any]] = {"optim": {"name": "adamw", "lr": 1e-3, "weight_decay": 1e-4}}
    cfg: SimCLRConfig

    def __init__(self, cfg: SimCLRConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        dim = self.backbone.dim
        self.projector = mlp(dim, cfg.hidden or max(dim, 256), cfg.out_dim, activation=cfg.activation)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        pooled = self.backbone(stack_views(batch)).pooled
        first, second = self.projector(pooled).chunk(2)
        return {"loss": _LOSSES[self.cfg.loss](first, second, self.cfg.temperature)}


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [SimCLR]
