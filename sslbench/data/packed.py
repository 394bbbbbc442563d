"""Large photographs, made smaller once: a training set in one file that is quicker to read and to decode."""

from __future__ import annotations

import io
import json
import os
import time
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.arrays import read_arrays
from sslbench.data.cache import read_or_reason
from sslbench.data.encoded import EncodedSource
from sslbench.data.entry import Entry, cache_folder, write_synced
from sslbench.data.imagefile import threaded
from sslbench.data.locking import Log
from sslbench.errors import DataError
from sslbench.plugin.api import Source

_FILE, _INDEX, _ABOUT, _DAMAGED = "files", "index.npz", "about.json", "damaged"
_USUAL_BYTES = 40 << 10
"""Of a photograph of short side 256 as JPEG of quality 95."""
_PROGRESS_SECONDS = 10.0
_CHECKED_IMAGES = 4096


class Smaller(NamedTuple):
    """How images are made smaller."""

    side: int
    """Short side in pixels."""
    quality: int
    """Of the JPEGs."""

    def of(self, source: Source, index: int) -> tuple[bytes, tuple[int, int]]:
        """A JPEG and its height and width; nothing and zeros of an unreadable image."""
        image = read_or_reason(source, index)
        if isinstance(image, str):
            return b"", (0, 0)
        height, width = image.shape[1:]
        if min(height, width) <= self.side and isinstance(source, EncodedSource):
            return source.encoded(index).tobytes(), (height, width)
        small = shrink(image, self.side)
        return encode(small, self.quality), (small.shape[1], small.shape[2])


class PackedSource(EncodedSource):
    """The images of another source in one file, as JPEGs of a smaller size.

    Args:
        original: gives names and targets.
        file: all images, one after the other.
        ends: int64 ``[N]``, where each one ends in the file.
        sizes: int64 ``[N,2]``, heights and widths; zeros where an image is unreadable.
        checks: uint32 ``[N]``, CRC-32 of each.
        reasons: by number, why an image is unreadable.
        revision: of the original images, and how they were made smaller.
        smaller: how that was, for an image that is damaged in the file.
    """

    def __init__(
        self,
        original: Source,
        file: Path,
        ends: NDArray[np.int64],
        sizes: NDArray[np.int64],
        checks: NDArray[np.uint32],
        reasons: dict[int, str],
        revision: str,
        smaller: Smaller,
    ) -> None:
        super().__init__(original.targets)
        self.original = original
        self._file = file
        self._bounds = np.concatenate([[0], ends])
        self._heights_widths = sizes
        self._checks = checks
        self._reasons = reasons
        self._revision = revision
        self._smaller = smaller

    def __len__(self) -> int:
        return len(self._heights_widths)

    def encoded(self, index: int) -> NDArray[np.uint8]:
        if index in self._reasons:
            raise DataError(self._reasons[index])
        content = self._stored(index)
        return self._made_again(index) if content is None else content

    def _stored(self, index: int) -> NDArray[np.uint8] | None:
        """None if it is not what was written."""
        start, end = self._bounds[index], self._bounds[index + 1]
        try:
            content = np.fromfile(self._file, np.uint8, int(end - start), offset=int(start))
        except OSError:
            return None
        return content if zlib.crc32(content.data) == self._checks[index] else None

    def _made_again(self, index: int) -> NDArray[np.uint8]:
        """The same bytes from the original. The next run makes all of them again: more may be damaged."""
        with suppress(OSError):
            self._file.with_name(_DAMAGED).touch()
        content, _ = self._smaller.of(self.original, index)
        if zlib.crc32(content) != self._checks[index]:
            raise DataError(
                f"the smaller copy of {self.describe(index)} in {self._file} is damaged, and the original is "
                "another image now",
                hint=f"delete {self._file.parent} and start again",
            )
        return np.frombuffer(bytearray(content), np.uint8)

    def is_whole(self) -> bool:
        """Whether the images are what was written: all of up to 4,096, else as many, spread evenly."""
        if self._file.with_name(_DAMAGED).exists():
            return False
        looked_at = range(0, len(self), -(-len(self) // _CHECKED_IMAGES))
        return all(content is not None for content in threaded(self._stored, looked_at))

    def header(self, index: int) -> tuple[int, int]:
        height, width = self._heights_widths[index].tolist()
        return height, width

    def image_sizes(self) -> Tensor:
        return torch.from_numpy(self._heights_widths)

    def revision(self) -> str:
        return self._revision

    def describe(self, index: int) -> str:
        return self.original.describe(index)


class PackedImages(Entry[PackedSource]):
    """The smaller images of one source.

    Args:
        source: images of any sizes.
        revision: the source's.
        side: short side in pixels of the smaller images.
        quality: of the JPEGs.
        folder: where entries are kept.
        log: receives progress and what stands in the way.
    """

    def __init__(self, source: Source, revision: str, side: int, quality: int, folder: Path, log: Log) -> None:
        super().__init__(f"packed-{side}", source, revision, [side, quality], folder, log)
        self.smaller = Smaller(side, quality)

    @property
    def needed_bytes(self) -> int:
        return int(len(self.source) * _USUAL_BYTES * (self.smaller.side / 256) ** 2)

    def find(self) -> PackedSource | None:
        file = self.path / _FILE
        try:
            arrays = read_arrays(self.path / _INDEX)
            ends, sizes, checks = arrays["ends"], arrays["sizes"], arrays["checks"]
            about = json.loads((self.path / _ABOUT).read_text())
            if not len(ends) == len(sizes) == len(self.source) or file.stat().st_size != int(ends[-1]):
                return None
            again = [int(index) for index in about["unreadable"]]
            reasons = {index: read_or_reason(self.source, index) for index in again}
        except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
            return None
        known = {index: reason for index, reason in reasons.items() if isinstance(reason, str)}
        if len(known) < len(again):
            return None  # what could not be read once can be read now
        revision = self.path.name
        packed = PackedSource(self.source, file, ends, sizes, checks, known, revision, self.smaller)
        return packed if packed.is_whole() else None

    def write(self, folder: Path) -> None:
        total = len(self.source)
        ends, sizes, checks = np.zeros(total, np.int64), np.zeros((total, 2), np.int64), np.zeros(total, np.uint32)
        told = time.monotonic()
        with (folder / _FILE).open("wb") as file:
            for number, (content, size) in enumerate(
                threaded(partial(self.smaller.of, self.source), range(total))
            ):
                file.write(content)
                ends[number], sizes[number], checks[number] = file.tell(), size, zlib.crc32(content)
                if time.monotonic() - told > _PROGRESS_SECONDS:
                    told = time.monotonic()
                    self.log(f"made {number + 1} of {total} images smaller, {file.tell() >> 20} MiB")
            file.flush()
            os.fsync(file.fileno())
        index = io.BytesIO()
        np.savez(index, ends=ends, sizes=sizes, checks=checks)
        write_synced(folder / _INDEX, index.getvalue())
        unreadable = np.flatnonzero(sizes[:, 0] == 0).tolist()
        about = {"first": self.source.describe(0), "short side": self.smaller.side, "unreadable": unreadable}
        write_synced(folder / _ABOUT, json.dumps(about, indent=1).encode())


def shrink(image: Tensor, side: int) -> Tensor:
    """uint8 ``[3,H,W]`` whose short side has at most ``side`` pixels; bicubic and antialiased, as by Pillow."""
    height, width = image.shape[1:]
    scale = side / min(height, width)
    if scale >= 1:
        return image
    size = (max(side, round(height * scale)), max(side, round(width * scale)))
    return F.interpolate(image[None], size, mode="bicubic", antialias=True, align_corners=False)[0]


def encode(image: Tensor, quality: int) -> bytes:
    """A JPEG with halved colour resolution, as most photographs have."""
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()).save(file, "JPEG", quality=quality)
    return file.getvalue()


def pack(source: Source, options: DataOptions, log: Log) -> Source:
    """The training images as ``data.packed_size`` wants them: the source itself, or its smaller images.

    Raises:
        DataError: they cannot be kept, or nobody can tell when the source's files change.
    """
    if options.packed_size is None or source.pixels() is not None:
        return source
    revision = source.revision()
    if revision is None:
        raise DataError(
            "data.packed_size is for data sets of files, whose dates tell when they change",
            hint="data.packed_size=null",
        )
    folder = cache_folder(options)
    entry = PackedImages(source, revision, options.packed_size, options.packed_quality, folder, log)
    packed = comm.patiently(lambda: _found(entry, options, folder))
    log(f"images: made smaller, short side {options.packed_size} ({entry.path})")
    return packed


def _found(entry: PackedImages, options: DataOptions, folder: Path) -> PackedSource:
    packed = entry.find_or_build()
    if packed is None:
        # Going on with the original images would be another experiment.
        raise DataError(
            f"data.packed_size={options.packed_size}: the smaller images cannot be kept in {folder}",
            hint="data.cache_dir=FOLDER on a disk with room, or data.packed_size=null",
        )
    return packed
