"""Colour jitter and greyscale in as few passes over the pixels as their clamps allow.

Brightness, contrast, saturation and greyscale each take a pixel x to ``a x + b luma(x) + c``, where c is a
multiple of the mean luma of the image. Such steps compose, and with factors up to 1 they stay within [0, 1]; only
a factor above 1 needs its clamp before the next step. So the four operations of an image, in its own order, become
a few mixtures of channels around the change of hue, and normalisation is part of the last of them.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.augment import LUMA, Normalization, shift_hue_
from sslbench.data.grouping import Arranged

BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
_MOST = 3
"""Clamped mixtures of an image on one side of its change of hue."""
_WHITE = sum(LUMA)
"""Luma of a white pixel: the rounded weights do not sum to 1."""


def _towards() -> NDArray[np.float64]:
    """What factor 0 of each operation makes of the coefficients (a, b, c / mean luma): ``[4,3,3]``."""
    maps = np.zeros((4, 3, 3))
    maps[CONTRAST, 2] = 1, _WHITE, _WHITE
    maps[SATURATION, 1, :2] = 1, _WHITE
    maps[SATURATION, 2, 2] = _WHITE
    return maps


def _basis() -> NDArray[np.float64]:
    """The coefficients' parts in a mixture's matrix of red, green, blue and mean luma: ``[3,3,4]``."""
    parts = np.zeros((3, 3, 4))
    parts[0, :, :3] = np.eye(3)
    parts[1, :, :3] = LUMA
    parts[2, :, 3] = 1
    return parts


_TOWARDS, _BASIS = _towards(), _basis()
_IDENTITY = np.array([1.0, 0.0, 0.0])


class Program(NamedTuple):
    """What happens to each of N images. CPU tensors.

    A mixture is a float32 ``[3,4]``: the new channels' shares of red, green, blue and the image's mean luma.
    """

    before: Tensor
    """``[N,3,3,4]``: up to three clamped mixtures before the change of hue."""
    before_count: Tensor
    """int64 ``[N]``: how many of them."""
    turned: Tensor
    """bool ``[N]``: whether the hue changes."""
    shift: Tensor
    """float32 ``[N]``: by which part of the colour circle."""
    after: Tensor
    """``[N,3,3,4]``: up to three clamped mixtures after it."""
    after_count: Tensor
    """int64 ``[N]``"""
    last: Tensor
    """``[N,3,4]``: a mixture that needs no clamp."""


class _Writer:
    """Collects mixtures while the operations of N images are read in their orders."""

    def __init__(self, count: int) -> None:
        self.current = np.tile(_IDENTITY, (count, 1))
        self.pending = np.zeros(count, bool)
        self.clamped = np.zeros((2, count, _MOST, 3))
        self.counts = np.zeros((2, count), np.int64)
        self.side = np.zeros(count, np.int64)

    def blend(self, operation: NDArray[np.int64], factor: NDArray[np.float64]) -> None:
        """Compose one operation per image onto the current mixtures; factor 1 changes nothing."""
        towards = np.einsum("nij,nj->ni", _TOWARDS[operation], self.current)
        self.current = towards + factor[:, None] * (self.current - towards)
        self.pending |= factor != 1

    def close(self, chosen: NDArray[np.bool_]) -> None:
        """Put down the current mixtures of the chosen images and begin new ones."""
        rows = (chosen & self.pending).nonzero()[0]
        side = self.side[rows]
        self.clamped[side, rows, self.counts[side, rows]] = self.current[rows]
        self.counts[side, rows] += 1
        self.current[rows] = _IDENTITY
        self.pending[rows] = False


def compose(orders: Tensor, factors: Tensor, jittered: Tensor, turns: bool, gray: Tensor) -> Program:
    """Write the programs of N images.

    Args:
        orders: int64 ``[N,4]``: the operations, first to last.
        factors: ``[N,4]``: factors of brightness, contrast and saturation and the hue shift.
        jittered: bool ``[N]``: images whose factors count.
        turns: whether jitter changes the hue.
        gray: bool ``[N]``: images that end up grey.
    """
    turned = jittered.numpy() & turns
    blends = np.where(jittered.numpy()[:, None], factors.double().numpy(), 1.0)
    blends[:, HUE] = 1
    writer = _Writer(len(blends))
    for operation in orders.numpy().T:
        meets_hue = turned & (operation == HUE)
        writer.close(meets_hue)
        writer.side[meets_hue] = 1
        factor = np.take_along_axis(blends, operation[:, None], 1)[:, 0]
        writer.blend(operation, factor)
        writer.close(factor > 1)
    writer.blend(np.full(len(blends), SATURATION), np.where(gray.numpy(), 0.0, 1.0))
    (before, after), last = _mixtures(writer.clamped), _mixtures(writer.current)
    before_count, after_count = torch.from_numpy(writer.counts)
    return Program(
        before, before_count, torch.from_numpy(turned), factors[:, HUE].float(), after, after_count, last
    )


def _mixtures(coefficients: NDArray[np.float64]) -> Tensor:
    return torch.from_numpy(np.tensordot(coefficients, _BASIS, 1).astype(np.float32))


def run(images: Arranged, program: Program, normalization: Normalization | None) -> None:
    """Carry out a program.

    Args:
        images: N images in [0, 1].
        program: theirs.
        normalization: done in passing; None: the results are in [0, 1], up to rounding.
    """
    # Jitter turns the hue of all images it touches or of none, so both kinds of first rows exist in one order.
    _run_clamped(images, program.before, program.before_count, program.turned)
    if turned := int(program.turned.sum()):
        shift_hue_(images.rows[:turned], images.of(program.shift)[:turned])
    _run_clamped(images, program.after, program.after_count)
    if normalization is not None or not torch.equal(program.last, _mixtures(_IDENTITY).expand_as(program.last)):
        images.rows = mix(images.rows, images.of(program.last), normalization)


def _run_clamped(images: Arranged, mixtures: Tensor, counts: Tensor, first: Tensor | None = None) -> None:
    """Carry out clamped mixtures in place; ``first`` marks images that are to precede all others."""
    most = int(counts.max())
    if most == 0 and (first is None or not bool(first.any())):
        return
    images.sort(counts if first is None else counts + (_MOST + 1) * first)
    mixtures = images.of(mixtures[:, :most])
    for number in range(most):
        rows = images.rows[: int((counts > number).sum())]
        torch.clamp(mix(rows, mixtures[: len(rows), number]), 0, 1, out=rows)


def mix(images: Tensor, mixtures: Tensor, normalization: Normalization | None = None) -> Tensor:
    """Apply mixtures ``[N,3,4]`` to images ``[N,3,H,W]``, then normalise them."""
    if normalization is not None:
        mixtures = mixtures / normalization.std[:, None]
    red, green, blue = images.mean((2, 3)).unbind(1)
    luma = red * LUMA[0] + green * LUMA[1] + blue * LUMA[2]
    offset = mixtures[:, :, 3] * luma[:, None]
    if normalization is not None:
        offset -= normalization.mean / normalization.std
    return torch.baddbmm(offset[:, :, None], mixtures[:, :, :3], images.flatten(2)).view_as(images)
