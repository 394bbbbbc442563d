"""Rows of a table of features, wherever it is: brought to a device as they are asked for."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

HELD = 1 << 26
"""Values up to which a table is worked on as a whole, on its device: 256 MB. Larger ones are streamed."""
STREAMED = 1 << 24
"""Values that are on the device at once while a table is streamed: 64 MB."""


class FeatureRows:
    """Float rows ``[N,D]`` of a table that may be larger than the device's memory, or the host's.

    What is computed from them must not depend on where they are, so neither does the size of a chunk.

    Args:
        table: ``[M,D]`` on the device or on the host, perhaps mapped from a file; never written to.
        device: where rows go.
        index: int64 ``[N]`` on the CPU: the rows of the table that count, in this order; None: all.
    """

    def __init__(self, table: Tensor, device: torch.device, index: Tensor | None = None) -> None:
        self.table = table
        self.device = device
        self.index = index

    @classmethod
    def of(cls, features: Tensor | FeatureRows) -> FeatureRows:
        """A tensor as rows on its own device."""
        return features if isinstance(features, FeatureRows) else cls(features, features.device)

    def __len__(self) -> int:
        return len(self.table if self.index is None else self.index)

    @property
    def dim(self) -> int:
        """Features D."""
        return self.table.shape[1]

    @property
    def held(self) -> bool:
        """Whether the table is small enough to be worked on as a whole."""
        return len(self) * self.dim <= HELD

    @cached_property
    def whole(self) -> Tensor:
        """All rows on the device, ``[N,D]``; without a copy where they lie there side by side."""
        return self.table.to(self.device) if self.index is None else self.take(torch.arange(len(self)))

    @property
    def chunk(self) -> int:
        """Rows that are on the device at once while the table is streamed."""
        return max(1, STREAMED // self.dim)

    def take(self, rows: Tensor) -> Tensor:
        """Some rows on the device: int64 ``[n]`` on the CPU to ``[n,D]``. The copy does not hold up the host."""
        places = rows if self.index is None else self.index[rows]
        if self.table.device.type == self.device.type:
            return self.table.index_select(0, places.to(self.table.device, non_blocking=True))
        pinned = torch.empty(len(places), self.dim, dtype=self.table.dtype, pin_memory=self.device.type == "cuda")
        return torch.index_select(self.table, 0, places, out=pinned).to(self.device, non_blocking=True)

    def part(self, rows: range) -> FeatureRows:
        """Rows that lie side by side."""
        if self.index is None:
            return FeatureRows(self.table[rows.start : rows.stop], self.device)
        return FeatureRows(self.table, self.device, self.index[rows.start : rows.stop])

    def chunks(self, size: int | None = None) -> Iterator[Tensor]:
        """All rows in order, ``[n,D]`` on the device; none if there are none."""
        size = size or self.chunk
        if self.index is None and self.table.device.type == self.device.type:
            return iter(torch.split(self.table, size) if len(self) else ())
        return self.batches(torch.split(torch.arange(len(self)), size) if len(self) else ())

    def batches(self, picks: Iterator[Tensor] | tuple[Tensor, ...]) -> Iterator[Tensor]:
        """:meth:`take` for each of some picks; the next one is read beside the work on the one before."""
        if self.table.device.type == self.device.type != "cpu":
            yield from map(self.take, picks)
            return
        with ThreadPoolExecutor(1) as reader:
            ahead = None
            for pick in picks:
                now, ahead = ahead, reader.submit(self.take, pick)
                if now is not None:
                    yield now.result()
            if ahead is not None:
                yield ahead.result()


class LabelledRows(NamedTuple):
    """Frozen features of a split, in data set order, however large: what protocols stream."""

    features: FeatureRows
    """float32 ``[N,D]``"""
    labels: Tensor
    """int64 ``[N]`` on the job's device; of a multi-label data set ``[N,C]``"""
    indices: Tensor
    """int64 ``[N]``: numbers of the samples in their data set split."""
