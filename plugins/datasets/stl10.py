"""STL-10: 113,000 96x96 photos, 100,000 of them unlabelled, and 10 classes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslbench.data.downloads import DownloadOptions, require_files
from sslbench.data.imagefile import digest_whole
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published, Source
from sslbench.plugin.hooks import hookimpl

SIDE = 96
CLASSES = ("airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck")
LABELLED = ("train", "test")
FILES = ("unlabeled_X.bin", "train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin")


class BinarySource(Source):
    """Images in one file of raw bytes, mapped into memory: the unlabelled split has 2.8 GB."""

    def __init__(self, path: Path, targets: Tensor | None) -> None:
        size = path.stat().st_size
        if not size or size % (3 * SIDE * SIDE):
            raise DataError(f"{path} is cut off", hint="delete it and set dataset.download=true")
        self.path = path
        self._targets = targets
        self._rows = np.memmap(path, np.uint8, mode="r").reshape(-1, 3, SIDE, SIDE)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Tensor:
        return torch.from_numpy(self._rows[index].transpose(0, 2, 1).copy())  # the file is column-major

    @property
    def targets(self) -> Tensor | None:
        return self._targets

    def image_sizes(self) -> Tensor:
        return torch.tensor([[SIDE, SIDE]]).expand(len(self), 2)

    def describe(self, index: int) -> str:
        return f"image {index} of {self.path}"


class Stl10(Dataset):
    """100,000 unlabelled images to pretrain on, 5,000 labelled to train and 8,000 to test on.

    Its ten predefined folds are not used.
    """

    name = "stl10"
    published = Published(100_000, (96, 96), 10, same_size=True)
    Config = DownloadOptions
    cfg: DownloadOptions

    def __init__(self, cfg: DownloadOptions) -> None:
        super().__init__(cfg)
        self.base = require_files(self.name, cfg, "stl10_binary", FILES, _download)

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=CLASSES,
            size=SIDE,
            mean=(0.5,) * 3,
            std=(0.5,) * 3,
            splits=("train", "test", "unlabeled"),
            pretrain_split="unlabeled",
        )

    def split(self, name: str) -> BinarySource:
        if name not in self._sources:
            raise DataError(f"data set 'stl10' has no split '{name}' (it has {', '.join(self._sources)})")
        return self._sources[name]

    @cached_property
    def _sources(self) -> dict[str, BinarySource]:
        labelled = {split: self._labelled(split) for split in LABELLED}
        return labelled | {"unlabeled": BinarySource(self.base / "unlabeled_X.bin", None)}

    def _labelled(self, split: str) -> BinarySource:
        classes = np.fromfile(self.base / f"{split}_y.bin", dtype=np.uint8)
        source = BinarySource(self.base / f"{split}_X.bin", torch.from_numpy(classes).long() - 1)
        if len(source) != len(classes) or not set(classes.tolist()) <= set(range(1, len(CLASSES) + 1)):
            raise DataError(f"{split}_X.bin and {split}_y.bin in {self.base} do not belong together")
        return source

    def fingerprint(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return digest_whole(self.base, [self.base / file for file in FILES])


def _download(root: Path) -> None:
    from torchvision import datasets

    datasets.STL10(root, download=True)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Stl10]
