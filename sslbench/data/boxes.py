"""Where views are cut from their images: rectangles as pure functions of uniform numbers, for whole batches.

Sizes and extents are (height, width), corners (top, left), boxes (x0, y0, x1, y1); all float64 in whole pixels of
the source image.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sslbench.plugin.viewspec import ViewSpec

CROP_TRIES = 10


def random_resized_box(sizes: Tensor, spec: ViewSpec, uniform: Tensor) -> Tensor:
    """Random rectangles as torchvision's ``RandomResizedCrop`` draws them.

    Each image takes the first of ten random (area, aspect ratio) pairs that fits inside it, at a random position;
    if none fits, the largest centred rectangle with an allowed aspect ratio.

    Args:
        sizes: float64 ``[B,2]``.
        spec: gives ``scale`` and ``ratio``.
        uniform: float64 ``[B,11,2]``: ten tries, then the position.

    Returns:
        float64 ``[B,4]``.
    """
    tries, position = uniform[:, :CROP_TRIES], uniform[:, CROP_TRIES]
    _, extents = _try_extents(sizes, spec, tries)
    fits = _fits(extents, sizes)
    extent = extents[torch.arange(len(sizes)), _first(fits)]
    corner = (position * (sizes - extent + 1)).floor()
    fallback = _largest_extent(sizes, spec.ratio)
    none_fits = ~fits.any(1, keepdim=True)
    extent = torch.where(none_fits, fallback, extent)
    corner = torch.where(none_fits, ((sizes - fallback) / 2).floor(), corner)
    return _box(corner, extent)


def overlapping_box(sizes: Tensor, spec: ViewSpec, uniform: Tensor, anchor: Tensor, otherwise: Tensor) -> Tensor:
    """Random rectangles of which a part lies within another crop of the same image.

    Each image takes the first of ten random rectangles that fits inside it and shares at least ``spec.overlap`` of
    its target area (before rounding to pixels) with the anchor (Van Gansbeke et al., arXiv 2106.05967).

    Args:
        sizes: float64 ``[B,2]``.
        spec: gives ``scale``, ``ratio`` and ``overlap``.
        uniform: float64 ``[B,10,4]``: area, aspect ratio, top and left of each try.
        anchor: the other crop's box, float64 ``[B,4]``.
        otherwise: the box of an image whose tries all fail, float64 ``[B,4]``.

    Returns:
        float64 ``[B,4]``.
    """
    area, extents = _try_extents(sizes, spec, uniform[:, :, :2])
    boxes = _box((uniform[:, :, 2:] * (sizes[:, None] - extents + 1)).floor(), extents)
    accepted = _fits(extents, sizes) & (_shared_area(boxes, anchor[:, None]) >= spec.overlap * area)
    chosen = boxes[torch.arange(len(sizes)), _first(accepted)]
    return torch.where(accepted.any(1, keepdim=True), chosen, otherwise)


def _try_extents(sizes: Tensor, spec: ViewSpec, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Target areas ``[B,T]`` and rounded extents ``[B,T,2]`` of T tries, from uniform numbers ``[B,T,2]``."""
    area = sizes.prod(1, keepdim=True) * torch.lerp(*_bounds(spec.scale), uniform[:, :, 0])
    ratio = torch.lerp(*_bounds((math.log(spec.ratio[0]), math.log(spec.ratio[1]))), uniform[:, :, 1]).exp()
    return area, torch.stack([area / ratio, area * ratio], dim=2).sqrt().round()


def _bounds(limits: tuple[float, float]) -> tuple[Tensor, Tensor]:
    return torch.tensor(limits[0], dtype=torch.float64), torch.tensor(limits[1], dtype=torch.float64)


def _fits(extents: Tensor, sizes: Tensor) -> Tensor:
    """Which extents ``[B,T,2]`` are no larger than their image; bool ``[B,T]``."""
    return ((extents >= 1) & (extents <= sizes[:, None])).all(2)


def _first(accepted: Tensor) -> Tensor:
    """Number of the first accepted try, 0 if there is none; ``[B,T]`` to ``[B]``."""
    return accepted.int().argmax(1)


def _shared_area(boxes: Tensor, others: Tensor) -> Tensor:
    """Area that pairs of boxes ``[...,4]`` have in common."""
    low = torch.maximum(boxes[..., :2], others[..., :2])
    high = torch.minimum(boxes[..., 2:], others[..., 2:])
    return (high - low).clamp(min=0).prod(-1)


def _largest_extent(sizes: Tensor, ratio: tuple[float, float]) -> Tensor:
    """Height and width of the largest rectangle in each image whose width/height lies within ``ratio``."""
    height, width = sizes.unbind(1)
    rows = torch.minimum(height, (width / ratio[0]).round())
    columns = torch.minimum(width, (height * ratio[1]).round())
    return torch.stack([rows, columns], dim=1).clamp(min=1)


def padded_box(sizes: Tensor, spec: ViewSpec, uniform: Tensor) -> Tensor:
    """Boxes of the image's own size, displaced by whole pixels up to the padding; ``uniform`` is ``[B,2]``."""
    padding = (sizes * spec.padding).round()
    corner = (uniform * (2 * padding + 1)).floor() - padding
    return _box(corner, sizes)


def center_box(sizes: Tensor, spec: ViewSpec) -> Tensor:
    """Centred squares whose side is the fraction ``spec.center`` of the short side."""
    side = (sizes.amin(1, keepdim=True) * spec.center).round().clamp(min=1).expand_as(sizes)
    return _box(((sizes - side) / 2).round(), side)


def _box(corner: Tensor, extent: Tensor) -> Tensor:
    """x0, y0, x1, y1 ``[...,4]`` from corners and extents ``[...,2]``."""
    return torch.cat([corner.flip(-1), (corner + extent).flip(-1)], dim=-1)
