"""Photometric operations on whole batches, with one parameter per image.

Every function takes float images ``[B,3,H,W]`` in [0, 1], returns new images in [0, 1] and leaves its input
alone. Definitions are those of ``torchvision.transforms.v2.functional`` on float tensors, unless a docstring
says otherwise.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from sslbench.data.resample import resample, resize_matrix, to_rows

LUMA = (0.2989, 0.587, 0.114)
"""ITU-R 601 weights of red, green and blue, rounded as torchvision has them."""
_CACHED_VALUES = 1 << 17


def _per_image(values: Tensor) -> Tensor:
    return values[:, None, None, None]


def _luma(images: Tensor) -> Tensor:
    """Brightness of each pixel, ``[B,1,H,W]``."""
    red, green, blue = images.chunk(3, dim=1)
    return (red * LUMA[0]).add_(green, alpha=LUMA[1]).add_(blue, alpha=LUMA[2])


def adjust_brightness(images: Tensor, factor: Tensor) -> Tensor:
    """Scale towards black (factor < 1) or away from it; ``factor`` is ``[B]``."""
    return (images * _per_image(factor)).clamp_(0, 1)


def adjust_contrast(images: Tensor, factor: Tensor) -> Tensor:
    """Scale around the mean brightness of each image; ``factor`` is ``[B]``."""
    red, green, blue = images.mean(dim=(2, 3)).unbind(1)
    mean = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    return (images * _per_image(factor)).add_(_per_image((1 - factor) * mean)).clamp_(0, 1)


def adjust_saturation(images: Tensor, factor: Tensor) -> Tensor:
    """Scale around the brightness of each pixel; ``factor`` is ``[B]``."""
    return torch.lerp(_luma(images), images, _per_image(factor)).clamp_(0, 1)


def adjust_hue(images: Tensor, shift: Tensor) -> Tensor:
    """Turn the colour circle by ``shift`` ``[B]``, a fraction of the full turn.

    In HSV terms a channel is V - C*w: V the maximum, C the range of the three channels, w a trapezoid of the hue's
    distance from the channel's own hue. V and C survive a change of hue, so only w is computed anew. Nothing
    here branches per pixel: ``torch.where`` alone would take longer than all of this on a CPU.
    """
    value, low = images.amax(1), images.amin(1)
    chroma = value - low
    hue = _hue(images, low, chroma).add_(6 * shift[:, None, None])
    hue.sub_((hue / 6).floor_(), alpha=6)
    weights = torch.stack([hue - 3, hue - 2, hue - 4], dim=1).abs_()
    weights[:, 0].neg_().add_(3)
    weights.sub_(1).clamp_(0, 1)
    return torch.addcmul(value[:, None], weights, chroma[:, None], value=-1)


def _hue(images: Tensor, low: Tensor, chroma: Tensor) -> Tensor:
    """Signed distance from red on the colour circle in sixths, from -3 to 3; anything for grey. ``[B,H,W]``.

    Going from red to cyan on either side, first the one rises, then red falls, then the other rises, each by C:
    together they have moved by (g-min) + (b-min) + (max-r), which is C + g + b - r - min.
    """
    red, green, blue = images.unbind(1)
    moved = (green - red).add_(blue - low).div_(chroma.clamp(min=1e-8)).add_(1)
    return torch.copysign(moved, green - blue)


def grayscale(images: Tensor) -> Tensor:
    """The brightness of each pixel in all three channels."""
    return _luma(images).expand_as(images)


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
    side = images.shape[-1]
    tap = torch.arange(-radius, radius + 1, device=images.device, dtype=torch.float32)
    taps = torch.exp(-0.5 * (tap / sigma[:, None]).square())
    taps /= taps.sum(1, keepdim=True)
    matrices = (taps @ _reflected_shifts(side, radius, images.device)).reshape(-1, side, side)
    return resample(to_rows(images), matrices, matrices)


@lru_cache(maxsize=16)
def _reflected_shifts(side: int, radius: int, device: torch.device) -> Tensor:
    """Matrices that shift an axis by -radius..radius pixels with reflection: ``[2*radius+1, side*side]``."""
    shift = torch.arange(-radius, radius + 1)[:, None]
    source = (torch.arange(side) + shift).abs()
    source = (side - 1) - (side - 1 - source).abs()
    return torch.nn.functional.one_hot(source, side).to(device, torch.float32).flatten(1)


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
