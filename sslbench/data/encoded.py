"""Sources of encoded images, which are decoded when asked for."""

from __future__ import annotations

import io
from abc import abstractmethod
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.imagefile import decode_image, image_size, read_bytes, threaded
from sslbench.data.kept import WORTH_KEEPING, kept
from sslbench.data.paths import PathTable
from sslbench.data.revision import files_revision
from sslbench.errors import DataError
from sslbench.plugin.api import Source

_PROBES = 64


class EncodedSource(Source):
    """Images as the bytes of JPEG, PNG or other files.

    Args:
        targets: int64 ``[N]`` class numbers, ``[N,C]`` for several labels per image, or None.
        side: in pixels, of a data set whose images are all square and of one size; None: headers tell.
    """

    def __init__(self, targets: Tensor | None, side: int | None = None) -> None:
        self._targets = targets
        self._side = side

    @abstractmethod
    def encoded(self, index: int) -> NDArray[np.uint8]:
        """The bytes of an image file.

        Raises:
            DataError: naming the image.
        """

    def image(self, index: int) -> Tensor:
        return decode_image(self.encoded(index), self.describe(index))

    def header(self, index: int) -> tuple[int, int]:
        """Height and width of an image; (0, 0) if its header cannot be read."""
        try:
            return image_size(io.BytesIO(self.encoded(index).tobytes()))
        except DataError:
            return 0, 0

    @property
    def targets(self) -> Tensor | None:
        return self._targets

    def image_sizes(self) -> Tensor:
        """int64 ``[N,2]`` from the headers; (0, 0) marks a file whose header cannot be read."""
        return self._sizes if self._side is None else torch.tensor([[self._side] * 2]).expand(len(self), 2)

    @cached_property
    def _sizes(self) -> Tensor:
        def look() -> NDArray[np.int64]:
            return np.array(list(threaded(self.header, range(len(self)))), np.int64).reshape(-1, 2)

        worth = len(self) >= WORTH_KEEPING
        return torch.from_numpy(kept("sizes", self.revision, look) if worth else look())

    def common_size(self) -> tuple[int, int] | None:
        """Height and width if all readable images share them; a few differing headers spare a look at the rest."""
        if self._side is None:
            probe = range(0, len(self), max(1, len(self) // _PROBES))
            if len(set(threaded(self.header, probe)) - {(0, 0)}) > 1:
                return None
        return super().common_size()

    def common_side(self) -> int | None:
        """The side of the images if all are square and of one size."""
        size = self.common_size()
        return size[0] if size and size[0] == size[1] else None


class FileSource(EncodedSource):
    """Image files.

    Args:
        paths: the files.
        targets, side: as in :class:`EncodedSource`.
    """

    def __init__(self, paths: PathTable, targets: Tensor | None, side: int | None = None) -> None:
        super().__init__(targets, side)
        self.paths = paths

    def __len__(self) -> int:
        return len(self.paths)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        return read_bytes(self.paths[index])

    def header(self, index: int) -> tuple[int, int]:
        return image_size(self.paths[index])

    def revision(self) -> str:
        return files_revision({"": self.paths})

    def describe(self, index: int) -> str:
        return str(self.paths[index])
