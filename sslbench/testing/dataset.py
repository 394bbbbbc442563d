"""A data set that is being checked: opened again and again, and reduced to digests."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options, Source
from sslbench.testing.reference import PluginReference

UNREADABLE = "cannot be read"


@dataclass
class DatasetSubject:
    """Opens the data set.

    Args:
        images: how many of a split are read, if they are not in memory anyway.
    """

    reference: PluginReference
    cls: type[Dataset]
    cfg: Options
    images: int

    @cached_property
    def dataset(self) -> Dataset:
        """One instance to look at."""
        return self.open()

    def open(self, cfg: Options | None = None) -> Dataset:
        """Another instance."""
        return self.cls(cfg or self.cfg)

    @property
    def info(self) -> DatasetInfo:
        return self.dataset.info

    @cached_property
    def sources(self) -> dict[str, Source]:
        """All splits."""
        return {split: self.dataset.split(split) for split in self.info.splits}

    def sampled(self) -> Iterator[tuple[str, Source, list[int]]]:
        """All splits with the images that are looked at."""
        return ((split, source, places(len(source), self.images)) for split, source in self.sources.items())


def places(total: int, limit: int) -> list[int]:
    """Images to look at: all of few, else the first, the last, and some spread between them."""
    if total <= limit:
        return list(range(total))
    third = limit // 3
    spread = torch.linspace(third, total - third - 1, limit - 2 * third).long().tolist()
    return sorted({*range(third), *spread, *range(total - third, total)})


def digest_of(tensor: Tensor | None) -> str:
    """Of type, shape and contents."""
    if tensor is None:
        return "none"
    state = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=16)
    state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()


def image_digests(source: Source, numbers: list[int]) -> list[str]:
    """Of images, of which some may be unreadable."""
    return [_digest(source, number) for number in numbers]


def _digest(source: Source, number: int) -> str:
    try:
        return digest_of(source.image(number))
    except DataError:
        return UNREADABLE


def contents(dataset: Dataset, limit: int) -> dict[str, tuple[str, list[str]]]:
    """By split, digests of its targets and of the images that are looked at."""
    opened = ((split, dataset.split(split)) for split in dataset.info.splits)
    return {
        split: (digest_of(source.targets), [str(len(source)), *image_digests(source, places(len(source), limit))])
        for split, source in opened
    }
