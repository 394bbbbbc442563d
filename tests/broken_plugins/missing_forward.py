"""Has no forward."""

from torch import nn

from sslbench.nn.two_views import SIMCLR_VIEWS, TwoViewConfig
from sslbench.plugin.api import Method, ViewSpec
from sslbench.plugin.hooks import hookimpl


class Config(TwoViewConfig):
    """Options."""

    views: tuple[ViewSpec, ...] = SIMCLR_VIEWS
    """Two views of one size."""


class Broken(Method):
    """Pulls two views together, or would."""

    name = "missing-forward"
    Config = Config

    def __init__(self, cfg, build):
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.head = nn.Linear(self.backbone.dim, 32)


@hookimpl
def sslbench_methods():
    return [Broken]
