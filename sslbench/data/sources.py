"""Sources that data sets share: images in memory, one source after another, and content digests."""

from __future__ import annotations

import gzip
import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sslbench.errors import DataError
from sslbench.plugin.api import Source


class ArraySource(Source):
    """Images that are in memory.

    Args:
        pixels: uint8 ``[N,3,H,W]``.
        targets: int64 ``[N]``, or None for unlabelled images.
    """

    def __init__(self, pixels: Tensor, targets: Tensor | None) -> None:
        self._pixels = pixels
        self._targets = targets

    def __len__(self) -> int:
        return len(self._pixels)

    def image(self, index: int) -> Tensor:
        return self._pixels[index]

    @property
    def targets(self) -> Tensor | None:
        return self._targets

    def pixels(self) -> Tensor:
        return self._pixels


class ConcatSource(Source):
    """The images of ``first`` followed by those of ``second``."""

    def __init__(self, first: Source, second: Source) -> None:
        self._parts = (first, second)

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts)

    def _locate(self, index: int) -> tuple[Source, int]:
        first, second = self._parts
        return (first, index) if index < len(first) else (second, index - len(first))

    def image(self, index: int) -> Tensor:
        source, number = self._locate(index)
        return source.image(number)

    @property
    def targets(self) -> Tensor | None:
        first, second = (part.targets for part in self._parts)
        return None if first is None or second is None else torch.cat([first, second])

    @property
    def blocks(self) -> Tensor | None:
        first, second = (part.blocks for part in self._parts)
        return None if first is None or second is None else torch.cat([first, second + first.max() + 1])

    def image_sizes(self) -> Tensor:
        return torch.cat([part.image_sizes() for part in self._parts])

    def revision(self) -> str | None:
        revisions = [part.revision() for part in self._parts]
        return None if None in revisions else " ".join(map(str, revisions))

    def describe(self, index: int) -> str:
        source, number = self._locate(index)
        return source.describe(number)


def packaged_table(package: str, path: str) -> Tensor:
    """uint8 ``[rows, columns]`` of a gzipped table of small whole numbers that an installed package carries.

    The package itself is not imported, which takes seconds for the ones in question.

    Raises:
        DataError: the package or its file is missing.
    """
    spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if Path(folder, path).is_file():
            with gzip.open(Path(folder, path)) as lines:
                return torch.from_numpy(np.loadtxt(lines, delimiter=",", dtype=np.uint8))
    raise DataError(
        f"this data set needs the file {path} of the Python package {package}", hint="pip install sslbench"
    )


def digest(*tensors: Tensor) -> str:
    """Hex digest of shapes, types and contents."""
    state = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        state.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(tensor.contiguous().numpy().data)
    return state.hexdigest()
