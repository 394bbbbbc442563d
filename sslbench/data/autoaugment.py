"""AutoAugment with the policy found for ImageNet (Cubuk et al., CVPR 2019, arXiv 1805.09501, appendix).

An image gets one of 25 pairs of operations; each of the two applies with a probability and a magnitude of its own,
and with a random sign where it has two directions. Policy, magnitudes and pixels are those of torchvision's
``AutoAugment`` on PIL images (nearest neighbour, black corners), with two exceptions, both for the programs of Van
Gansbeke et al. (arXiv 2106.05967):

- the threshold of solarisation falls from 256 to 0 in ten linear steps, where newer torchvision begins at 255;
- shears hold the centre and a magnitude m is an angle, so rows move by tan(m), as in torchvision before 2022;
  since then shears hold the top row and rows move by m. That theirs are the older ones is inferred from the
  date, June 2021.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sslbench.data import policy_ops
from sslbench.data.grouping import apply_in_turns

MAGNITUDES = 10


@dataclass(frozen=True)
class Operation:
    """One operation of the policy."""

    run: Callable[..., Tensor]
    strengths: Tensor | None = None
    """Strength for each magnitude from 0 to 9; None: it has none."""
    neutral: float | None = None
    """Strength that changes nothing, about which a random sign mirrors the others; None: it has no sign."""

    def __call__(self, images: Tensor, strength: Tensor) -> Tensor:
        """Apply it to uint8 images ``[B,3,H,W]``; ``strength`` is ``[B]``."""
        return self.run(images) if self.strengths is None else self.run(images, strength)


def _enhance(run: Callable[..., Tensor]) -> Operation:
    return Operation(run, 1 + torch.linspace(0, 0.9, MAGNITUDES), neutral=1)


OPERATIONS = {
    "shear_x": Operation(policy_ops.shear_x, torch.linspace(0, 0.3, MAGNITUDES), neutral=0),
    "rotate": Operation(policy_ops.rotate, torch.linspace(0, 30, MAGNITUDES), neutral=0),
    "color": _enhance(policy_ops.color),
    "contrast": _enhance(policy_ops.contrast),
    "sharpness": _enhance(policy_ops.sharpness),
    "posterize": Operation(policy_ops.posterize, torch.tensor([8.0, 8, 7, 7, 6, 6, 5, 5, 4, 4])),
    "solarize": Operation(policy_ops.solarize, torch.linspace(256, 0, MAGNITUDES)),
    "autocontrast": Operation(policy_ops.autocontrast),
    "equalize": Operation(policy_ops.equalize),
    "invert": Operation(policy_ops.invert),
}

Step = tuple[str, float, int]
"""Operation, probability, magnitude (0 where it has none)."""

IMAGENET_POLICY: tuple[tuple[Step, Step], ...] = (
    (("posterize", 0.4, 8), ("rotate", 0.6, 9)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
    (("posterize", 0.6, 7), ("posterize", 0.6, 6)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("equalize", 0.4, 0), ("rotate", 0.8, 8)),
    (("solarize", 0.6, 3), ("equalize", 0.6, 0)),
    (("posterize", 0.8, 5), ("equalize", 1.0, 0)),
    (("rotate", 0.2, 3), ("solarize", 0.6, 8)),
    (("equalize", 0.6, 0), ("posterize", 0.4, 6)),
    (("rotate", 0.8, 8), ("color", 0.4, 0)),
    (("rotate", 0.4, 9), ("equalize", 0.6, 0)),
    (("equalize", 0.0, 0), ("equalize", 0.8, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("rotate", 0.8, 8), ("color", 1.0, 2)),
    (("color", 0.8, 8), ("solarize", 0.8, 7)),
    (("sharpness", 0.4, 7), ("invert", 0.6, 0)),
    (("shear_x", 0.6, 5), ("equalize", 1.0, 0)),
    (("color", 0.4, 0), ("equalize", 0.6, 0)),
    (("equalize", 0.4, 0), ("solarize", 0.2, 4)),
    (("solarize", 0.6, 5), ("autocontrast", 0.6, 0)),
    (("invert", 0.6, 0), ("equalize", 1.0, 0)),
    (("color", 0.6, 4), ("contrast", 1.0, 8)),
    (("equalize", 0.8, 0), ("equalize", 0.6, 0)),
)


_NAMES = tuple(OPERATIONS)


def _strength(name: str, magnitude: int, sign: int) -> float:
    operation = OPERATIONS[name]
    if operation.strengths is None:
        return 0.0
    strength, neutral = operation.strengths[magnitude].item(), operation.neutral
    return strength if neutral is None else neutral + sign * (strength - neutral)


def _per_step(value: Callable[[str, float, int], float]) -> Tensor:
    """A number for each step of the policy, ``[25,2]``."""
    return torch.tensor([[value(*step) for step in pair] for pair in IMAGENET_POLICY])


_CODES = _per_step(lambda name, probability, magnitude: _NAMES.index(name))
_PROBABILITIES = _per_step(lambda name, probability, magnitude: probability)
_PLUS = _per_step(lambda name, probability, magnitude: _strength(name, magnitude, 1))
_MINUS = _per_step(lambda name, probability, magnitude: _strength(name, magnitude, -1))


class Decisions(NamedTuple):
    """What happens to each of B images. CPU tensors."""

    code: Tensor
    """int64 ``[B,2]``: position in ``OPERATIONS`` of the first and of the second operation, -1 for none."""
    strength: Tensor
    """float32 ``[B,2]``"""


def decide(uniform: Tensor) -> Decisions:
    """Decisions from uniform numbers ``[B,5]``: the pair, whether each operation applies, their signs."""
    pair = (uniform[:, 0] * len(IMAGENET_POLICY)).long()
    applies = uniform[:, 1:3] < _PROBABILITIES[pair]
    strength = torch.where(uniform[:, 3:] < 0.5, _PLUS[pair], _MINUS[pair])
    return Decisions(_CODES[pair].where(applies, -1), strength)


def autoaugment(images: Tensor, decisions: Decisions) -> Tensor:
    """Carry out the decisions.

    The policy is one of 8-bit images: these are rounded to 8 bits first.

    Args:
        images: float ``[B,3,S,S]`` in [0, 1]; not modified.
        decisions: for each image.

    Returns:
        float32 ``[B,3,S,S]``, multiples of 1/255.
    """
    levels = images.mul(255).round_().to(torch.uint8)
    operations = (None, *OPERATIONS.values())
    return apply_in_turns(levels, decisions.code.T + 1, decisions.strength.T, operations).float().div_(255)
