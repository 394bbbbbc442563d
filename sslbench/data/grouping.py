"""Applying operations to the images of a batch that need them, each operation once for all of its images.

Who needs what is known on the CPU, so nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class Arranged:
    """The images of a batch in an order that changes, so that those which share an operation come first.

    A row is gathered in one piece, and operations on the first rows work in place; scattering rows back is much
    slower.

    Args:
        images: ``[N,...]``; not modified, but :attr:`rows` may be them until :meth:`sort`.
    """

    def __init__(self, images: Tensor) -> None:
        self.rows = images
        """The images as they lie now."""
        self._order = torch.arange(len(images))

    def sort(self, key: Tensor) -> None:
        """Sort by a number per image ``[N]`` (on the CPU, in the original order), highest first."""
        self._arrange(key.argsort(descending=True, stable=True))

    def of(self, values: Tensor) -> Tensor:
        """Values ``[N,...]`` in the original order, brought to the device and into the present one."""
        return to_device_of(self.rows, values[self._order])

    def replace(self, chosen: Tensor, operation: Callable[..., Tensor], *parameters: Tensor) -> None:
        """Replace some images by an operation's result.

        Args:
            chosen: which ones, bool ``[N]`` on the CPU, in the original order as everything here.
            operation: takes images and their parameters, one each; may not work in place.
            parameters: ``[N]`` each, on the CPU.
        """
        count = int(chosen.sum())
        if count:
            self.sort(chosen.int())
            self.rows[:count] = operation(self.rows[:count], *(self.of(values)[:count] for values in parameters))

    def restore(self) -> Tensor:
        """The images in their original order."""
        self._arrange(torch.arange(len(self._order)))
        return self.rows

    def _arrange(self, order: Tensor) -> None:
        moves = self._order.argsort()[order]
        self.rows = self.rows.index_select(0, to_device_of(self.rows, moves))
        self._order = order


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
