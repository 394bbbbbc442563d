"""The photometric part of a view: which images get which operation with which parameter, drawn on the CPU.

Each operation runs once per batch on just the images that need it, so one that rarely applies rarely costs. Row
numbers and parameters are known on the CPU: nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sslbench.data import augment
from sslbench.data.autoaugment import Decisions, autoaugment, decide
from sslbench.data.fused import AffineColors, compose_affine, run_affine
from sslbench.data.grouping import Arranged, to_device_of
from sslbench.data.jitter import Program, compose, run
from sslbench.plugin.viewspec import Blur, Jitter, ViewSpec
from sslbench.rng import Draws

_ORDERS = torch.tensor(list(permutations(range(4))))


class Colors(NamedTuple):
    """What happens to the colours of N images, all by one specification. CPU tensors; None: to no image."""

    program: Program | AffineColors | None = None
    """Jitter and greyscale, exact or fused."""
    blur: Tensor | None = None
    """float32 ``[N,2]`` in [0, 1): whether, how much."""
    solarize: Tensor | None = None
    """bool ``[N]``"""
    policy: Tensor | None = None
    """bool ``[N]``: images that AutoAugment changes instead of all of this."""
    decisions: Decisions | None = None
    """What it does."""

    def of(self, rows: slice | Tensor) -> Colors:
        """What happens to some of the images."""
        return Colors._make(_part(part, rows) for part in self)


def _part(part: Any, rows: slice | Tensor) -> Any:
    if part is None or isinstance(part, Tensor):
        return None if part is None else part[rows]
    return type(part)._make(tensor[rows] for tensor in part)


def draw_colors(spec: ViewSpec, draws: Draws, streams: Sequence[str], fused: bool = False) -> Colors:
    """Draw the colours of V views of B images.

    Args:
        spec: that of all these views.
        draws: random numbers of the B samples.
        streams: prefix of the random streams of each view.
        fused: whether jitter and greyscale are approximated by one affine map per image.

    Returns:
        For N = V*B images, those of the first view first.
    """

    def uniform(name: str, *shape: int) -> Tensor:
        return draws.stacked([f"{stream}/{name}" for stream in streams], *shape).flatten(0, 1)

    gray = uniform("gray") < spec.gray if spec.gray > 0 else None
    policy = uniform("autoaugment", 6) if spec.autoaugment > 0 else None
    return Colors(
        _program(spec.jitter, None if spec.jitter is None else uniform("jitter", 6), gray, fused),
        None if spec.blur is None else uniform("blur", 2),
        None if spec.solarize == 0 else uniform("solarize") < spec.solarize,
        None if policy is None else policy[:, 0] < spec.autoaugment,
        None if policy is None else decide(policy[:, 1:]),
    )


def augment_colors(images: Tensor, spec: ViewSpec, draws: Draws, stream: str) -> Tensor:
    """AutoAugment, or jitter, greyscale, blur and solarise, as ``spec`` says.

    Args:
        images: float ``[B,3,S,S]`` in [0, 1]; not modified.
        spec: the view.
        draws: random numbers of these B samples.
        stream: prefix of this view's random streams.
    """
    return apply_colors(images, spec, draw_colors(spec, draws, [stream])) if changes_colors(spec) else images


def apply_colors(
    images: Tensor, spec: ViewSpec, colors: Colors, normalization: augment.Normalization | None = None
) -> Tensor:
    """Carry out what was drawn, then normalise.

    Args:
        images: float ``[N,3,S,S]`` in [0, 1]; not modified.
        spec: what the colours were drawn by.
        colors: of these images.
        normalization: None: the results are in [0, 1].
    """
    if colors.policy is None:
        return _regular_colors(images, spec, colors, normalization)
    order = colors.policy.int().argsort(descending=True, stable=True)
    split = int(colors.policy.sum())
    policy, regular = to_device_of(images, order).tensor_split([split])
    decisions = colors.of(order[:split]).decisions
    assert decisions is not None
    changed = autoaugment(images.index_select(0, policy), decisions)
    parts = (
        changed if normalization is None else augment.normalize(changed, *normalization),
        _regular_colors(images.index_select(0, regular), spec, colors.of(order[split:]), normalization),
    )
    return torch.cat(parts).index_select(0, to_device_of(images, order.argsort()))


def _regular_colors(
    images: Tensor, spec: ViewSpec, colors: Colors, normalization: augment.Normalization | None
) -> Tensor:
    if not len(images):
        return images
    # A Gaussian blur and an affine map commute; other operations need values in [0, 1].
    at_once = colors.solarize is None and (spec.blur is None or spec.blur.kind == "gaussian")
    if isinstance(colors.program, AffineColors):
        images = run_affine(images, colors.program, normalization if at_once else None)
    arranged = Arranged(images)
    if isinstance(colors.program, Program):
        run(arranged, colors.program, normalization if at_once else None)
    if colors.blur is not None and spec.blur is not None:
        _blur(arranged, spec.blur, colors.blur)
    if colors.solarize is not None:
        arranged.replace(colors.solarize, augment.solarize)
    images = arranged.restore()
    if normalization is None or (at_once and colors.program is not None):
        return images
    return augment.normalize(images, *normalization)


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


def _program(
    jitter: Jitter | None, uniform: Tensor | None, gray: Tensor | None, fused: bool
) -> Program | AffineColors | None:
    """The program of jitter (``uniform`` is ``[N,6]``: whether, order, four parameters) and greyscale."""
    write = compose_affine if fused else compose
    if jitter is not None and uniform is not None:
        gray = torch.zeros(len(uniform), dtype=torch.bool) if gray is None else gray
        factors = jitter_factors(jitter, uniform[:, 2:])
        return write(jitter_orders(uniform[:, 1]), factors, uniform[:, 0] < jitter.p, jitter.hue > 0, gray)
    if gray is None:
        return None
    orders, factors = torch.arange(4).expand(len(gray), 4), torch.ones(len(gray), 4)
    return write(orders, factors, torch.zeros_like(gray), False, gray)


def blur_radius(blur: Blur, side: int) -> int:
    """Radius in pixels of the Gaussian's kernel on a view of this side."""
    return max(1, int(blur.kernel * side) // 2)


def _blur(images: Arranged, blur: Blur, uniform: Tensor) -> None:
    """Blur some images; ``uniform`` is ``[N,2]``: whether, how much."""
    chosen = uniform[:, 0] < blur.p
    if blur.kind == "gaussian":
        radius = blur_radius(blur, images.rows.shape[-1])
        sigma = blur.sigma[0] + (blur.sigma[1] - blur.sigma[0]) * uniform[:, 1]
        images.replace(chosen, lambda part, values: augment.gaussian_blur(part, values, radius), sigma)
        return
    choice = (uniform[:, 1] * len(blur.factors)).long()
    for number, factor in enumerate(blur.factors):
        images.replace(chosen & (choice == number), lambda part, f=factor: augment.resize_blur(part, f))
