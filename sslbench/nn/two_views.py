"""What methods share that compare exactly two views of each image."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from sslbench.plugin.api import Batch, Blur, Jitter, MethodConfig, ViewSpec

_WEAK = Jitter(p=0.8, brightness=0.4, contrast=0.4, saturation=0.2, hue=0.1)
_STRONG = Jitter(p=0.8, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)

BYOL_VIEWS = (
    ViewSpec(scale=(0.2, 1.0), jitter=_WEAK, gray=0.2, blur=Blur(p=1.0)),
    ViewSpec(scale=(0.2, 1.0), jitter=_WEAK, gray=0.2, blur=Blur(p=0.1), solarize=0.2),
)
"""Two views that differ in blur and solarisation (BYOL, appendix B), of crops of a fifth of the image or more."""
SIMCLR_VIEWS = (ViewSpec(count=2, scale=(0.08, 1.0), jitter=_STRONG, gray=0.2, blur=Blur(p=0.5)),)
"""Two views of colour strength 1 (SimCLR, appendix A)."""


class TwoViewConfig(MethodConfig):
    """Options whose ``views`` must be two views of one size: one spec with ``count: 2``, or two specs."""

    @model_validator(mode="after")
    def _two_views_of_one_size(self) -> Self:
        count = sum(spec.count for spec in self.views)
        sizes = {spec.size for spec in self.views}
        if count != 2 or len(sizes) != 1:
            raise ValueError(
                f"views must give two views of one size, got {count} of sizes {sorted(map(str, sizes))}"
            )
        return self


def stack_views(batch: Batch) -> Tensor:
    """``[2B,3,H,W]``: view 1 of all images, then view 2, for one pass through a network."""
    return torch.cat([view.images for view in batch.views])
