"""Tables of file names: a million paths in some 40 MB that forked processes share, not in a million objects."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from sslbench.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})

_CHUNK = 1 << 16

Listing = Iterable[tuple[str, Sequence[str]]]
"""Folders, relative to a root ("" for the root itself), each with the names of its files."""


class PathTable(Sequence[Path]):
    """The paths of files below one root, in a fixed order.

    Reading an item makes its Path; the table itself is four arrays, which cost nothing when a process forks and
    nothing until they are touched.

    Args:
        root: absolute or relative to the working directory.
        listing: the files.
    """

    def __init__(self, root: Path, listing: Listing) -> None:
        self.root = root
        folders: list[str] = []
        counts: list[int] = []
        sizes: list[NDArray[np.int64]] = [np.zeros(0, np.int64)]
        blob = bytearray()
        for folder, names in listing:
            encoded = [os.fsencode(name) for name in names]
            folders.append(folder)
            counts.append(len(encoded))
            sizes.append(np.fromiter(map(len, encoded), np.int64, len(encoded)))
            blob += b"".join(encoded)
        self.folders = tuple(folders)
        """Relative to the root."""
        self.folder: NDArray[np.int32] = np.repeat(np.arange(len(folders), dtype=np.int32), counts)
        """Of each file, its folder's number ``[N]``."""
        self._blob = bytes(blob)
        lengths = np.concatenate(sizes)
        self._ends: NDArray[np.int64] = lengths.cumsum()
        self._starts: NDArray[np.int64] = self._ends - lengths

    def __len__(self) -> int:
        return len(self.folder)

    @overload
    def __getitem__(self, index: int) -> Path: ...

    @overload
    def __getitem__(self, index: slice) -> list[Path]: ...

    def __getitem__(self, index: int | slice) -> Path | list[Path]:
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        return Path(self.root, self.name(index))

    def basename(self, index: int) -> str:
        """The last part of a file's path."""
        return os.fsdecode(self._blob[self._starts[index] : self._ends[index]])

    def name(self, index: int) -> str:
        """A file's path relative to the root, with forward slashes."""
        folder = self.folders[self.folder[index]]
        return f"{folder}/{self.basename(index)}" if folder else self.basename(index)

    def basenames(self) -> Iterator[str]:
        """All base names, in order."""
        for first in range(0, len(self), _CHUNK):
            rows = slice(first, first + _CHUNK)
            for start, end in zip(self._starts[rows].tolist(), self._ends[rows].tolist(), strict=True):
                yield os.fsdecode(self._blob[start:end])

    def names(self) -> Iterator[str]:
        """All paths relative to the root, in order."""
        prefixes = [f"{folder}/" if folder else "" for folder in self.folders]
        for number, name in zip(self.folder, self.basenames(), strict=True):
            yield prefixes[number] + name

    def select(self, rows: NDArray[Any]) -> PathTable:
        """The files of some rows: numbers, in that order, or a mask ``[N]``."""
        chosen = object.__new__(PathTable)
        chosen.root, chosen.folders, chosen._blob = self.root, self.folders, self._blob
        chosen.folder, chosen._starts, chosen._ends = self.folder[rows], self._starts[rows], self._ends[rows]
        return chosen

    def sorted_by_basename(self) -> PathTable:
        """The same files in the order of their base names, whatever their folders."""
        names = list(self.basenames())
        return self.select(np.array(sorted(range(len(names)), key=names.__getitem__), np.int64))

    def tops(self) -> list[str]:
        """Of each folder of ``folders``, the first part of its path; "" for the root itself."""
        return [folder.partition("/")[0] for folder in self.folders]

    def numbered(self, classes: Sequence[str]) -> NDArray[np.int64]:
        """int64 ``[N]``: the class of each file, which is the number of its top folder in ``classes``.

        Raises:
            DataError: a file's top folder is none of them.
        """
        numbers = {label: number for number, label in enumerate(classes)}
        of_folder = np.array([numbers.get(top, -1) for top in self.tops()] or [0], np.int64)
        found = of_folder[self.folder]
        if (found < 0).any():
            strange = sorted({self.tops()[folder] for folder in np.unique(self.folder[found < 0])})
            raise DataError(
                f"{self.root} holds {', '.join(strange[:5])}, which is no class folder of the training images"
            )
        return found


def find_images(root: Path) -> PathTable:
    """Image files below a folder, in a fixed order; hidden files and folders are ignored, links are followed.

    One listing per folder and no look at the files themselves.
    """
    return PathTable(root, _walk(root))


def _walk(root: Path) -> Listing:
    top = os.fspath(root)
    for parent, folders, files in os.walk(top, followlinks=True):
        inside = os.path.relpath(parent, top).replace(os.sep, "/") if parent != top else ""
        folders[:] = sorted(name for name in folders if not (name.startswith(".") or _leads_up(parent, name)))
        images = sorted(name for name in files if is_image(name))
        if images:
            yield inside, images


def _leads_up(parent: str, name: str) -> bool:
    """Whether a folder is a link to one that it lies in: two of these would be followed without end."""
    path = os.path.join(parent, name)
    if not os.path.islink(path):
        return False
    target, here = os.path.realpath(path), os.path.realpath(parent)
    return os.path.commonpath([target, here]) == target


def is_image(name: str) -> bool:
    """Whether a file's name is that of a visible image."""
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS
