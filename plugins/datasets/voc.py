"""PASCAL VOC 2007 and 2012: photos in which several of 20 kinds of objects are marked present or absent."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from sslbench.data.downloads import DownloadOptions, require_files
from sslbench.data.encoded import FileSource
from sslbench.data.filesets import IMAGENET_MEAN, IMAGENET_STD, FileDataset
from sslbench.data.paths import PathTable
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published
from sslbench.plugin.hooks import hookimpl

CLASSES = (
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)
TARGETS = {"1": 1, "-1": 0, "0": -1}
"""How the lists write present, absent and difficult, and how :attr:`Source.targets` does."""


class Voc(FileDataset):
    """What the years share. Targets are `[N,20]`: 1 present, 0 absent, -1 "difficult"."""

    Config = DownloadOptions
    cfg: DownloadOptions

    year: ClassVar[str]
    splits: ClassVar[tuple[str, ...]]

    def __init__(self, cfg: DownloadOptions) -> None:
        super().__init__(cfg)
        lists = [f"ImageSets/Main/{split}.txt" for split in self.splits]
        self.base = require_files(self.name, cfg, self._folder(cfg.root.expanduser()), lists, self._download)

    def _folder(self, root: Path) -> str:
        """Where below the root the year is; the root may be its folder itself."""
        places = (f"VOCdevkit/VOC{self.year}", f"VOC{self.year}", ".")
        return next((place for place in places if (root / place / "ImageSets").is_dir()), places[0])

    def _download(self, root: Path) -> None:
        from torchvision import datasets

        for images in ("trainval", "test") if "test" in self.splits else ("trainval",):
            datasets.VOCDetection(root, year=self.year, image_set=images, download=True)

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=CLASSES,
            size=None,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            splits=self.splits,
            task="multilabel",
        )

    @cached_property
    def sources(self) -> dict[str, FileSource]:
        return {split: self._read(split) for split in self.splits}

    def _read(self, split: str) -> FileSource:
        lists = self.base / "ImageSets" / "Main"
        names = (lists / f"{split}.txt").read_text(encoding="ascii").split()
        paths = PathTable(self.base, [("JPEGImages", [f"{name}.jpg" for name in names])])
        columns = [_read_list(lists / f"{label}_{split}.txt", names) for label in CLASSES]
        return FileSource(paths, torch.stack(columns, dim=1))


def _read_list(file: Path, names: list[str]) -> Tensor:
    """int64 ``[N]``: whether one class is in the images ``names``, from lines such as ``000017  1``."""
    try:
        rows = [line.split() for line in file.read_text(encoding="ascii").splitlines() if line.strip()]
        found = {name: TARGETS[value] for name, value in rows}
        return torch.tensor([found[name] for name in names], dtype=torch.int64)
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {file}: {error}", hint="dataset.download=true fetches the files") from error
    except KeyError as error:
        raise DataError(f"{file} says nothing of use about {error}") from error


class Voc2007(Voc):
    """2,501 training, 2,510 validation and 4,952 test images.

    Layout: `VOCdevkit/VOC2007/{ImageSets/Main,JPEGImages}` below `root`, `VOC2007/` below it, or `root` itself.

    Everingham et al., "The PASCAL Visual Object Classes (VOC) Challenge", IJCV 2010.
    """

    name = "voc2007"
    published = Published(2_501, (375, 500), 20)
    year = "2007"
    splits = ("train", "val", "test")


class Voc2012(Voc):
    """5,717 training and 5,823 validation images. The labels of its test images are not public.

    Layout: as that of `voc2007`, with `VOC2012`.
    """

    name = "voc2012"
    published = Published(5_717, (375, 500), 20)
    year = "2012"
    splits = ("train", "val")


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Voc2007, Voc2012]
