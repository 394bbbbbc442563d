"""Operations of learned augmentation policies on whole batches of 8-bit images.

Policies are made of Pillow's operations, most of which are defined by 8-bit levels (bits, histograms, thresholds).
So these work on levels and round where Pillow rounds: results equal those of
``torchvision.transforms.functional`` on PIL images to the bit. Every function takes uint8 images ``[B,3,H,W]``
and, if it has a strength, one per image, float ``[B]``; it returns new images and waits for no device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LEVELS = 256
_LUMA = (19595, 38470, 7471)
"""Pillow's weights of red, green and blue in 65536ths."""
_FIXED_POINT = 65536
_FARTHEST = 8192
"""Longest side in pixels whose coordinates fit into 32-bit fixed point numbers."""


def invert(images: Tensor) -> Tensor:
    """The negative."""
    return 255 - images


def posterize(images: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` (1 to 8) of each level."""
    masks = LEVELS - torch.exp2(8 - bits)
    return images & _per_image(masks).to(torch.uint8)


def solarize(images: Tensor, threshold: Tensor) -> Tensor:
    """Invert the levels at or above ``threshold`` (0 to 256)."""
    lowest = _per_image(threshold.ceil().clamp(max=255)).to(torch.uint8)
    inverting = _per_image((threshold <= 255) * 255).to(torch.uint8)
    return images ^ (images >= lowest).view(torch.uint8).mul_(inverting)  # x ^ 255 is 255 - x


def autocontrast(images: Tensor) -> Tensor:
    """Stretch each channel of each image to the whole range."""
    low, high = (end.flatten()[:, None].double() for end in (images.amin((2, 3)), images.amax((2, 3))))
    level = torch.arange(LEVELS, device=images.device)
    scale = torch.full_like(high, 255).div_(high - low)  # `255 / x` is 255 * (1 / x), which rounds twice
    tables = (level * scale - low * scale).clamp_(0, 255).to(torch.uint8)
    return torch.where(high > low, tables, level.to(torch.uint8)).gather(1, _planes(images)).reshape(images.shape)


def equalize(images: Tensor) -> Tensor:
    """Flatten the histogram of each channel of each image."""
    planes = _planes(images)
    counts = planes.new_zeros(len(planes), LEVELS).scatter_add_(1, planes, torch.ones_like(planes))
    before = counts.cumsum(1) - counts
    highest = images.amax((2, 3)).flatten()[:, None]
    step = before.gather(1, highest.long()) // 255
    level = torch.arange(LEVELS, device=images.device)
    tables = ((before + step // 2) // step.clamp(min=1)).clamp_(max=255)
    return torch.where(step > 0, tables, level).to(torch.uint8).gather(1, planes).reshape(images.shape)


def _planes(images: Tensor) -> Tensor:
    """Levels as numbers of table columns, int64 ``[B*3,H*W]``."""
    return images.flatten(0, 1).flatten(1).long()


def color(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the greyscale image: 0 is grey, 1 the image."""
    return _blend(_luma(images), images, factor)


def contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with the mean brightness of the image: 0 is flat, 1 the image."""
    brightness = _luma(images)
    mean = brightness.sum((1, 2, 3), dtype=torch.float64) / brightness[0].numel()
    return _blend(_per_image((mean + 0.5).floor().float()), images, factor)


def sharpness(images: Tensor, factor: Tensor) -> Tensor:
    """Blend with a smoothed image, 3x3 without its border: 0 is smooth, 1 the image."""
    levels = images.float()
    columns = levels[..., :-2] + levels[..., 1:-1] + levels[..., 2:]
    box = columns[..., :-2, :] + columns[..., 1:-1, :] + columns[..., 2:, :]
    center = levels[..., 1:-1, 1:-1]
    smooth = levels.clone()
    smooth[..., 1:-1, 1:-1] = ((box + 4 * center) / 13 + 0.5).floor()
    return _blend(smooth, images, factor)


def _luma(images: Tensor) -> Tensor:
    """Brightness in whole levels, float32 ``[B,1,H,W]``; all sums stay below 2^24 and so exact."""
    red, green, blue = images.float().chunk(3, dim=1)
    return (red * _LUMA[0] + green * _LUMA[1] + blue * _LUMA[2] + 32768).div_(_FIXED_POINT).floor_()


def _blend(other: Tensor, images: Tensor, factor: Tensor) -> Tensor:
    """``other`` + factor * (images - other), cut to 8 bits as Pillow does."""
    return (images - other).mul_(_per_image(factor)).add_(other).clamp_(0, 255).to(torch.uint8)


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def rotate(images: Tensor, degrees: Tensor) -> Tensor:
    """Turn counter-clockwise about the centre; the corners become black."""
    height, width = images.shape[-2:]
    angle = -degrees.double() * (math.pi / 180)
    cos, sin = angle.cos(), angle.sin()
    x = width / 2 - cos * (width / 2) - sin * (height / 2)
    y = height / 2 + sin * (width / 2) - cos * (height / 2)
    return _transform(images, torch.stack([cos, sin, x, -sin, cos, y], dim=1))


def shear_x(images: Tensor, angle: Tensor) -> Tensor:
    """Shift each row to the left by tan(``angle``) times its distance below the centre; the uncovered is black.

    Args:
        angle: in radians.
    """
    slope = angle.double().tan()
    zero, one = torch.zeros_like(slope), torch.ones_like(slope)
    start = -slope * (images.shape[-2] / 2)
    return _transform(images, torch.stack([one, slope, start, zero, one, zero], dim=1))


def _transform(images: Tensor, matrix: Tensor) -> Tensor:
    """Look up, for each pixel, the nearest source pixel of an affine map; black beyond the image.

    In fixed point numbers as Pillow, whose ties and rounding this repeats.

    Args:
        images: sides of at most 8192 pixels.
        matrix: float64 ``[B,6]``; the source of the point (x, y) is (m0 x + m1 y + m2, m3 x + m4 y + m5).
    """
    height, width = images.shape[-2:]
    assert max(height, width) <= _FARTHEST
    rows = matrix.reshape(-1, 2, 3)
    offset = rows[:, :, 2] + (rows[:, :, 0] + rows[:, :, 1]) / 2
    fixed = torch.cat([rows[:, :, :2], offset[:, :, None]], dim=2).mul_(_FIXED_POINT).add_(0.5).floor_().int()
    x = torch.arange(width, device=images.device, dtype=torch.int32)
    y = torch.arange(height, device=images.device, dtype=torch.int32)[:, None]
    slope_x, slope_y, start = (part[:, :, None, None] for part in fixed.unbind(2))
    column, row = ((slope_x * x + slope_y * y + start) >> 16).unbind(1)
    inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
    source = (row * width + column).mul_(inside).flatten(1).long()
    planes = images.flatten(2)
    moved = planes.gather(2, source[:, None].expand(-1, planes.shape[1], -1)).reshape(images.shape)
    return moved.mul_(inside[:, None])
