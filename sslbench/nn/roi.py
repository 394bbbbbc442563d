"""Region pooling: one vector per box of a feature map."""

from __future__ import annotations

import torch
from torch import Tensor

from sslbench.nn.losses import no_autocast


def roi_vectors(maps: Tensor, boxes: Tensor, side: int, aligned: bool = True) -> Tensor:
    """RoIAlign with a 1x1 output and adaptive sampling (Mask R-CNN, section 3), as one matrix product per image.

    Averaging bilinear samples on a regular lattice is separable and linear in the map, so each box is a weighted
    sum of the map's cells. This is deterministic on every device; torchvision's kernel scatters its gradient
    atomically on CUDA and, asked for determinism, switches to a far larger computation.

    Args:
        maps: ``[B,D,h,w]``, of any float type; computed in fp32.
        boxes: ``[B,K,4]`` left, top, right, bottom in pixels of the input image.
        side: of the input image in pixels, which the map spans.
        aligned: values of the map lie at the centres of its cells. Without, they lie at the upper left corners,
            sides are at least one cell, and the mirrored box of a mirrored map gives another value.

    Returns:
        fp32 ``[B,K,D]``.
    """
    with no_autocast(maps):
        height, width = maps.shape[-2:]
        across = _axis_weights(boxes[..., 0] * (width / side), boxes[..., 2] * (width / side), width, aligned)
        down = _axis_weights(boxes[..., 1] * (height / side), boxes[..., 3] * (height / side), height, aligned)
        weights = (down[..., :, None] * across[..., None, :]).flatten(2)
        return weights @ maps.float().flatten(2).transpose(1, 2)


def _axis_weights(low: Tensor, high: Tensor, cells: int, aligned: bool) -> Tensor:
    """``[...,cells]``: how much each cell of one axis counts in the mean over samples between two coordinates."""
    length = high - low
    if aligned:
        low = low - 0.5
    else:
        length = length.clamp_min(1)
    samples = length.ceil().clamp(1, cells)[..., None]
    number = torch.arange(cells, device=low.device)
    positions = low[..., None] + (number + 0.5) * length[..., None] / samples
    bilinear = (1 - (positions.clamp(0, cells - 1)[..., None] - number).abs()).clamp_min(0)
    counts = (number < samples) & (positions <= cells)  # a side stretched to one cell may leave the map
    return (bilinear * counts[..., None]).sum(dim=-2) / samples
