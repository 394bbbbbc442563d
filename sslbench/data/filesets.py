"""What data sets of published image files share: finding their folder, opening splits, fingerprints."""

from __future__ import annotations

import hashlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslbench.config.options import cosmetic
from sslbench.data.encoded import FileSource
from sslbench.data.imagefile import digest_files
from sslbench.data.kept import WORTH_KEEPING, kept
from sslbench.data.paths import PathTable
from sslbench.data.revision import files_revision
from sslbench.data.sources import digest
from sslbench.errors import DataError
from sslbench.plugin.api import Dataset, Options

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_MOST_DATES = 100_000
"""Of so many files a digest opens some 4,000 only, which is quicker than comparing the dates of all."""


class RootOptions(Options):
    """Options of data sets that are unpacked by hand."""

    root: Path = cosmetic(...)
    """The folder with the unpacked files."""


class NormalizedOptions(Options):
    """Options of data sets whose published programs differ in the normalisation."""

    mean: tuple[float, float, float] = IMAGENET_MEAN
    """Per channel, in [0, 1]; the default is ImageNet's."""
    std: tuple[float, float, float] = IMAGENET_STD
    """Per channel, in units of [0, 1]; SwAV's program has 0.228 for red."""


class FileDataset(Dataset):
    """A data set of image files. Subclasses list the files of all splits once."""

    @property
    @abstractmethod
    def sources(self) -> dict[str, FileSource]:
        """The images by split; subclasses keep what they have listed."""

    def split(self, name: str) -> FileSource:
        if name not in self.sources:
            raise DataError(f"data set '{self.name}' has no split '{name}' (it has {', '.join(self.sources)})")
        return self.sources[name]

    def fingerprint(self) -> str:
        """Covers splits, names without folders, classes, and contents as far as ``digest_files`` reads them."""
        return self._digest

    @cached_property
    def _digest(self) -> str:
        files = files_digest({split: source.paths for split, source in self.sources.items()}, folders=False)
        targets = [source.targets for source in self.sources.values() if source.targets is not None]
        return hashlib.blake2b(f"{files} {digest(*targets)}".encode(), digest_size=16).hexdigest()


def files_digest(tables: Mapping[str, PathTable], *, folders: bool = True) -> str:
    """:func:`~sslbench.data.imagefile.digest_files`, taken again only if a file's size or dates have changed."""

    def digest() -> NDArray[np.int64]:
        return np.frombuffer(bytes.fromhex(digest_files(tables, folders=folders)), np.int64)

    if not WORTH_KEEPING <= sum(map(len, tables.values())) <= _MOST_DATES:
        return digest().tobytes().hex()
    kind = "contents" if folders else "contents-by-name"
    return kept(kind, lambda: files_revision(tables), digest).tobytes().hex()


def find_base(name: str, root: Path, inside: Sequence[str], markers: Sequence[str], layout: str) -> Path:
    """The folder of an unpacked data set.

    Args:
        name: of the data set, for messages.
        root: where the user says it is.
        inside: folders below the root where it may be, in this order; "" for the root itself.
        markers: one of these must be in the folder.
        layout: what is expected, for messages.

    Raises:
        DataError: nothing is there.
    """
    root = root.expanduser()
    for folder in inside:
        if any((root / folder / marker).exists() for marker in markers):
            return root / folder
    raise DataError(f"data set '{name}' is not under {root}; expected layout:\n{layout}", hint="dataset.root=PATH")
