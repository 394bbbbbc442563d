"""Decoded images of one size in a file, mapped into memory by all processes that use them."""

from __future__ import annotations

import json
import os
import time
import warnings
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.entry import Entry, write_synced
from sslbench.data.imagefile import threaded
from sslbench.data.locking import Log
from sslbench.errors import SslbenchError
from sslbench.plugin.api import Source

PIXELS, CHECKS, ABOUT = "pixels", "checks", "about.json"

_GROUP_BYTES = 64 << 10
_CHECKED_GROUPS = 4096
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class MappedPixels:
    """Images that lie in a file and in the page cache, once for all processes of a machine."""

    pixels: Tensor
    """uint8 ``[N,3,H,W]``, not to be written to; zeros where an image is unreadable."""
    unreadable: dict[int, str]
    """By number, why an image cannot be read."""


def read_or_reason(source: Source, index: int) -> Tensor | str:
    """The image, or why it cannot be read."""
    try:
        return source.image(index)
    except (SslbenchError, OSError) as error:
        return str(error)


def read_sized(source: Source, index: int, size: tuple[int, int]) -> Tensor | str:
    """The image, or why it cannot be one of a set whose images have this height and width."""
    image = read_or_reason(source, index)
    if isinstance(image, str) or image.shape[1:] == size:
        return image
    return f"{source.describe(index)}: decoded to {tuple(image.shape)}, not {(3, *size)}"


class PixelCache(Entry[MappedPixels]):
    """The pixels of one source's images of one size.

    Args:
        source: its images are decoded one at a time.
        revision: the source's.
        size: height and width of all its images.
        folder: where entries are kept.
        log: receives progress and what stands in the way.
    """

    def __init__(self, source: Source, revision: str, size: tuple[int, int], folder: Path, log: Log) -> None:
        super().__init__("images", source, revision, size, folder, log)
        self._size = size
        self._shape = (len(source), 3, *size)
        self._image_bytes = 3 * size[0] * size[1]
        self._per_group = max(1, _GROUP_BYTES // self._image_bytes)

    @property
    def needed_bytes(self) -> int:
        return len(self.source) * self._image_bytes

    def find(self) -> MappedPixels | None:
        try:
            about = json.loads((self.path / ABOUT).read_text())
            unreadable = {int(index): self._read(int(index)) for index in about["unreadable"]}
            pixels = self._map()
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None
        # An image that could not be read once, perhaps for want of a permission, may be readable now.
        reasons = {index: found for index, found in unreadable.items() if isinstance(found, str)}
        return MappedPixels(pixels, reasons) if len(reasons) == len(unreadable) else None

    def _read(self, index: int) -> Tensor | str:
        return read_sized(self.source, index, self._size)

    def _map(self) -> Tensor:
        """The pixels, looked through for damage.

        Raises:
            ValueError: they are not what was written.
        """
        rows = np.memmap(self.path / PIXELS, np.uint8, mode="r")
        checks = np.fromfile(self.path / CHECKS, np.uint32)
        groups = -(-len(self.source) // self._per_group)
        if rows.size != self.needed_bytes or len(checks) != groups:
            raise ValueError(f"{self.path} is cut off")
        step, size = -(-groups // _CHECKED_GROUPS), self._per_group * self._image_bytes
        if any(zlib.crc32(rows[g * size : (g + 1) * size].data) != checks[g] for g in range(0, groups, step)):
            raise ValueError(f"{self.path} is damaged")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(rows).view(self._shape)

    def write(self, folder: Path) -> None:
        with (folder / PIXELS).open("wb") as file:
            writer = _Writer(self._read, file.fileno(), self._shape, self._per_group)
            checks = writer.run(self.log)
            os.fsync(file.fileno())
        write_synced(folder / CHECKS, checks.tobytes())
        about = {
            "first": self.source.describe(0),
            "shape": self._shape,
            "unreadable": sorted(writer.unreadable),
        }
        write_synced(folder / ABOUT, json.dumps(about, indent=1).encode())


class _Writer:
    """Decodes images in threads and writes them where they belong.

    Args:
        read: gives an image by number, or why there is none.
        descriptor: of the file.
        shape: ``[N,3,H,W]``.
        per_group: how many images are written at once.
    """

    def __init__(
        self, read: Callable[[int], Tensor | str], descriptor: int, shape: Sequence[int], per_group: int
    ) -> None:
        self.unreadable: set[int] = set()
        self._read = read
        self._descriptor = descriptor
        self._shape = tuple(shape)
        self._per_group = per_group

    def run(self, log: Log) -> NDArray[np.uint32]:
        """Checksums of all groups."""
        starts = range(0, self._shape[0], self._per_group)
        checks, told = np.zeros(len(starts), np.uint32), time.monotonic()
        for number, check in enumerate(threaded(self._write_group, starts)):
            checks[number] = check
            if time.monotonic() - told > _PROGRESS_SECONDS:
                told = time.monotonic()
                log(f"decoded {starts[number] + self._per_group} of {self._shape[0]} images")
        return checks

    def _write_group(self, start: int) -> int:
        rows = torch.zeros(min(self._per_group, self._shape[0] - start), *self._shape[1:], dtype=torch.uint8)
        for row, index in enumerate(range(start, start + len(rows))):
            image = self._read(index)
            if isinstance(image, Tensor):
                rows[row] = image
            else:
                self.unreadable.add(index)
        content = rows.numpy().data.cast("B")
        _write_at(self._descriptor, content, start * (len(content) // len(rows)))
        return zlib.crc32(content)


def _write_at(descriptor: int, content: memoryview, offset: int) -> None:
    """``pwrite``, which may write a part only, and on a full disk says so, which a mapped file could not."""
    written = 0
    while written < len(content):
        written += os.pwrite(descriptor, content[written:], offset + written)
