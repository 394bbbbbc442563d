"""One pass through a backbone per resolution (SwAV: Caron et al., NeurIPS 2020, section 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch import Tensor, nn

from sslbench.plugin.api import View


def encode_views(backbone: nn.Module, views: Sequence[View]) -> Tensor:
    """Pooled features of all views.

    Views of one size that follow each other go through the backbone together, so batch normalisation sees one
    resolution at a time.

    Args:
        backbone: a backbone, or what follows one (:class:`sslbench.nn.ema.EMA`).

    Returns:
        ``[V*B,D]``, view-major: row ``v*B + b`` is view v of image b.
    """
    by_size = groupby((view.images for view in views), key=lambda images: images.shape[-1])
    return torch.cat([backbone(torch.cat(list(images))).pooled for _, images in by_size])
