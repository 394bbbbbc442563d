"""Reads the labels and does not say so."""

from torch import nn

from sslbench.nn.two_views import SIMCLR_VIEWS, TwoViewConfig, stack_views
from sslbench.plugin.api import Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class Config(TwoViewConfig):
    """Options."""

    views: tuple[ViewSpec, ...] = SIMCLR_VIEWS
    """Two views of one size."""


class Broken(Method):
    """Pulls two views together, or would."""

    name = "label-peeking"
    Config = Config

    def __init__(self, cfg, build):
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = nn.Linear(self.backbone.dim, 32)

    def forward(self, batch):
        first, _ = self.head(self.backbone(stack_views(batch)).pooled).chunk(2)
        return {"loss": nn.functional.cross_entropy(first, batch.labels)}


@hookimpl
def sslbench_methods():
    return [Broken]
