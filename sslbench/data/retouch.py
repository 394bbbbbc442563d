"""The photometric part of a view, one 8-bit image at a time: what decoding worker processes do.

:mod:`sslbench.data.photometric` does the same to whole batches, with the same numbers. The planes of one large
view fit a core's cache, those of a batch do not, and an image of its own needs no broadcasting: brightness is
one multiplication by a number. NumPy's operations on small arrays start faster than torch's and know no threads,
on whose number a result could depend.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from sslbench.data.augment import LUMA, resize_blur
from sslbench.data.autoaugment import Decisions, autoaugment, decide
from sslbench.data.photometric import blur_radius, jitter_factors, jitter_orders
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

Planes = NDArray[np.float32]
"""float32 ``[C,S,S]`` from 0 to 255: red, green and blue, or one plane that stands for all three."""

_STRIP = 32
_SIGN = np.int32(-(1 << 31))


class Retouch(NamedTuple):
    """What happens to the pixels of one view of one image."""

    policy: Decisions | None
    """AutoAugment, with B=1; it takes the place of everything else."""
    jitter: tuple[tuple[int, float], ...]
    """Numbers and parameters of the operations of ``JITTERS``, in their order."""
    gray: bool
    sigma: float | None
    """Standard deviation of a Gaussian blur."""
    shrink: float | None
    """Factor of a blur by shrinking and enlarging."""
    solarize: bool


def plan(spec: ViewSpec, draws: Draws, stream: str) -> list[Retouch]:
    """What happens to each of B images: exactly what ``augment_colors`` does for the same arguments."""
    total = len(draws)
    policies = _plan_policies(spec, draws, stream)
    jitters = _plan_jitter(spec.jitter, draws, stream) if spec.jitter else [()] * total
    sigmas, shrinks = _plan_blur(spec.blur, draws, stream)
    grays, negatives = (
        _happens(probability, draws, f"{stream}/{name}")
        for name, probability in (("gray", spec.gray), ("solarize", spec.solarize))
    )
    return list(map(Retouch, policies, jitters, grays, sigmas, shrinks, negatives))


def _happens(probability: float, draws: Draws, stream: str) -> list[bool]:
    if probability <= 0:
        return [False] * len(draws)
    happens: list[bool] = (draws.uniform(stream) < probability).tolist()
    return happens


def _plan_policies(spec: ViewSpec, draws: Draws, stream: str) -> list[Decisions | None]:
    if spec.autoaugment == 0:
        return [None] * len(draws)
    uniform = draws.uniform(f"{stream}/autoaugment", 6)
    decisions = decide(uniform[:, 1:])
    return [
        Decisions(*(part[row : row + 1] for part in decisions)) if chosen else None
        for row, chosen in enumerate((uniform[:, 0] < spec.autoaugment).tolist())
    ]


def _plan_jitter(jitter: Jitter, draws: Draws, stream: str) -> list[tuple[tuple[int, float], ...]]:
    uniform = draws.uniform(f"{stream}/jitter", 6)
    orders = jitter_orders(uniform[:, 1])
    factors = jitter_factors(jitter, uniform[:, 2:]).gather(1, orders)
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    return [
        tuple((n, value) for n, value in zip(order, values, strict=True) if strengths[n] > 0) if chosen else ()
        for chosen, order, values in zip(
            (uniform[:, 0] < jitter.p).tolist(), orders.tolist(), factors.tolist(), strict=True
        )
    ]


def _plan_blur(blur: Blur | None, draws: Draws, stream: str) -> tuple[list[float | None], list[float | None]]:
    """Standard deviations and shrink factors."""
    none: list[float | None] = [None] * len(draws)
    if blur is None:
        return none, none
    applies, amounts = draws.uniform(f"{stream}/blur", 2).unbind(1)
    if blur.kind == "gaussian":
        values = (blur.sigma[0] + (blur.sigma[1] - blur.sigma[0]) * amounts).tolist()
    else:
        values = [blur.factors[choice] for choice in (amounts * len(blur.factors)).long().tolist()]
    strengths = [value if p < blur.p else None for p, value in zip(applies.tolist(), values, strict=True)]
    return (strengths, none) if blur.kind == "gaussian" else (none, strengths)


def retouch(image: Tensor, spec: ViewSpec, what: Retouch, out: Tensor) -> None:
    """Carry it out.

    Args:
        image: uint8 ``[3,S,S]`` on the CPU, not modified.
        spec: the view, which gives the reach of its blur.
        what: one of :func:`plan`'s.
        out: uint8 ``[3,S,S]``, takes the result, within rounding to 8 bits of what ``augment_colors`` gives.
    """
    if what.policy is not None:
        out.copy_(autoaugment(image[None].float().div_(255), what.policy)[0].mul_(255).round_())
        return
    if not (what.jitter or what.gray or what.sigma or what.shrink):
        out.copy_(image)
    else:
        _round(_in_floats(image, spec, what), out.numpy())
    if what.solarize:
        levels = out.numpy()
        np.minimum(levels, 255 - levels, out=levels)


def _in_floats(image: Tensor, spec: ViewSpec, what: Retouch) -> Planes:
    planes = image.numpy().astype(np.float32)
    for number, value in what.jitter:
        JITTERS[number](planes, value)
    if what.gray:
        planes = _luma(planes)[None]  # to blur one plane is enough
    if what.sigma is not None:
        assert spec.blur is not None
        planes = gaussian_blur(planes, what.sigma, blur_radius(spec.blur, planes.shape[-1]))
    if what.shrink is not None:
        planes = _resize_blur(planes, what.shrink)
    return planes


def _round(planes: Planes, out: NDArray[np.uint8]) -> None:
    planes += np.float32(0.5)
    np.copyto(out, planes, casting="unsafe")


def _luma(planes: Planes, scale: float = 1.0) -> Planes:
    """Brightness of each pixel times ``scale``, ``[S,S]``."""
    gray: Planes = planes[0] * np.float32(LUMA[0] * scale)
    for plane, weight in zip(planes[1:], LUMA[1:], strict=True):
        gray += plane * np.float32(weight * scale)
    return gray


def _brightness(planes: Planes, factor: float) -> None:
    planes *= np.float32(factor)
    if factor > 1:
        np.minimum(planes, np.float32(255), out=planes)


def _contrast(planes: Planes, factor: float) -> None:
    mean = float(planes.mean(axis=(1, 2)) @ np.array(LUMA, np.float32))
    planes *= np.float32(factor)
    planes += np.float32((1 - factor) * mean)
    _clip(planes, factor)


def _saturation(planes: Planes, factor: float) -> None:
    gray = _luma(planes, 1 - factor)
    planes *= np.float32(factor)
    planes += gray
    _clip(planes, factor)


def _clip(planes: Planes, factor: float) -> None:
    """What lies between two values in range is in range."""
    if factor > 1:
        np.clip(planes, np.float32(0), np.float32(255), out=planes)


def _hue(planes: Planes, shift: float) -> None:
    """As ``shift_hue_``, multiplied by the chroma C, which spares the division, and without a floor.

    Let h be the signed distance from red on the colour circle in sixths. A channel falls from its maximum at a
    distance of 1 from its own hue to its minimum at 2. With an offset o to that hue, the shift included, chosen
    among the equivalent ones from -3 to 3, it is low + clip(||h + o| - 3| - 1, 0, 1) C.
    """
    red, green, blue = planes
    low, high = np.minimum(red, green), np.maximum(red, green)
    np.minimum(low, blue, out=low)
    np.maximum(high, blue, out=high)
    chroma = high - low
    floor = low - chroma
    hue = green - red
    hue += blue
    hue -= floor
    # copysign, four times as fast as NumPy's
    side = np.subtract(green, blue).view(np.int32)
    side &= _SIGN
    signed = hue.view(np.int32)
    signed |= side
    offsets = np.array([(6 * shift - own + 3) % 6 - 3 for own in (0, 2, 4)], np.float32)
    np.multiply(offsets[:, None, None], chroma, out=planes)
    planes += hue
    np.abs(planes, out=planes)
    chroma *= np.float32(3)
    planes -= chroma
    np.abs(planes, out=planes)
    planes += floor
    np.maximum(planes, low, out=planes)
    np.minimum(planes, high, out=planes)


JITTERS: tuple[Callable[[Planes, float], None], ...] = (_brightness, _contrast, _saturation, _hue)
"""Brightness, contrast, saturation and hue, in place."""


def gaussian_blur(planes: Planes, sigma: float, radius: int) -> Planes:
    """As ``augment.gaussian_blur``, by bands: each strip of the result reads only the pixels that reach it.

    Args:
        planes: ``[C,S,S]`` with S > radius.
        sigma: standard deviation in pixels.
        radius: of the kernel, in pixels.
    """
    channels, side, _ = planes.shape
    tap = np.arange(-radius, radius + 1)
    taps = np.exp(-0.5 * (tap / sigma) ** 2)
    strips, reach = _bands(side, radius)
    bands = torch.mm(torch.from_numpy((taps / taps.sum()).astype(np.float32))[None], reach)
    bands = bands.reshape(len(strips), min(_STRIP, side), -1)
    # With the channels of a row side by side, each strip is one product in either direction.
    wide = torch.from_numpy(np.ascontiguousarray(planes.transpose(1, 0, 2))).view(side, -1)
    half, both = torch.empty_like(wide), torch.empty(side * channels, side)
    for (start, stop, first), band in zip(strips, bands, strict=True):
        torch.mm(band[: stop - start], wide[first : first + band.shape[1]], out=half[start:stop])
    tall = half.view(-1, side)
    for (start, stop, first), band in zip(strips, bands, strict=True):
        torch.mm(tall[:, first : first + band.shape[1]], band[: stop - start].T, out=both[:, start:stop])
    blurred: Planes = both.view(side, channels, side).permute(1, 0, 2).numpy()
    return blurred


@lru_cache(maxsize=16)
def _bands(side: int, radius: int) -> tuple[list[tuple[int, int, int]], Tensor]:
    """Strips of an axis as (start, stop, first pixel they read) and where each tap falls, with reflection.

    The second is 0 or 1 (2 where a reflected tap meets another), ``[2*radius+1, strips*strip*width]``.
    """
    strip = min(_STRIP, side)
    width = min(strip + 2 * radius, side)
    shift = torch.arange(-radius, radius + 1)[:, None]
    strips, reaches = [], []
    for start in range(0, side, strip):
        first = min(max(start - radius, 0), side - width)
        source = (torch.arange(start, start + strip) + shift).abs()
        source = (side - 1 - (side - 1 - source).abs() - first).clamp(0, width - 1)
        strips.append((start, min(start + strip, side), first))
        reaches.append(F.one_hot(source, width).flatten(1))
    return strips, torch.cat(reaches, dim=1).float()


def _resize_blur(planes: Planes, factor: float) -> Planes:
    blurred: Planes = resize_blur(torch.from_numpy(planes)[None].div_(255), factor)[0].mul_(255).numpy()
    return blurred
