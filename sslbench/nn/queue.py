"""A first-in-first-out dictionary of features of earlier batches (MoCo: He et al., CVPR 2020, section 3.2)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sslbench.errors import ConfigError


class FeatureQueue(nn.Module):
    """Ring buffer of the newest ``length`` rows of one or more aligned sets of features.

    Row i of every set belongs to the same sample. All of it is in the state dict. Every rank pushes the same
    gathered rows, so all ranks hold the same queue. Read a set with ``queue["name"]``; finish the backward pass of
    what used it before the next :meth:`push`, which writes in place.

    Args:
        length: rows L of the queue; a multiple of ``global_batch``, so that rows leave by whole batches.
        global_batch: rows that one push brings.
        init: ``random``: unit rows in random directions, drawn from torch's generator; ``zeros``: zero rows.
        option: the option that sets ``length``, for the error message.
        dims: width of each named set; ``FeatureQueue(4096, 128, keys=128)`` has one.

    Raises:
        ConfigError: ``global_batch`` does not divide ``length``.
    """

    pushed: Tensor
    """int64 scalar: rows pushed since the start. The next one goes to slot ``pushed % length``."""

    def __init__(
        self,
        length: int,
        global_batch: int,
        *,
        init: Literal["random", "zeros"] = "random",
        option: str = "method.queue",
        **dims: int,
    ) -> None:
        super().__init__()
        _check_length(length, global_batch, option)
        self.length = length
        self.names = tuple(dims)
        for name, dim in dims.items():
            rows = F.normalize(torch.randn(length, dim), dim=1) if init == "random" else torch.zeros(length, dim)
            self.register_buffer(name, rows)
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))

    def __getitem__(self, name: str) -> Tensor:
        """float32 ``[L,D]``: the rows of one set, in the order of the slots."""
        return self.get_buffer(name)

    @property
    def is_full(self) -> Tensor:
        """bool scalar: whether every initial row has been replaced."""
        return self.pushed >= self.length

    def slots(self, count: int) -> Tensor:
        """int64 ``[count]``: where the next rows will go. They replace the oldest."""
        return (self.pushed + torch.arange(count, device=self.pushed.device)) % self.length

    @torch.no_grad()
    def push(self, **rows: Tensor) -> None:
        """Replace the oldest rows.

        Args:
            rows: ``[N,D]`` for every set, of the global batch in rank order (:func:`sslbench.comm.gather`).
        """
        if set(rows) != set(self.names):
            raise ValueError(f"push() needs rows for {', '.join(self.names)}, got {', '.join(rows)}")
        count = len(rows[self.names[0]])
        slots = self.slots(count)
        for name, values in rows.items():
            self[name].index_copy_(0, slots, values.to(self[name].dtype))
        self.pushed += count


def default_length(num_images: int, global_batch: int, most: int = 4096) -> int:
    """A quarter of the images in whole batches, at most about ``most``.

    Then hardly an image meets the key it left one epoch ago (one in 32 with random order: (1/4)^2 / 2).
    """
    return max(1, min(num_images // 4, most) // global_batch) * global_batch


def _check_length(length: int, global_batch: int, option: str) -> None:
    if length % global_batch:
        fitting = max(1, round(length / global_batch)) * global_batch
        raise ConfigError(
            f"{option}={length} is not a multiple of train.batch_size={global_batch}",
            hint=f"set {option}={fitting}, or another multiple of train.batch_size",
        )
