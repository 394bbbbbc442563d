"""SlimageNet64: 200,000 64x64 photos, 200 of each of ImageNet's 1,000 classes."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from sslbench.data.encoded import FileSource
from sslbench.data.filesets import FileDataset, RootOptions, find_base
from sslbench.data.paths import PathTable, find_images
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published
from sslbench.plugin.hooks import hookimpl

TRAIN_PER_CLASS = 160
LAYOUT = """  ROOT/SlimageNet64/CLASS/*                   200 images of each class, or
  ROOT/SlimageNet64/{train,test}/CLASS/*      160 and 40 of each
(or all of this in ROOT itself); it is https://zenodo.org/record/3672132, unpacked"""


class SlimageNet64(FileDataset):
    """160 training and 40 test images of each class.

    The files come without a split. Unless they are sorted into `train` and `test` already, the first 160 images of
    each class in the order of their file names are `train` and the others `test`.

    Layout: `root/SlimageNet64/`, or `root` itself, with `CLASS/*` or `{train,test}/CLASS/*`.

    Antoniou et al., "Defining Benchmarks for Continual Few-Shot Learning", 2020.
    """

    name = "slimagenet64"
    published = Published(160_000, (64, 64), 1000, same_size=True)
    Config = RootOptions
    cfg: RootOptions

    def __init__(self, cfg: RootOptions) -> None:
        super().__init__(cfg)
        self.base = find_base(self.name, cfg.root, ("SlimageNet64", ""), (".",), LAYOUT)
        self._train, self._test = self._splits()
        self._classes = tuple(sorted(set(self._train.tops())))

    def _splits(self) -> tuple[PathTable, PathTable]:
        if (self.base / "train").is_dir():
            train, test = (find_images(self.base / split) for split in ("train", "test"))
        else:
            train, test = _cut(find_images(self.base))
        if not (len(train) and len(test)) or "" in train.tops():
            raise DataError(f"{self.base} does not hold SlimageNet64; expected layout:\n{LAYOUT}")
        return train, test

    @property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=64,
            mean=(0.5,) * 3,
            std=(0.25,) * 3,
            splits=("train", "test"),
        )

    @cached_property
    def sources(self) -> dict[str, FileSource]:
        files = {"train": self._train, "test": self._test}
        return {
            split: FileSource(paths, torch.from_numpy(paths.numbered(self._classes)), side=64)
            for split, paths in files.items()
        }


def _cut(paths: PathTable) -> tuple[PathTable, PathTable]:
    """Training and test images of class folders, which list their files in the order of names."""
    counts = np.bincount(paths.folder, minlength=len(paths.folders))
    short = [folder for folder, count in zip(paths.folders, counts, strict=True) if count <= TRAIN_PER_CLASS]
    if short:
        raise DataError(
            f"each class needs more than {TRAIN_PER_CLASS} images, of which the first {TRAIN_PER_CLASS} are for "
            f"training; {paths.root} has fewer in {', '.join(short[:5]) or 'its folders'}"
        )
    place = np.arange(len(paths)) - np.repeat(counts.cumsum() - counts, counts)
    return paths.select(place < TRAIN_PER_CLASS), paths.select(place >= TRAIN_PER_CLASS)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [SlimageNet64]
