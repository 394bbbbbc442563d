"""Backbones that provide tokens: patches in order, and some of them alone."""

from __future__ import annotations

import torch
from torch import Tensor

from sslbench.plugin.api import Backbone, Features
from sslbench.testing.backbone import BackboneSubject, apart, describe
from sslbench.testing.rules import BrokenRuleError, NotTriedError

_TOLERANCE = 1e-3


def tokens_are_patches(subject: BackboneSubject) -> str:
    """All patches, all by their numbers in another order, and half of them."""
    backbone, images = subject.backbone, subject.images(3)
    if "tokens" not in backbone.provides:
        raise NotTriedError("it does not provide tokens")
    side = subject.image_size // backbone.stride
    whole = _tokens(subject.out(backbone, images))
    of_image = whole.shape[1] - side**2
    if of_image < 0:
        raise BrokenRuleError(
            f"tokens are {describe(whole)} of {side}x{side} patches", "return all patches, row by row, at the end"
        )
    _compare(subject.out(backbone, images).map.flatten(2), whole[:, of_image:].mT, "map", _ROWS)
    order = torch.rand(3, side**2, generator=torch.Generator().manual_seed(0)).argsort(dim=1)
    shuffled = whole[:, of_image:].gather(1, order[:, :, None].expand(-1, -1, whole.shape[2]))
    _compare(_tokens(_some(backbone, images, order))[:, of_image:], shuffled, "tokens of all as visible", _ORDER)
    _check_hidden(backbone, images, order[:, : -(-len(order[0]) // 2)], of_image)
    return f"{side}x{side} patches, {of_image} tokens of the image"


_ROWS = "the map's cells are the patches' tokens, row by row"
_ORDER = "take the patches with their positions in the order of visible"
_BLIND = "leave the patches that are not visible out before the first block"


def _check_hidden(backbone: Backbone, images: Tensor, visible: Tensor, of_image: int) -> None:
    """What is under the other patches makes no difference."""
    found = _some(backbone, images, visible)
    side = images.shape[2] // backbone.stride
    mask = torch.zeros(len(images), side * side).scatter(1, visible, 1.0).view(-1, 1, side, side)
    for axis in (2, 3):
        mask = mask.repeat_interleave(backbone.stride, dim=axis)
    painted = images.clone()
    painted[:, :, : mask.shape[2], : mask.shape[3]] *= mask
    kept, count = _tokens(found), visible.shape[1]
    if kept.shape[1] != of_image + count or found.map.shape[2:] != (1, count):
        raise BrokenRuleError(
            f"{count} visible patches give tokens {describe(kept)}, map {describe(found.map)}",
            "tokens is [B,P+K,dim], map is [B,dim,1,K]",
        )
    other = _some(backbone, painted, visible)
    _compare(_tokens(other), kept, "tokens with the others painted over", _BLIND)
    _compare(other.pooled, found.pooled, "pooled with the others painted over", _BLIND)


def _some(backbone: Backbone, images: Tensor, visible: Tensor) -> Features:
    with torch.no_grad():
        return backbone(images, visible)  # type: ignore[no-any-return]


def _tokens(found: Features) -> Tensor:
    if found.tokens is None:
        raise BrokenRuleError("provides 'tokens', but forward returns none", "return Features(..., tokens=...)")
    return found.tokens


def _compare(found: Tensor, expected: Tensor, what: str, hint: str) -> None:
    distance = apart(found, expected)
    if distance > _TOLERANCE:
        raise BrokenRuleError(f"{what}: {describe(found)}, other values by {distance:.1e}", hint)
