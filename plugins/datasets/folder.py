"""Your own images in folders: root/{train,val,test}/CLASS/*.jpg, root/CLASS/*.jpg, or unlabelled files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from sslbench.config.options import cosmetic
from sslbench.data.imagefile import digest_files, find_images, image_size, read_image, threaded
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo, Options, Source
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


class FolderSource(Source):
    """Image files, decoded when asked for."""

    def __init__(self, paths: Sequence[Path], targets: Tensor | None) -> None:
        self.paths = paths
        self._targets = targets

    def __len__(self) -> int:
        return len(self.paths)

    def image(self, index: int) -> Tensor:
        return read_image(self.paths[index])

    @property
    def targets(self) -> Tensor | None:
        return self._targets

    def image_sizes(self) -> Tensor:
        """int64 ``[N,2]`` from the headers; (0, 0) marks a file whose header cannot be read."""
        return self._sizes

    @cached_property
    def _sizes(self) -> Tensor:
        return torch.tensor(list(threaded(image_size, self.paths)))

    def common_side(self) -> int | None:
        """The side of the images if all are square and of one size."""
        probe = self.paths[:: max(1, len(self) // 64)]
        if len(set(threaded(image_size, probe)) - {(0, 0)}) > 1:  # spares a scan of a million headers
            return None
        sides = set(self._sizes[self._sizes[:, 0] > 0].flatten().tolist())
        return sides.pop() if len(sides) == 1 else None

    def describe(self, index: int) -> str:
        return str(self.paths[index])


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
        self._listings: dict[str, list[Path]] = {}
        self._opened: dict[str, FolderSource] = {}
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
        train, files = self._folders.get("train", self.root), self._listing("train")
        return tuple(sorted({path.relative_to(train).parts[0] for path in files if path.parent != train}))

    def _listing(self, split: str) -> list[Path]:
        if split not in self._listings:
            folder = self._folders.get(split)
            self._listings[split] = find_images(folder) if folder else []
        return self._listings[split]

    def _files(self, split: str) -> list[Path]:
        """The images of a split. Next to class folders, loose images have no class and do not count."""
        files = self._listing(split)
        return [path for path in files if path.parent != self._folders[split]] if self._classes else files

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

    def split(self, name: str) -> FolderSource:
        if name not in self._opened:  # kept, because a source remembers the headers it has read
            self._opened[name] = self._open(name)
        return self._opened[name]

    def _open(self, name: str) -> FolderSource:
        paths = self._files(name)
        if not paths:
            folder = self._folders.get(name, self.root / getattr(self.cfg, name, name))
            raise DataError(
                f"data set 'folder' has no split '{name}': no images under {folder}",
                hint=f"dataset.{name}=FOLDER names the folder below the root" if name in SPLITS else None,
            )
        return FolderSource(paths, self._targets(self._folders[name], paths) if self._classes else None)

    def _targets(self, folder: Path, paths: Sequence[Path]) -> Tensor:
        numbers = {label: number for number, label in enumerate(self._classes)}
        labels = [path.relative_to(folder).parts[0] for path in paths]
        unknown = sorted(set(labels) - set(numbers))
        if unknown:
            raise DataError(
                f"{folder} holds {', '.join(unknown[:5])}, which is no class folder of the training images"
            )
        return torch.tensor([numbers[label] for label in labels])

    def fingerprint(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        files = [path for split in sorted(self._folders) for path in self._files(split)]
        return digest_files(self.root, files)


@hookimpl
def sslbench_datasets() -> list[type[Dataset]]:
    return [Folder]
