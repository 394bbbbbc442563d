"""ImageNet (ILSVRC 2012): 1.28 million photos of 1,000 classes, or 1 % or 10 % of them."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from sslbench.data.encoded import FileSource
from sslbench.data.filesets import FileDataset, NormalizedOptions, RootOptions, find_base
from sslbench.data.paths import PathTable, find_images
from sslbench.data.subsets import balanced_subset, listed_subset
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published
from sslbench.plugin.hooks import hookimpl

LAYOUT = """  ROOT/train/n01440764/*.JPEG               class folders, 1,000 of them
  ROOT/val/n01440764/*.JPEG                 class folders, or
  ROOT/val/ILSVRC2012_val_*.JPEG            all images in one folder, with one of
    ROOT/ILSVRC2012_devkit_t12/data/        the development kit, unpacked
    ROOT/meta.bin                           what torchvision makes of it
    ROOT/LOC_val_solution.csv               Kaggle's table (its ILSVRC/Data/CLS-LOC/{train,val} is found too)"""
DEVKIT = "ILSVRC2012_devkit_t12/data"
PERCENT = {"1%": 1, "10%": 10}


class ImageNetOptions(NormalizedOptions, RootOptions):
    """Options of `imagenet`."""

    subset: str = "none"
    """Which training images there are: `none`: all; `1%` or `10%`: 12,811 or 128,116 of them, chosen by a hash of
    their names, 12 or 13 (128 or 129) of each class; else a file with one name per line, such as
    `n01440764_10026.JPEG`. The lists published with SimCLR are such files; `1%` and `10%` have as many images of
    each class, but others."""


class ImageNet(FileDataset):
    """The ILSVRC 2012 classification images.

    The labelled validation images are what papers report on, so they are the split `test`; `val` is carved off
    `train`. Layouts below `root`::

        train/n01440764/*.JPEG
        val/n01440764/*.JPEG, or val/*.JPEG with ILSVRC2012_devkit_t12/, meta.bin or LOC_val_solution.csv

    Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", IJCV 2015.
    """

    name = "imagenet"
    published = Published(1_281_167, (375, 500), 1000)
    Config = ImageNetOptions
    cfg: ImageNetOptions

    def __init__(self, cfg: ImageNetOptions) -> None:
        super().__init__(cfg)
        self.root = cfg.root.expanduser()
        self.base = find_base(self.name, self.root, ("", "ILSVRC/Data/CLS-LOC"), ("train",), LAYOUT)
        self._listing = find_images(self.base / "train")
        self._classes = tuple(sorted(set(self._listing.tops())))
        if not self._classes or "" in self._classes:
            raise DataError(f"{self.base / 'train'} does not hold class folders; expected layout:\n{LAYOUT}")

    @property
    def key(self) -> str:
        subset = self.cfg.subset
        return self.name if subset == "none" else f"{self.name}-{Path(subset).stem.replace('%', 'pct')}"

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=None,
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=tuple(self.sources),
        )

    @cached_property
    def sources(self) -> dict[str, FileSource]:
        sources = {"train": self._train()}
        if (self.base / "val").is_dir():
            sources["test"] = self._test()
        return sources

    def _train(self) -> FileSource:
        paths, subset = self._listing, self.cfg.subset
        if subset != "none":
            paths = paths.select(self._chosen(paths, subset))
        return FileSource(paths, torch.from_numpy(paths.numbered(self._classes)))

    def _chosen(self, paths: PathTable, subset: str) -> NDArray[np.int64]:
        if subset in PERCENT:
            return balanced_subset(paths, paths.numbered(self._classes), self._classes, PERCENT[subset])
        return listed_subset(paths, Path(subset).expanduser())

    def _test(self) -> FileSource:
        """In the order of file names, so that both layouts give the same split."""
        paths = find_images(self.base / "val").sorted_by_basename()
        if not len(paths):
            raise DataError(f"{self.base / 'val'} holds no images; expected layout:\n{LAYOUT}")
        if paths.tops() == [""]:
            labels = torch.from_numpy(_numbers(_validation_classes(self.root, paths), self._classes))
        else:
            labels = torch.from_numpy(paths.numbered(self._classes))
        return FileSource(paths, labels)


def _numbers(labels: Sequence[str], classes: Sequence[str]) -> NDArray[np.int64]:
    numbers = {label: number for number, label in enumerate(classes)}
    unknown = sorted(set(labels) - numbers.keys())
    if unknown:
        raise DataError(f"validation images are of classes without training images: {', '.join(unknown[:5])}")
    return np.array([numbers[label] for label in labels], np.int64)


def _validation_classes(root: Path, paths: PathTable) -> list[str]:
    """WordNet id of each validation image in one flat folder."""
    if (root / "LOC_val_solution.csv").is_file():
        return _from_table(root / "LOC_val_solution.csv", paths)
    if (root / DEVKIT).is_dir():
        classes = _from_devkit(root / DEVKIT)
    elif (root / "meta.bin").is_file():
        from torchvision.datasets.imagenet import load_meta_file

        classes = load_meta_file(root)[1]
    else:
        raise DataError(f"nothing tells the classes of {paths.root}/*; expected layout:\n{LAYOUT}")
    if len(classes) != len(paths):
        raise DataError(
            f"{paths.root} holds {len(paths)} images, the development kit tells {len(classes)} classes"
        )
    return classes


def _from_table(file: Path, paths: PathTable) -> list[str]:
    """From rows such as ``ILSVRC2012_val_00048981,n03995372 85 1 499 272``."""
    with file.open(newline="", encoding="utf-8") as lines:
        classes = {row["ImageId"]: row["PredictionString"].split()[0] for row in csv.DictReader(lines)}
    names = [Path(name).stem for name in paths.basenames()]
    missing = [name for name in names if name not in classes]
    if missing:
        raise DataError(f"{file} does not tell the class of {', '.join(missing[:5])}")
    return [classes[name] for name in names]


def _from_devkit(folder: Path) -> list[str]:
    """The ground truth holds ILSVRC2012 ids in the order of file names; ``meta.mat`` translates them."""
    from scipy.io import loadmat

    try:
        synsets = np.atleast_1d(loadmat(str(folder / "meta.mat"), squeeze_me=True)["synsets"])
        classes = {int(row["ILSVRC2012_ID"]): str(row["WNID"]) for row in synsets}
        lines = (folder / "ILSVRC2012_validation_ground_truth.txt").read_text().split()
        return [classes[int(line)] for line in lines]
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"cannot read ImageNet's development kit in {folder}: {error}") from error


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [ImageNet]
