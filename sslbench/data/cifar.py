"""Reader of the CIFAR files (Krizhevsky, "Learning multiple layers of features from tiny images", 2009).

The published "python version" is a few pickles. Unpickling runs code that a file names, so only the four names
that these files need are accepted.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sslbench.data.downloads import DownloadOptions, require_files
from sslbench.data.sources import ArraySource, digest
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, DatasetInfo


def _dtype(code: str, *_flags: int) -> np.dtype[Any]:
    """The files give numpy's align and copy flags as numbers, which numpy 2.4 warns about."""
    if code not in ("u1", "uint8"):
        raise pickle.UnpicklingError(f"a CIFAR file does not contain arrays of {code!r}")
    return np.dtype(np.uint8)


class _CifarUnpickler(pickle.Unpickler):
    _allowed: ClassVar[dict[str, Any]] = {
        "_reconstruct": np.empty(0).__reduce__()[0],
        "ndarray": np.ndarray,
        "dtype": _dtype,
        "encode": codecs.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] in ("numpy", "_codecs") and name in self._allowed:
            return self._allowed[name]
        raise pickle.UnpicklingError(f"a CIFAR file does not contain {module}.{name}")


def read_pickle(path: Path) -> dict[str, Any]:
    """One file of the "python version".

    Raises:
        DataError: the file is damaged or is something else.
    """
    try:
        with path.open("rb") as file:
            content = _CifarUnpickler(file, encoding="latin1").load()
    except (OSError, EOFError, ValueError, AttributeError, pickle.UnpicklingError) as error:
        raise DataError(f"cannot read {path}: {error}", hint="delete it and set dataset.download=true") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} is not a CIFAR file: it holds a {type(content).__name__}")
    return content


class CifarDataset(Dataset):
    """What the CIFAR data sets share. Subclasses name their files and the keys in them."""

    Config = DownloadOptions
    cfg: DownloadOptions

    folder: ClassVar[str]
    files: ClassVar[dict[str, tuple[str, ...]]]
    """Split to files."""
    meta: ClassVar[str]
    """File with the names of the classes."""
    targets_key: ClassVar[str]
    names_key: ClassVar[str]
    torchvision_class: ClassVar[str]
    mean: ClassVar[tuple[float, float, float]]
    std: ClassVar[tuple[float, float, float]]

    def __init__(self, cfg: DownloadOptions) -> None:
        super().__init__(cfg)
        files = [*(file for split in self.files.values() for file in split), self.meta]
        self.base = require_files(self.name, cfg, self.folder, files, self._download)

    def _download(self, root: Path) -> None:
        from torchvision import datasets

        getattr(datasets, self.torchvision_class)(root, download=True)

    @cached_property
    def info(self) -> DatasetInfo:
        return DatasetInfo(
            classes=tuple(read_pickle(self.base / self.meta)[self.names_key]),
            size=32,
            mean=self.mean,
            std=self.std,
            splits=tuple(self.files),
        )

    def split(self, name: str) -> ArraySource:
        if name not in self.files:
            raise DataError(f"data set '{self.name}' has no split '{name}' (it has {', '.join(self.files)})")
        return self._sources[name]

    @cached_property
    def _sources(self) -> dict[str, ArraySource]:
        return {split: self._read(files) for split, files in self.files.items()}

    def _read(self, files: Sequence[str]) -> ArraySource:
        contents = [read_pickle(self.base / file) for file in files]
        try:
            rows = np.concatenate([content["data"] for content in contents])
            targets = [int(target) for content in contents for target in content[self.targets_key]]
            pixels: Tensor = torch.from_numpy(rows).reshape(len(targets), 3, 32, 32)
        except (KeyError, ValueError, TypeError, RuntimeError) as error:
            raise DataError(f"{self.base} does not hold {self.name} ({', '.join(files)}: {error})") from error
        return ArraySource(pixels, torch.tensor(targets))

    def fingerprint(self) -> str:
        return self._digest

    @cached_property
    def _digest(self) -> str:
        parts = []
        for source in self._sources.values():
            parts += [source.pixels(), source.targets]
        return digest(*(part for part in parts if part is not None))


class Cifar100Files(CifarDataset):
    """The files of CIFAR-100, which carry fine and coarse labels."""

    folder = "cifar-100-python"
    files: ClassVar[dict[str, tuple[str, ...]]] = {"train": ("train",), "test": ("test",)}
    meta = "meta"
    torchvision_class = "CIFAR100"
    mean = (0.507, 0.487, 0.441)
    std = (0.267, 0.256, 0.276)
