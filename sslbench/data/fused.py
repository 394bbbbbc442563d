"""All of colour jitter, greyscale and normalisation as one affine map per image: the ``fused`` form of colours.

Two approximations buy this: values are cut to [0, 1] once at the end instead of after each operation, and the hue
turns linearly, by a rotation about the grey axis, which equals the turn of the HSV circle at each third of it.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.augment import LUMA, Normalization
from sslbench.data.jitter import CONTRAST, HUE, SATURATION

_TO_GRAY = np.tile(LUMA, (3, 1))


class AffineColors(NamedTuple):
    """Pixels x of an image of mean colour m become ``pixel @ x + mean @ m``. CPU tensors, float32 ``[N,3,3]``."""

    pixel: Tensor
    mean: Tensor


def compose_affine(orders: Tensor, factors: Tensor, jittered: Tensor, turns: bool, gray: Tensor) -> AffineColors:
    """One affine map for each of N images; arguments as of :func:`sslbench.data.jitter.compose`."""
    some = jittered.numpy()
    values = np.where(some[:, None], factors.double().numpy(), (1, 1, 1, 0))
    pixel, mean = np.tile(np.eye(3), (len(values), 1, 1)), np.zeros((len(values), 3, 3))
    turn = _hue_rotation(values[:, HUE] * turns)
    for operation in orders.numpy().T:
        value = np.take_along_axis(values, operation[:, None], 1)[:, :, None]
        factor = np.where(operation[:, None, None] == HUE, 1.0, value)
        flat = np.where(operation[:, None, None] == CONTRAST, (1 - factor) * (_TO_GRAY @ (pixel + mean)), 0.0)
        saturate = np.where(operation[:, None, None] == SATURATION, (1 - factor) * _TO_GRAY, 0.0)
        step = np.where(operation[:, None, None] == HUE, turn, factor * np.eye(3) + saturate)
        pixel, mean = step @ pixel, step @ mean + flat
    to_gray = np.where(gray.numpy()[:, None, None], _TO_GRAY, np.eye(3))
    return AffineColors(*(torch.from_numpy((to_gray @ part).astype(np.float32)) for part in (pixel, mean)))


def _hue_rotation(shift: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rotations about the grey axis by fractions ``[N]`` of the full turn: ``[N,3,3]``."""
    angle = 2 * math.pi * shift[:, None, None]
    place = (np.arange(3)[:, None] - np.arange(3)) * (2 * math.pi / 3)
    return (1 + 2 * np.cos(place - angle)) / 3


def run_affine(images: Tensor, colors: AffineColors, normalization: Normalization | None) -> Tensor:
    """Carry them out on images ``[N,3,S,S]`` in [0, 1], cut to [0, 1] and normalise; new images."""
    pixel, mean = (part.to(images.device, non_blocking=True) for part in colors)
    offset = mean @ images.mean((2, 3))[:, :, None]
    results = torch.baddbmm(offset, pixel, images.flatten(2)).clamp_(0, 1).view_as(images)
    if normalization is None:
        return results
    return results.sub_(normalization.mean[:, None, None]).mul_((1 / normalization.std)[:, None, None])
