"""Boxes that show the same part of the image in two views (SCRL: Roh et al., CVPR 2021, as its code samples them).

A whole batch is sampled at once: images x boxes x tries in tensor operations, from uniform numbers that are
given. Three frames are in play. *Source*: pixels of the un-flipped image. *View*: pixels of a view, after its
flip. *Reference*: pixels of the overlap of both crops, on each axis at the scale of the view that is more
zoomed out, so that a side of ``min_size`` reference pixels is at least that long in both views.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from sslbench.config.options import Options
from sslbench.plugin.api import View


class BoxSampling(Options):
    """How matched boxes are drawn."""

    per_image: int = Field(10, ge=1)
    """Boxes per pair of views that overlap enough; the other pairs have none."""
    mode: Literal["grid", "free"] = "grid"
    """`grid`: within a cell of a random grid over the overlap, which favours small boxes; `free`: anywhere."""
    min_size: int | None = Field(None, ge=1)
    """Least side in pixels of the view that is more zoomed out; unset: the backbone's stride, one cell of its
    map (32 pixels for the ResNets of the paper)."""
    iou_threshold: float = Field(0.5, gt=0, le=1)
    """A box is drawn again while its overlap with an earlier one reaches this; 1: never."""
    tries: int = Field(50, ge=1)
    """Candidates per box; if all overlap too much, the last one is kept, as the authors' code does."""
    jitter: float = Field(0.0, ge=0, lt=1)
    """Moves and scales the boxes of view 2 by up to this fraction of their sides (0.1 in the authors' code,
    where it is off)."""


class Crop(NamedTuple):
    """What a view shows of its source image."""

    box: Tensor
    """float ``[B,4]``: left, top, right, bottom in source pixels."""
    flip: Tensor
    """bool ``[B]``"""

    @classmethod
    def of(cls, view: View) -> Crop:
        return cls(view.box * view.source_size.repeat(1, 2), view.flip)

    def to(self, device: torch.device) -> Crop:
        return Crop(*(field.to(device, non_blocking=True) for field in self))

    def scale(self, side: int) -> Tensor:
        """``[B,2]``: view pixels per source pixel, horizontally and vertically."""
        return side / (self.box[:, 2:] - self.box[:, :2])


class Overlap(NamedTuple):
    """The part of the source image that two crops share: the reference frame."""

    corner: Tensor
    """float ``[B,2]``: left and top in source pixels."""
    scale: Tensor
    """float ``[B,2]``: reference pixels per source pixel."""
    extent: Tensor
    """float ``[B,2]``: whole width and height in reference pixels; not positive without an overlap."""

    def to(self, device: torch.device) -> Overlap:
        return Overlap(*(field.to(device, non_blocking=True) for field in self))


class MatchedBoxes(NamedTuple):
    """K pairs of boxes per image: left, top, right, bottom in view pixels."""

    first: Tensor
    """float ``[B,K,4]`` in view 1."""
    second: Tensor
    """float ``[B,K,4]`` in view 2."""
    valid: Tensor
    """bool ``[B]`` on the CPU, as the crops are: whether the image's views overlap enough; else its boxes are
    meaningless."""


def match_boxes(
    first: View, second: View, sampling: BoxSampling, min_size: int, uniform: Callable[..., Tensor]
) -> MatchedBoxes:
    """Sample matched boxes.

    Args:
        first, second: views of the same images, square and of one size.
        sampling: the options; its ``min_size`` is not read.
        min_size: least side in reference pixels.
        uniform: gives float ``[B, *shape]`` in [0, 1); :meth:`Batch.uniform`.
    """
    side, device = first.images.shape[-1], first.images.device
    crops = Crop.of(first), Crop.of(second)
    shared = overlap(*crops, side)
    valid = (shared.extent > min_size).all(dim=1)
    crops, shared = (crops[0].to(device), crops[1].to(device)), shared.to(device)
    rectangles = _candidates(shared.extent, sampling, min_size, uniform)
    tried = project(rectangles, shared, crops[0], side).clamp_(0, side)
    chosen = first_distinct(tried, sampling.iou_threshold)[:, :, None, None]
    rectangles = rectangles.take_along_dim(chosen, dim=2).squeeze(2)
    boxes = [project(rectangles, shared, crop, side) for crop in crops]
    if sampling.jitter:
        boxes[1] = jittered(boxes[1], 1 + sampling.jitter * (2 * uniform(sampling.per_image, 4) - 1))
    return MatchedBoxes(boxes[0].clamp(0, side), boxes[1].clamp(0, side), valid)


def overlap(first: Crop, second: Crop, side: int) -> Overlap:
    """The reference frame of two crops that were resized to ``side`` pixels."""
    corner = torch.maximum(first.box[:, :2], second.box[:, :2])
    opposite = torch.minimum(first.box[:, 2:], second.box[:, 2:])
    scale = torch.minimum(first.scale(side), second.scale(side))
    return Overlap(corner, scale, ((opposite - corner) * scale).round())


def _candidates(extent: Tensor, sampling: BoxSampling, min_size: int, uniform: Callable[..., Tensor]) -> Tensor:
    """``[B,K,T,4]``: every try of every box as x, y, width, height in the reference frame."""
    tries = sampling.tries if sampling.iou_threshold < 1 else 1
    extent = extent.clamp_min(min_size + 1)[:, None, None]  # images without overlap: any valid rectangle
    if sampling.mode == "free":
        return free_rectangles(uniform(sampling.per_image, tries, 4), extent, min_size)
    return grid_rectangles(grid_draws(uniform(sampling.per_image, tries, 8), extent, min_size), extent)


def grid_draws(u: Tensor, extent: Tensor, min_size: int) -> Tensor:
    """Turn uniforms ``[...,8]`` into the whole numbers of grid mode.

    Args:
        u: uniforms in [0, 1).
        extent: ``[...,2]`` width and height of the reference frame, broadcastable.

    Returns:
        ``[...,8]``: columns and rows of the grid, column and row of the cell, width and height of the box, and
        its offset in the cell.
    """
    grid = _integers(u[..., 0:2], 1, (extent / min_size).floor())
    cell = _integers(u[..., 2:4], 0, grid - 1)
    size = _integers(u[..., 4:6], min_size, (extent / grid).floor())
    offset = _integers(u[..., 6:8], 0, (extent / grid - size).floor())
    return torch.cat([grid, cell, size, offset], dim=-1)


def grid_rectangles(draws: Tensor, extent: Tensor) -> Tensor:
    """``[...,4]``: the rectangles (x, y, width, height) that :func:`grid_draws` describes."""
    grid, cell, size, offset = draws.chunk(4, dim=-1)
    return torch.cat([(cell * extent / grid).floor() + offset, size], dim=-1)


def free_rectangles(u: Tensor, extent: Tensor, min_size: int) -> Tensor:
    """``[...,4]``: rectangles (x, y, width, height) anywhere in the frame, from uniforms ``[...,4]``."""
    size = _integers(u[..., 0:2], min_size, extent - 1)
    corner = _integers(u[..., 2:4], 0, extent - size - 1)
    return torch.cat([corner, size], dim=-1)


def _integers(u: Tensor, low: Tensor | int, high: Tensor) -> Tensor:
    """Whole numbers in {low..high}, both included."""
    return low + (u * (high - low + 1)).floor()


def project(rectangles: Tensor, shared: Overlap, crop: Crop, side: int) -> Tensor:
    """Where reference rectangles lie in a view.

    Args:
        rectangles: ``[B,...,4]`` x, y, width, height in the reference frame.
        shared: the frame.
        crop: of the view; its flip mirrors the boxes.
        side: of the view in pixels.

    Returns:
        ``[B,...,4]`` left, top, right, bottom in view pixels, not clipped.
    """
    scale = crop.scale(side)
    zoom = _like(scale / shared.scale, rectangles)
    origin = _like((shared.corner - crop.box[:, :2]) * scale, rectangles)
    low = rectangles[..., :2] * zoom + origin
    high = low + rectangles[..., 2:] * zoom
    boxes = torch.cat([low, high], dim=-1)
    mirrored = torch.stack([side - high[..., 0], low[..., 1], side - low[..., 0], high[..., 1]], dim=-1)
    return torch.where(_like(crop.flip[:, None], rectangles), mirrored, boxes)


def _like(per_image: Tensor, rectangles: Tensor) -> Tensor:
    """``[B,n]`` as ``[B,1,...,1,n]``, to broadcast over boxes and tries."""
    return per_image.view(len(per_image), *[1] * (rectangles.ndim - 2), -1)


def first_distinct(candidates: Tensor, threshold: float) -> Tensor:
    """For each box, the first try that overlaps all earlier boxes of its image by less than ``threshold``.

    Args:
        candidates: ``[B,K,T,4]``: T tries for each of K boxes.
        threshold: bound on the intersection over union.

    Returns:
        int64 ``[B,K]`` try numbers; the last one where no try succeeds.
    """
    free = torch.ones(candidates.shape[:3], dtype=torch.bool, device=candidates.device)
    picks = []
    for number in range(candidates.shape[1]):
        pick = _first_or_last(free[:, number])
        picks.append(pick)
        chosen = candidates[:, number].take_along_dim(pick[:, None, None], dim=1)
        free[:, number + 1 :] &= iou(candidates[:, number + 1 :], chosen[:, None]) < threshold
    return torch.stack(picks, dim=1)


def _first_or_last(free: Tensor) -> Tensor:
    """int64 ``[B]``: the number of the first True of each row of bool ``[B,T]``, else of the last entry."""
    free[:, -1] = True
    return free.byte().argmax(dim=1)


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union ``[...]`` of two sets of boxes ``[...,4]`` whose shapes broadcast."""
    left, top, right, bottom = a.unbind(-1)
    other_left, other_top, other_right, other_bottom = b.unbind(-1)
    width = torch.minimum(right, other_right) - torch.maximum(left, other_left)
    height = torch.minimum(bottom, other_bottom) - torch.maximum(top, other_top)
    shared = width.clamp_min_(0) * height.clamp_min_(0)
    return shared / (_area(a) + _area(b) - shared)


def _area(boxes: Tensor) -> Tensor:
    # Products along a dimension of two entries are slow.
    width, height = (boxes[..., 2:] - boxes[..., :2]).unbind(-1)
    return width * height


def jittered(boxes: Tensor, factors: Tensor) -> Tensor:
    """Move and scale boxes ``[...,4]`` by factors ``[...,4]`` around 1: left, top, width, height."""
    size = boxes[..., 2:] - boxes[..., :2]
    corner = boxes[..., :2] + size * (factors[..., :2] - 1)
    return torch.cat([corner, corner + size * factors[..., 2:]], dim=-1)
