"""The photometric part of a view: which images get which operation with which parameter, drawn on the CPU.

Each operation runs once per batch on just the images that need it, so one that rarely applies rarely costs. Row
numbers and parameters are known on the CPU: nothing here waits for the device.
"""

from __future__ import annotations

from itertools import permutations

import torch
from torch import Tensor

from sslbench.data import augment
from sslbench.data.autoaugment import autoaugment, decide
from sslbench.data.grouping import apply_in_turns, apply_where, to_device_of
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

_ORDERS = torch.tensor(list(permutations(range(4))))
_JITTERS = (augment.adjust_brightness, augment.adjust_contrast, augment.adjust_saturation, augment.adjust_hue)


def augment_colors(images: Tensor, spec: ViewSpec, draws: Draws, stream: str) -> Tensor:
    """AutoAugment, or jitter, greyscale, blur and solarise, as ``spec`` says.

    Args:
        images: float ``[B,3,S,S]`` in [0, 1]; not modified.
        spec: the view.
        draws: random numbers of these B samples.
        stream: prefix of this view's random streams.
    """
    if not changes_colors(spec):
        return images
    if spec.autoaugment == 0:
        return _regular_colors(images, spec, draws, stream)
    return _policy_or_regular_colors(images, spec, draws, stream)


def _policy_or_regular_colors(images: Tensor, spec: ViewSpec, draws: Draws, stream: str) -> Tensor:
    uniform = draws.uniform(f"{stream}/autoaugment", 6)
    by_policy = uniform[:, 0] < spec.autoaugment
    order = by_policy.logical_not().int().argsort(stable=True)
    split = int(by_policy.sum())
    policy, regular = to_device_of(images, order).tensor_split([split])
    others = Draws(draws.seed, draws.step, draws.positions[order[split:]])
    parts = (
        autoaugment(images.index_select(0, policy), decide(uniform[order[:split], 1:])),
        _regular_colors(images.index_select(0, regular), spec, others, stream),
    )
    return torch.cat(parts).index_select(0, to_device_of(images, order.argsort()))


def _regular_colors(images: Tensor, spec: ViewSpec, draws: Draws, stream: str) -> Tensor:
    images = images.clone()
    if spec.jitter is not None:
        _jitter(images, spec.jitter, draws.uniform(f"{stream}/jitter", 6))
    if spec.gray > 0:
        apply_where(images, draws.uniform(f"{stream}/gray") < spec.gray, augment.grayscale)
    if spec.blur is not None:
        _blur(images, spec.blur, draws.uniform(f"{stream}/blur", 2))
    if spec.solarize > 0:
        apply_where(images, draws.uniform(f"{stream}/solarize") < spec.solarize, augment.solarize)
    return images


def changes_colors(spec: ViewSpec) -> bool:
    """Whether a view has any photometric operation."""
    parts = (spec.jitter.p if spec.jitter else 0, spec.gray, spec.blur.p if spec.blur else 0, spec.solarize)
    return any(probability > 0 for probability in (*parts, spec.autoaugment))


def jitter_factors(jitter: Jitter, uniform: Tensor) -> Tensor:
    """Brightness, contrast and saturation factors and hue shift from uniform numbers, both ``[B,4]``."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation)
    low = torch.tensor([*(max(0.0, 1 - s) for s in strengths), -jitter.hue])
    high = torch.tensor([*(1 + s for s in strengths), jitter.hue])
    return low + (high - low) * uniform


def jitter_orders(uniform: Tensor) -> Tensor:
    """One of the 24 orders of the four operations per image: int64 ``[B,4]`` from uniform numbers ``[B]``."""
    return _ORDERS[(uniform * len(_ORDERS)).long()]


def _jitter(images: Tensor, jitter: Jitter, uniform: Tensor) -> None:
    """Apply colour jitter in place; ``uniform`` is ``[B,6]``: whether, order, four parameters."""
    strengths = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
    chosen = uniform[:, 0] < jitter.p
    if not any(strengths):
        return
    orders = jitter_orders(uniform[chosen, 1])
    factors = jitter_factors(jitter, uniform[chosen, 2:]).gather(1, orders)
    operations = [adjust if strength > 0 else None for adjust, strength in zip(_JITTERS, strengths, strict=True)]
    apply_where(images, chosen, lambda part: apply_in_turns(part, orders.T, factors.T, operations))


def blur_radius(blur: Blur, side: int) -> int:
    """Radius in pixels of the Gaussian's kernel on a view of this side."""
    return max(1, int(blur.kernel * side) // 2)


def _blur(images: Tensor, blur: Blur, uniform: Tensor) -> None:
    """Blur in place; ``uniform`` is ``[B,2]``: whether, how much."""
    chosen = uniform[:, 0] < blur.p
    if blur.kind == "gaussian":
        radius = blur_radius(blur, images.shape[-1])
        sigma = blur.sigma[0] + (blur.sigma[1] - blur.sigma[0]) * uniform[:, 1]
        apply_where(images, chosen, lambda part, values: augment.gaussian_blur(part, values, radius), sigma)
        return
    choice = (uniform[:, 1] * len(blur.factors)).long()
    for number, factor in enumerate(blur.factors):
        apply_where(images, chosen & (choice == number), lambda part, f=factor: augment.resize_blur(part, f))
