"""Cropping images one at a time, whatever their sizes: what decoding worker processes do.

:mod:`sslbench.data.views` does the same for whole batches of images of one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor
from torch.nn import functional as F

from sslbench.plugin.viewspec import ViewSpec


class Geometry(NamedTuple):
    """Where one view of each image comes from. CPU tensors."""

    box: Tensor
    """float32 ``[B,4]``: x0, y0, x1, y1 in whole pixels of the unflipped source; ``padded`` may exceed it."""
    flip: Tensor
    """bool ``[B]``"""


def side_of(spec: ViewSpec) -> int:
    """Side in pixels of an expanded specification's view."""
    assert spec.size is not None, "expand() fills in the size"
    return spec.size


def crop_image(image: Tensor, specs: Sequence[ViewSpec], geometry: Sequence[Geometry]) -> list[Tensor]:
    """Crop, resize and flip one image of any size.

    Args:
        image: uint8 ``[3,H,W]`` on the CPU.
        specs: expanded.
        geometry: one per view, with B=1.

    Returns:
        Per view uint8 ``[3,S,S]``, within rounding of what :meth:`sslbench.data.views.ViewExecutor.crop` gives.
    """
    return [_crop_view(image, spec, g) for spec, g in zip(specs, geometry, strict=True)]


def _crop_view(image: Tensor, spec: ViewSpec, geometry: Geometry) -> Tensor:
    height, width = image.shape[1:]
    x0, y0, x1, y1 = (int(edge) for edge in geometry.box[0].tolist())
    part = image[:, max(y0, 0) : y1, max(x0, 0) : x1]
    outside = (max(-x0, 0), max(x1 - width, 0), max(-y0, 0), max(y1 - height, 0))
    if any(outside):
        part = F.pad(part, outside)
    side = side_of(spec)
    # torch resizes 8-bit images on the CPU with Pillow's weights and vector instructions.
    view = F.interpolate(part[None], (side, side), mode=spec.interpolation, antialias=True, align_corners=False)[0]
    return view.flip(2) if bool(geometry.flip[0]) else view
