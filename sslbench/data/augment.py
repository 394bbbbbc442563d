"""Photometric operations on whole batches, with one parameter per image.

Every function takes float images ``[B,3,H,W]`` in [0, 1], returns new images in [0, 1] and leaves its input
alone. Definitions are those of ``torchvision.transforms.v2.functional`` on float tensors, unless a docstring
says otherwise.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from sslbench.data.resample import resample, resize_matrix, to_rows

LUMA = (0.2989, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue, rounded as torchvision has them."""
_CACHED_VALUES = 1 << 17
_SMALL_RADIUS = 2
"""Up to which a two-dimensional kernel is faster than two one-dimensional ones."""


def shift_hue_(images: Tensor, shift: Tensor) -> None:
    """Turn the colour circle by ``shift`` ``[B]``, a fraction of the full turn; in place.

    In HSV terms a channel is V - C*w: V the maximum, C the range of the three channels, w a trapezoid of the hue's
    distance from the channel's own hue. V and C survive a change of hue, so only w is computed anew. Nothing
    here branches per pixel: ``torch.where`` alone would take longer than all of this on a CPU.
    """
    high, low = images.amax(1), images.amin(1)
    six_chroma = (high - low).mul_(6).clamp_(min=6e-8)
    hue = _hue(images, low, six_chroma).add_(1 + shift[:, None, None]).frac_()
    # With distances in turns, C*w of green and blue is 6C * min(max(distance, 1/6), 1/3) - C. For red, C - C*w
    # is the same function of the distance from cyan.
    distance = (hue[:, None] - _opposites(images.device)).abs_().clamp_(1 / 6, 1 / 3)
    low.sub_(six_chroma, alpha=1 / 6)
    high.add_(six_chroma, alpha=1 / 6)
    torch.addcmul(low, distance[:, 0], six_chroma, out=images[:, 0])
    torch.addcmul(high[:, None], distance[:, 1:], six_chroma[:, None], value=-1, out=images[:, 1:])


@lru_cache(maxsize=8)
def _opposites(device: torch.device) -> Tensor:
    """Hues of cyan, green and blue in turns, ``[3,1,1]``."""
    return torch.tensor([1 / 2, 1 / 3, 2 / 3], device=device)[:, None, None]


def _hue(images: Tensor, low: Tensor, six_chroma: Tensor) -> Tensor:
    """Signed distance from red on the colour circle in turns, from -1/2 to 1/2; anything for grey. ``[B,H,W]``.

    Going from red to cyan on either side, first the one rises, then red falls, then the other rises, each by C:
    together they have moved by (g-min) + (b-min) + (max-r), which is C + g + b - r - min.
    """
    red, green, blue = images.unbind(1)
    moved = (green - red).add_(blue).sub_(low).div_(six_chroma).add_(1 / 6)
    return moved.copysign_(green - blue)


def solarize(images: Tensor, threshold: float = 128 / 255) -> Tensor:
    """Invert the values at or above ``threshold``."""
    return torch.where(images >= threshold, 1 - images, images)


def gaussian_blur(images: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Convolve each image with its own Gaussian of 2*radius+1 taps, reflecting at the border.

    Args:
        images: square, ``[B,3,S,S]`` with S > radius.
        sigma: standard deviations in pixels, ``[B]``.
        radius: in pixels.
    """
    tap = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (tap / sigma[:, None]).square())
    taps = (taps / taps.sum(1, keepdim=True)).repeat_interleave(3, dim=0)[:, None]
    planes = functional.pad(images, (radius,) * 4, mode="reflect").flatten(0, 1)[None]
    across, down = taps[:, :, None], taps[:, :, :, None]
    # Two passes take 4r+2 products a pixel, one pass takes (2r+1)^2, but reads the pixels once.
    kernels = (down * across,) if radius <= _SMALL_RADIUS else (across, down)
    for kernel in kernels:
        planes = functional.conv2d(planes, kernel, groups=planes.shape[1])
    return planes.view_as(images)


def resize_blur(images: Tensor, factor: float) -> Tensor:
    """Shrink square images to floor(side/factor) and enlarge them again, both bicubic and antialiased."""
    side = images.shape[-1]
    for source, target in ((side, int(side / factor)), (int(side / factor), side)):
        matrix = _resize_matrix(source, target, images.device).expand(len(images), -1, -1)
        images = resample(to_rows(images), matrix, matrix)
    return images


@lru_cache(maxsize=32)
def _resize_matrix(source: int, target: int, device: torch.device) -> Tensor:
    whole = torch.tensor([0.0, source], device=device)
    return resize_matrix(whole[:1], whole[1:], source, target, "bicubic")


class Normalization(NamedTuple):
    """Per channel of images in [0, 1], ``[3]`` on the device."""

    mean: Tensor
    std: Tensor


def normalize(images: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """(images - mean) / std per channel; ``mean`` and ``std`` are ``[3]``."""
    return (images - mean[:, None, None]).mul_((1 / std)[:, None, None])


def normalize_levels(levels: Tensor, mean: Tensor, std: Tensor, memory_format: torch.memory_format) -> Tensor:
    """The same of 8-bit images; on a CPU a few at a time, which stay in its cache from step to step."""
    images = torch.empty(levels.shape, device=levels.device, memory_format=memory_format)
    scale, offset = (1 / (255 * std))[:, None, None], (mean / std)[:, None, None]
    rows = len(levels) if levels.device.type != "cpu" else max(1, _CACHED_VALUES // levels[0].numel())
    for part, target in zip(torch.split(levels, rows), torch.split(images, rows), strict=True):
        target.copy_(part).mul_(scale).sub_(offset)
    return images
