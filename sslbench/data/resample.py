"""Cropping and resizing as products with two small matrices per image.

Antialiased interpolation is linear and separable, so a whole batch of differently cropped, mirrored and resized
images is ``rows @ image @ columns^T`` with per-sample matrices: two batched matrix products, on any device.
The weights are those of Pillow's ``Image.resize`` on the cropped image.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

_TABLE_LIMIT = 32 << 20
"""Bytes of matrices that are worth keeping."""


def bilinear_kernel(distance: Tensor) -> Tensor:
    """Triangle of support 1."""
    return (1 - distance).clamp_(min=0)


def bicubic_kernel(distance: Tensor) -> Tensor:
    """Keys' cubic with a=-0.5 (as Pillow), support 2, for distances >= 0.

    Written with truncated polynomials instead of a case distinction: with u = max(2-x, 0) and v = max(1-x, 0) it
    is v^2 (1 - 2v) - u^2 (1 - u) / 2.
    """
    u = (2 - distance).clamp_(min=0)
    v = (1 - distance).clamp_(min=0)
    return v.square().mul_(1 - 2 * v) - u.square().mul_(0.5 - 0.5 * u)


KERNELS = {"bilinear": bilinear_kernel, "bicubic": bicubic_kernel}


def resize_matrix(
    start: Tensor,
    stop: Tensor,
    length: int,
    out: int,
    interpolation: str,
    flip: Tensor | None = None,
    margin: int = 0,
) -> Tensor:
    """Weights that crop one axis to whole pixels ``[start, stop)`` and resize the crop to ``out`` pixels.

    Pixels outside the crop have weight zero, so nothing leaks in from beyond its border; the weights of each
    output pixel sum to 1. Where the crop exceeds the image, the missing pixels count as zeros.

    Args:
        start: first pixel of each crop, float ``[B]``, at least ``-margin``.
        stop: the pixel after its last, float ``[B]``, at most ``length + margin``.
        length: pixels of the source axis.
        out: pixels of the result.
        interpolation: ``bilinear`` or ``bicubic``.
        flip: bool ``[B]``, whether to reverse the result.
        margin: by how many pixels crops may exceed the image.

    Returns:
        float32 ``[B, out, length]``.
    """
    pixel = torch.arange(-margin, length + margin, device=start.device, dtype=torch.float32)
    scale = (stop - start) / out
    target = torch.arange(out, device=start.device, dtype=torch.float32) + 0.5
    if flip is not None:
        target = torch.where(flip[:, None], out - target, target)
    center = start[:, None] + target * scale[:, None]
    stretch = scale.clamp(min=1)[:, None, None]
    weights = KERNELS[interpolation](((pixel + 0.5 - center[:, :, None]) / stretch).abs_())
    inside = (pixel >= start[:, None]) & (pixel < stop[:, None])
    weights *= inside[:, None]
    weights /= weights.sum(2, keepdim=True)
    return weights[:, :, margin : margin + length]


def crop_matrix(
    start: Tensor,
    stop: Tensor,
    length: int,
    out: int,
    interpolation: str,
    flip: Tensor,
    margin: int,
    device: torch.device,
) -> Tensor:
    """:func:`resize_matrix` on a device, from arguments on the CPU.

    A short axis has few crops: the matrices of all of them are computed once, and a batch looks its own up.
    """
    extent = length + 2 * margin
    if 4 * length * out * extent * (extent + 1) > _TABLE_LIMIT:
        start, stop, flip = (part.to(device, non_blocking=True) for part in (start, stop, flip))
        return resize_matrix(start, stop, length, out, interpolation, flip, margin)
    last, first = (stop + margin - 1).long(), (start + margin).long()
    number = 2 * (last * (last + 1) // 2 + first) + flip
    table = _crop_table(length, out, interpolation, margin, device)
    return table.index_select(0, number.to(device, non_blocking=True))


@lru_cache(maxsize=8)
def _crop_table(length: int, out: int, interpolation: str, margin: int, device: torch.device) -> Tensor:
    """Matrices of all crops of an axis, by last and first pixel and flip: ``[M,out,length]``."""
    last, first = torch.tril_indices(length + 2 * margin, length + 2 * margin)
    start, stop = ((edge - margin).float().repeat_interleave(2) for edge in (first, last + 1))
    flip = torch.tensor([False, True]).repeat(len(first))
    return resize_matrix(start, stop, length, out, interpolation, flip, margin).to(device)


def to_rows(images: Tensor) -> Tensor:
    """``[B,C,H,W]`` to float32 ``[B,H,C,W]``, the layout :func:`resample` reads; values stay as they are."""
    return images.permute(0, 2, 1, 3).to(torch.float32, memory_format=torch.contiguous_format)


def resample(rows: Tensor, vertical: Tensor, horizontal: Tensor) -> Tensor:
    """Apply pairs of matrices to images.

    Both passes are cut to [0, 1], as by Pillow's 8-bit intermediate: the bicubic kernel overshoots at edges.

    Args:
        rows: ``[B,H,C,W]`` in [0, 1].
        vertical: ``[V*B,H',H]``, of V views of all images one after the other.
        horizontal: ``[V*B,W',W]``.

    Returns:
        ``[V*B,C,H',W']`` in [0, 1], contiguous.
    """
    batch, height, channels, width = rows.shape
    results, out_height, out_width = len(vertical), vertical.shape[1], horizontal.shape[1]
    views = results // batch
    wide = rows.new_empty(results, height * channels, out_width)
    lines = rows.reshape(batch, height * channels, width)
    for view, matrix in zip(wide.tensor_split(views), horizontal.tensor_split(views), strict=True):
        torch.bmm(lines, matrix.mT, out=view)
    both = torch.bmm(vertical, wide.clamp_(0, 1).view(results, height, channels * out_width))
    planes = both.reshape(results, out_height, channels, out_width).permute(0, 2, 1, 3)
    return torch.clamp(planes, 0, 1, out=rows.new_empty(planes.shape))
