"""Your own images in folders: root/{train,val,test}/CLASS/*.jpg, root/CLASS/*.jpg, or unlabelled files."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import torch

from sslbench.config.options import cosmetic
from sslbench.data.encoded import FileSource
from sslbench.data.filesets import files_digest
from sslbench.data.paths import PathTable, find_images
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options
from sslbench.plugin.hooks import hookimpl

LAYOUTS = """expected one of
  ROOT/train/CLASS/*.jpg (and val/, test/)   labelled, with splits
  ROOT/CLASS/*.jpg                           labelled, `train` only
  ROOT/*.jpg or ROOT/train/*.jpg             unlabelled"""
SPLITS = ("train", "val", "test")


class FolderOptions(Options):
    """Options of `folder`."""

    root: Path = cosmetic(...)
    """The folder. Images are jpg, jpeg, png, ppm, pgm, bmp, tif, tiff or webp files; hidden files are ignored."""
    train: str = "train"
    """Name of the folder below the root that holds the training images."""
    val: str = "val"
    """Name of the validation folder; it may be missing, then evaluations carve `val` off `train`."""
    test: str = "test"
    """Name of the test folder. A folder named here is not used as `val`."""
    label: str | None = cosmetic(None)
    """Its name in tables and metric keys; unset: `folder-` and the name of the root folder."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    """Per channel, in [0, 1]; the default is ImageNet's."""
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Per channel, in units of [0, 1]."""


class Folder(Dataset):
    """Images in folders. Classes are the sorted names of the folders below ``train`` (or below the root)."""

    name = "folder"
    Config = FolderOptions
    cfg: FolderOptions

    def __init__(self, cfg: FolderOptions) -> None:
        super().__init__(cfg)
        self.root = cfg.root.expanduser()
        if not self.root.is_dir():
            raise DataError(f"dataset.root: no folder {self.root}", hint="dataset.root=PATH")
        self._folders = self._find_splits()
        self._listings: dict[str, PathTable] = {}
        self._opened: dict[str, FileSource] = {}
        if not self._files("train"):
            raise DataError(f"data set 'folder' found no training images under {self.root}; {LAYOUTS}")

    @property
    def key(self) -> str:
        return self.cfg.label or f"{self.name}-{self.root.resolve().name}"

    def _find_splits(self) -> dict[str, Path]:
        names = {"train": self.cfg.train, "test": self.cfg.test}
        if self.cfg.val != self.cfg.test:
            names["val"] = self.cfg.val
        found = {split: self.root / name for split, name in names.items() if (self.root / name).is_dir()}
        return found or {"train": self.root}

    @cached_property
    def _classes(self) -> tuple[str, ...]:
        return tuple(sorted(set(self._listing("train").tops()) - {""}))

    def _listing(self, split: str) -> PathTable:
        if split not in self._listings:
            folder = self._folders.get(split)
            self._listings[split] = find_images(folder) if folder else PathTable(self.root, [])
        return self._listings[split]

    def _files(self, split: str) -> PathTable:
        """The images of a split. Next to class folders, loose images have no class and do not count."""
        files = self._listing(split)
        if not self._classes or "" not in files.folders:
            return files
        return files.select(files.folder != files.folders.index(""))

    @cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=self._classes,
            size=self.split("train").common_side(),
            mean=self.cfg.mean,
            std=self.cfg.std,
            splits=tuple(split for split in SPLITS if split in self._folders),
            task="classification" if self._classes else "unlabelled",
        )

    def split(self, name: str) -> FileSource:
        if name not in self._opened:  # kept, because a source remembers the headers it has read
            self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> FileSource:
        paths = self._files(name)
        if not paths:
            folder = self._folders.get(name, self.root / getattr(self.cfg, name, name))
            raise DataError(
                f"data set 'folder' has no split '{name}': no images under {folder}",
                hint=f"dataset.{name}=FOLDER names the folder below the root" if name in SPLITS else None,
            )
        return FileSource(paths, torch.from_numpy(paths.numbered(self._classes)) if self._classes else None)

    def fingerprint(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        return files_digest({split: self._files(split) for split in sorted(self._folders)})


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Folder]
