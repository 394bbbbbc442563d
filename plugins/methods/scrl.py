"""SCRL: BYOL on image regions that both views show, for spatially consistent features.

Roh et al., "Spatially Consistent Representation Learning", CVPR 2021: boxes matched between the crops, RoIAlign of
the last feature map, then BYOL's projector, predictor and loss on each box. Sampling and sizes follow the authors'
code; where it is at odds with mirrored views, see the option ``aligned``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sslbench.nn.bootstrap import Bootstrap, BootstrapConfig
from sslbench.nn.regions import BoxSampling, match_boxes
from sslbench.nn.roi import roi_vectors
from sslbench.nn.sync_norm import may_be_empty
from sslbench.plugin.api import Batch, Features, Method
from sslbench.plugin.hooks import hookimpl


class SCRLConfig(BootstrapConfig):
    """Options of SCRL."""

    boxes: BoxSampling = BoxSampling()
    """The boxes that both views show."""
    aligned: bool = True
    """RoIAlign samples cells at their centres. The authors ran without, which shifts the content of a mirrored
    view by one cell against the other view; set false to reproduce their runs."""


class SCRL(Bootstrap):
    """Bootstrap on regions: one pooled vector per matched box."""

    name = "scrl"
    Config = SCRLConfig
    requires = frozenset({"map"})
    cfg: SCRLConfig

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        first, second = batch.views
        side = first.images.shape[-1]
        min_size = self.cfg.boxes.min_size or self.backbone.stride
        matched = match_boxes(first, second, self.cfg.boxes, min_size, batch.uniform)
        boxes = torch.cat([matched.first, matched.second])
        chosen = _images_with_boxes(matched.valid, may_be_empty(self.projector, int(matched.valid.sum())))
        kept, weight, share = (x.to(boxes.device, non_blocking=True) for x in chosen)

        def pool(features: Features) -> Tensor:
            """The vectors ``[2N,D]`` of all boxes of view 1, then of the same boxes in view 2."""
            vectors = roi_vectors(features.map, boxes, side, self.cfg.aligned)
            return torch.cat([vectors[kept], vectors[kept + len(batch)]]).flatten(0, 1)

        weights = weight.repeat_interleave(self.cfg.boxes.per_image)
        return {"loss": self.loss(batch, pool, weights), "boxes": share * self.cfg.boxes.per_image}


def _images_with_boxes(valid: Tensor, may_be_empty: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers and weights of the images whose boxes are compared, and their share of all.

    If no image has boxes, one that weighs nothing goes through the heads: batch normalisation needs rows, unless
    it shares those of other ranks.
    """
    kept = valid.nonzero().flatten()
    if len(kept) == 0 and not may_be_empty:
        kept = kept.new_zeros(1)
    return kept, valid[kept].float(), valid.float().mean()


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [SCRL]
