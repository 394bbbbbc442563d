"""Applying operations to the images of a batch that need them, each operation once for all of its images.

Who needs what is known on the CPU, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def apply_where(images: Tensor, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
    """Replace some images by an operation's result.

    Args:
        images: ``[B,...]``, modified in place.
        chosen: which ones, bool ``[B]`` on the CPU.
        operation: takes images and their parameters.
        parameters: ``[B]`` each, on the CPU.
    """
    rows = chosen.nonzero().flatten()
    if len(rows):
        on_device = to_device_of(images, rows)
        part = operation(images.index_select(0, on_device), *(to_device_of(images, p[rows]) for p in parameters))
        images.index_copy_(0, on_device, part)


def apply_in_turns(
    images: Tensor,
    numbers: Tensor,
    values: Tensor,
    operations: Sequence[Callable[[Tensor, Tensor], Tensor] | None],
) -> Tensor:
    """Give each image one operation a turn.

    Each turn sorts the images by their operation: to gather rows is much faster than to scatter them.

    Args:
        images: ``[B,...]``; not modified.
        numbers: int64 ``[T,B]`` on the CPU, which operation each image gets in each turn.
        values: ``[T,B]`` on the CPU, their parameters.
        operations: take images and values; None: nothing happens.

    Returns:
        New images ``[B,...]``.
    """
    ranked = numbers.argsort(dim=1, stable=True)
    back = ranked.argsort(dim=1)
    moves = to_device_of(images, torch.cat([ranked[:1], back[:-1].gather(1, ranked[1:]), back[-1:]]))
    values = to_device_of(images, values.gather(1, ranked))
    for turn, number in enumerate(numbers):
        sizes = number.bincount(minlength=len(operations)).tolist()
        images = _apply_to_groups(images.index_select(0, moves[turn]), values[turn], sizes, operations)
    return images.index_select(0, moves[-1])


def _apply_to_groups(
    images: Tensor,
    values: Tensor,
    sizes: list[int],
    operations: Sequence[Callable[[Tensor, Tensor], Tensor] | None],
) -> Tensor:
    """Apply the operations to consecutive groups of images with these sizes."""
    groups = zip(operations, torch.split(images, sizes), torch.split(values, sizes), strict=True)
    return torch.cat(
        [part if apply is None or not len(part) else apply(part, value) for apply, part, value in groups]
    )


def to_device_of(images: Tensor, values: Tensor) -> Tensor:
    """The values on the images' device."""
    return values.to(images.device, non_blocking=True)
