"""BYOL: predict a slow target network's view of the same image, without negatives.

Grill et al., "Bootstrap Your Own Latent: A New Approach to Self-Supervised Learning", NeurIPS 2020: loss of
section 3.1 (equation 2, symmetrised), EMA target with cosine momentum, views of appendix B with the crop area
0.2-1.0 that the SCRL authors' BYOL baseline uses (the paper: 0.08-1.0).
"""

from __future__ import annotations

from torch import Tensor

from sslbench.nn.bootstrap import Bootstrap
from sslbench.plugin.api import Batch, Method
from sslbench.plugin.hooks import hookimpl


class BYOL(Bootstrap):
    """Bootstrap on the whole image: one pooled vector per view."""

    name = "byol"
    accumulates = True

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        return {"loss": self.loss(batch, pool=lambda features: features.pooled)}


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [BYOL]
