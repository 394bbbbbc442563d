"""1,797 scanned handwritten digits (8x8, 10 classes) that scikit-learn carries; needs no download."""

from __future__ import annotations

from functools import cached_property

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from sslbench.data.sources import ArraySource, digest, packaged_table
from sslbench.data.splits import carve
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options
from sslbench.plugin.hooks import hookimpl


class DigitsOptions(Options):
    """Options of `digits`."""

    size: int = Field(16, ge=8, le=64)
    """Side in pixels; the 8x8 scans are enlarged once, bicubic."""


class Digits(Dataset):
    """The test set of the UCI "Optical Recognition of Handwritten Digits" data.

    ``test`` is a fifth of each class, chosen by a hash of the sample's number; ``train`` is the rest.
    """

    name = "digits"
    Config = DigitsOptions
    cfg: DigitsOptions

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=tuple(str(digit) for digit in range(10)),
            size=self.cfg.size,
            mean=(0.309,) * 3,
            std=(0.349,) * 3,
            splits=("train", "test"),
        )

    def split(self, name: str) -> ArraySource:
        pixels, targets = self._data
        train, test = carve(targets, 0.2, salt="test")
        try:
            index = {"train": train, "test": test}[name]
        except KeyError:
            raise DataError(f"data set 'digits' has no split '{name}' (it has train, test)") from None
        return ArraySource(pixels[index], targets[index])

    def fingerprint(self) -> str:
        return digest(*self._data)

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        rows = packaged_table("sklearn", "datasets/data/digits.csv.gz")
        images = rows[:, :-1].reshape(-1, 1, 8, 8).float() * (255 / 16)
        images = F.interpolate(images, size=self.cfg.size, mode="bicubic", antialias=True)
        pixels = images.round().clamp(0, 255).to(torch.uint8).repeat(1, 3, 1, 1)
        return pixels, rows[:, -1].long()


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Digits]
