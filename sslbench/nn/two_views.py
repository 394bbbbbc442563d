"""What methods share that compare exactly two views of each image."""

from __future__ import annotations

from typing import Self

import torch
from pydantic import model_validator
from torch import Tensor

from sslbench.plugin.api import Batch, MethodConfig


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
