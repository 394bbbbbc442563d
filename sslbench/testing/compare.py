"""How far the records of several ranks are from each other, and from that of one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sslbench.testing.report import Difference
from sslbench.testing.trial import QUANTITIES, Record

_FLOOR = 1e-2
"""Tensors that are smaller than so much of the largest one of their quantity are measured by that: what should be
zero, such as the gradient of a bias before a normalisation, is rounding error through and through."""


@dataclass(frozen=True)
class Case:
    """A setting and what was recorded in it."""

    name: str
    even: bool
    """Whether all ranks have as many rows."""
    ranks: Sequence[Record]
    alone: Record

    def rows(self) -> list[int]:
        return [record["facts"]["rows"] for record in self.ranks]

    def loss(self, step: int = 1) -> list[Tensor]:
        """Of a step, on each rank."""
        return [record["loss"][f"step {step}"] for record in self.ranks]

    def differences(self) -> Iterator[Difference]:
        """From one process, the largest of each quantity."""
        return (found for quantity in QUANTITIES if (found := self.worst(quantity)))

    def worst(self, quantity: str, when: str = "") -> Difference | None:
        """The largest difference from one process of tensors whose names end with ``when``."""
        found = [
            each for record in self.ranks for each in self._of(quantity, record) if each.tensor.endswith(when)
        ]
        return max(found, key=lambda each: each.relative, default=None)

    def _of(self, quantity: str, record: Record) -> Iterator[Difference]:
        expected: Mapping[str, Tensor] = self.alone[quantity]
        floor = _FLOOR * max((_largest(value) for value in expected.values()), default=0.0)
        for name in expected.keys() | record[quantity].keys():
            relative = relative_difference(record[quantity].get(name), expected.get(name), floor)
            yield Difference(quantity, relative, name, self.name)

    def between_ranks(self) -> Iterator[tuple[str, str]]:
        """Quantities and names of tensors that are not the same on all ranks, to the bit."""
        first, *others = self.ranks
        for quantity in QUANTITIES:
            for name, value in first[quantity].items():
                if not all(_same(other[quantity].get(name), value) for other in others):
                    yield quantity, name


def relative_difference(found: Tensor | None, expected: Tensor | None, floor: float = 0.0) -> float:
    """The largest difference of an entry over the largest entry, or over ``floor`` if that is more.

    Whole numbers are equal or not (0 or 1), and so are tensors of different shapes or one that is missing.
    """
    if found is None or expected is None or found.shape != expected.shape:
        return 1.0
    if not expected.is_floating_point():
        return float(not torch.equal(found, expected))
    if found.numel() == 0:
        return 0.0
    difference = float((found.double() - expected.double()).abs().max())
    scale = max(_largest(expected), floor)
    if not math.isfinite(difference) or not scale:
        return float(difference != 0)
    return difference / scale


def _largest(value: Tensor) -> float:
    return float(value.abs().max()) if value.is_floating_point() and value.numel() else 0.0


def _same(found: Tensor | None, expected: Tensor) -> bool:
    return found is not None and torch.equal(found, expected)
