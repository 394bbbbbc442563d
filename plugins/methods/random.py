"""Random weights: the control that every pretrained backbone must beat.

Nothing is trained; evaluations see a freshly initialised backbone.
"""

from __future__ import annotations

from torch import Tensor

from sslbench.errors import PluginError
from sslbench.plugin.api import Batch, Build, Method, MethodConfig
from sslbench.plugin.hooks import hookimpl


class Random(Method):
    """Provides a randomly initialised backbone."""

    name = "random"
    requires = frozenset[str]()
    trains = False

    def __init__(self, cfg: MethodConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        raise PluginError(
            "method 'random' has nothing to train",
            hint="evaluate its weights: sslbench eval linear RUN",
        )


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [Random]
