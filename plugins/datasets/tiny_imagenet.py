"""Tiny ImageNet: 100,000 64x64 photos of 200 classes."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from sslbench.data.encoded import FileSource
from sslbench.data.filesets import FileDataset, RootOptions, find_base
from sslbench.data.paths import PathTable, find_images
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Published
from sslbench.plugin.hooks import hookimpl

LAYOUT = """  ROOT/tiny-imagenet-200/wnids.txt
  ROOT/tiny-imagenet-200/train/n01443537/images/*.JPEG
  ROOT/tiny-imagenet-200/val/images/*.JPEG and val/val_annotations.txt, or val/n01443537/*.JPEG
(or all of this in ROOT itself); it is http://cs231n.stanford.edu/tiny-imagenet-200.zip, unpacked"""


class TinyImageNet(FileDataset):
    """500 training images of each class; the 10,000 labelled validation images are the split `test`.

    Layout: `root/tiny-imagenet-200/`, or `root` itself, with `wnids.txt`, `train/CLASS/images/*.JPEG` and `val/`,
    as it is published or sorted into class folders. The published `test` has no labels and is not used.
    """

    name = "tiny-imagenet"
    published = Published(100_000, (64, 64), 200, same_size=True)
    Config = RootOptions
    cfg: RootOptions

    def __init__(self, cfg: RootOptions) -> None:
        super().__init__(cfg)
        self.base = find_base(self.name, cfg.root, ("tiny-imagenet-200", ""), ("wnids.txt",), LAYOUT)
        self._classes = tuple((self.base / "wnids.txt").read_text(encoding="utf-8").split())

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
        train, test = (find_images(self.base / split) for split in ("train", "val"))
        for split, paths in (("train", train), ("val", test)):
            if not len(paths):
                raise DataError(f"{self.base / split} holds no images; expected layout:\n{LAYOUT}")
        annotated = test.tops() == ["images"]
        test = test.sorted_by_basename()  # both layouts give the same split
        labels = self._annotations(test) if annotated else torch.from_numpy(test.numbered(self._classes))
        return {
            "train": FileSource(train, torch.from_numpy(train.numbered(self._classes)), side=64),
            "test": FileSource(test, labels, side=64),
        }

    def _annotations(self, paths: PathTable) -> torch.Tensor:
        """From lines such as ``val_0.JPEG n03444034 0 32 44 62``, separated by tabs."""
        file = self.base / "val" / "val_annotations.txt"
        numbers = {label: number for number, label in enumerate(self._classes)}
        try:
            rows = [line.split("\t")[:2] for line in file.read_text(encoding="utf-8").splitlines()]
            classes = {name: numbers[label] for name, label in rows}
            return torch.tensor([classes[name] for name in paths.basenames()])
        except (OSError, KeyError, ValueError) as error:
            raise DataError(f"{file} does not tell the class of every image: {_reason(error, file)}") from error


def _reason(error: Exception, file: Path) -> str:
    return f"nothing about {error}" if isinstance(error, KeyError) else str(error)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [TinyImageNet]
