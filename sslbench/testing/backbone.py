"""A backbone that is being checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sslbench.plugin.api import Backbone, Features, Options
from sslbench.testing.rules import BrokenRuleError


@dataclass
class BackboneSubject:
    """Builds the backbone and feeds it."""

    cls: type[Backbone]
    cfg: Options
    image_size: int

    @cached_property
    def backbone(self) -> Backbone:
        """One to look at, in evaluation mode. What changes state takes one of its own."""
        return self.build(0).eval()

    def build(self, seed: int, image_size: int | None = None) -> Backbone:
        """A new one."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.cls(self.cfg, image_size or self.image_size)

    def practised(self) -> Backbone:
        """A new one in evaluation mode, whose running statistics are not the initial ones."""
        backbone = self.build(0).train()
        for _ in range(2):
            self.out(backbone, self.images(8))
        return backbone.eval()

    def images(self, count: int, height: int | None = None, width: int | None = None) -> Tensor:
        """Normalised random images ``[count,3,H,W]``, the same for the same arguments."""
        generator = torch.Generator().manual_seed(count)
        sides = height or self.image_size, width or self.image_size
        return torch.randn(count, 3, *sides, generator=generator)

    def out(self, backbone: Backbone, images: Tensor) -> Features:
        """Features without gradient; what is drawn depends on nothing outside."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return backbone(images)  # type: ignore[no-any-return]

    def check_shapes(self, backbone: Backbone, height: int, width: int) -> None:
        """
        Raises:
            BrokenRuleError: pooled features or map are not what ``dim`` and ``stride`` say.
        """
        found = self.out(backbone, self.images(2, height, width))
        shown = f"{height}x{width} pixels"
        if found.pooled.shape != (2, backbone.dim):
            raise BrokenRuleError(
                f"pooled is {describe(found.pooled)} from {shown}, dim is {backbone.dim}",
                "pooled is [B,dim]; set dim to its features",
            )
        places = [set(_cells(side, backbone.stride)) for side in (height, width)]
        shape = found.map.shape
        if len(shape) != 4 or shape[:2] != (2, backbone.dim):
            raise BrokenRuleError(
                f"map is {describe(found.map)} from {shown}, dim is {backbone.dim}", "map is [B,dim,h,w]"
            )
        if shape[2] not in places[0] or shape[3] not in places[1]:
            raise BrokenRuleError(
                f"map is {shape[2]}x{shape[3]} from {shown}, stride is {backbone.stride}",
                "set stride to the input pixels per cell of the map",
            )


def _cells(side: int, stride: int) -> tuple[int, int]:
    """Convolutions round up or down."""
    return side // stride, math.ceil(side / stride)


def describe(tensor: Tensor) -> str:
    return str(list(tensor.shape))


def apart(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest entry; infinite for other shapes or what is not finite."""
    if found.shape != expected.shape:
        return math.inf
    difference = float((found.double() - expected.double()).abs().max())
    scale = float(expected.double().abs().max())
    if not math.isfinite(difference):
        return math.inf
    return difference / scale if scale else difference
