"""With a wide enough kernel our Gaussian is Pillow's ``GaussianBlur``, with which SwAV and MoCo v2 were published.

Pillow approximates the Gaussian by three box filters of unlimited support and repeats the border pixel, where ours
reflects. So images agree but for rounding inside, and to a level on average with the border.
"""

from __future__ import annotations

import pytest
import torch
from PIL import ImageFilter
from reference import from_pil, photo_tiles, to_pil

from sslbench.data.augment import gaussian_blur
from sslbench.data.photometric import blur_radius
from sslbench.plugin.viewspec import Blur

BORDER = 8
"""Pixels that a border can reach at sigma 2."""


def difference(side: int, sigma: float, radius: int) -> torch.Tensor:
    """Ours minus Pillow's in levels of 255."""
    tiles = photo_tiles(side, side)
    tiles = tiles[:: max(1, len(tiles) // 6)]
    theirs = torch.stack([from_pil(to_pil(tile).filter(ImageFilter.GaussianBlur(sigma))) for tile in tiles])
    return 255 * (gaussian_blur(tiles.float() / 255, torch.full((len(tiles),), sigma), radius) - theirs)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    ("side", "kernel", "radius"), [(32, 0.375, 6), (96, 0.125, 6), (160, 0.1, 8), (224, 0.1, 11)]
)
def test_a_kernel_of_six_pixels_radius_is_pillows_blur_up_to_sigma_two(side, kernel, radius, sigma):
    assert blur_radius(Blur(kernel=kernel), side) == radius
    error = difference(side, sigma, radius)
    inside = error[..., BORDER:-BORDER, BORDER:-BORDER].abs()
    assert inside.max() < 5
    assert inside.mean() < 0.7
    assert error.abs().mean() < 0.9
    assert abs(error.mean()) < 0.35, "Pillow rounds to 8 bits in each of its passes"


def test_a_truncated_kernel_blurs_less_than_pillow():
    """What the wide kernel is for: the default fraction of a small view cuts the Gaussian off."""
    radius = blur_radius(Blur(), 32)
    assert radius == 1
    assert difference(32, 2.0, radius).abs().mean() > 4 * difference(32, 2.0, 6).abs().mean()
