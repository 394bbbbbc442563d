"""Images in uncompressed tar archives (shards), which are read in place and never unpacked."""

from __future__ import annotations

import hashlib
import logging
import os
import time
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.encoded import EncodedSource
from sslbench.data.entry import default_folder
from sslbench.data.imagefile import threaded
from sslbench.data.locking import locked_if_possible
from sslbench.data.paths import PathTable
from sslbench.data.revision import file_state
from sslbench.data.shardindex import ShardIndex, kept_index, read_index
from sslbench.errors import DataError

logger = logging.getLogger(__name__)

_OPEN_FILES = 64
_PROGRESS_SECONDS = 10.0
_SAMPLED_MEMBERS = 4096
_SAMPLED_BYTES = 64 << 10


class _OpenFile:
    """A file descriptor that is closed with the last reference to it, perhaps that of a thread still reading."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@lru_cache(maxsize=_OPEN_FILES)
def _open(path: str, _changed: int) -> _OpenFile:
    """Shared by threads and by forked processes: reading at a place leaves the descriptor's own position alone."""
    return _OpenFile(path)


class ShardSource(EncodedSource):
    """The images of some archives, one archive after the other.

    Args:
        shards: the archives.

    Raises:
        DataError: there are no images, or only some have labels.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        indices = _indexed(shards)
        self.shards = tuple(shards)
        self.names = PathTable(
            Path(), [(path.name, index.names) for path, index in zip(shards, indices, strict=True)]
        )
        """Of the members, with their archive as the folder."""
        self.sizes = np.concatenate([index.sizes for index in indices])
        """int64 ``[N]``, in bytes."""
        self._offsets = np.concatenate([index.offsets for index in indices])
        self._changed = [path.stat().st_mtime_ns for path in shards]
        if not len(self.names):
            raise DataError(f"{shards[0]} and {len(shards) - 1} more shards hold no .jpg, .jpeg, .png or .webp")
        super().__init__(self._labels(np.concatenate([index.labels for index in indices])))

    def _labels(self, labels: NDArray[np.int64]) -> Tensor | None:
        without = np.flatnonzero(labels < 0)
        if 0 < len(without) < len(labels):
            raise DataError(
                f"{len(without)} of {len(labels)} images have no label: {self.describe(int(without[0]))}",
                hint="give every image a member KEY.cls, or none",
            )
        return None if len(without) else torch.from_numpy(labels)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def blocks(self) -> Tensor:
        """int64 ``[N]``: number of each image's archive."""
        return torch.from_numpy(self.names.folder).long()

    def encoded(self, index: int) -> NDArray[np.uint8]:
        return self.start(index, int(self.sizes[index]))

    def start(self, index: int, count: int) -> NDArray[np.uint8]:
        """The first bytes of an image file.

        Raises:
            DataError: the archive cannot be read or has become shorter.
        """
        shard = self.names.folder[index]
        try:
            file = _open(str(self.shards[shard]), self._changed[shard])
            content = os.pread(file.number, count, int(self._offsets[index]))
        except OSError as error:
            raise DataError(f"cannot read {self.describe(index)}: {error}") from error
        if len(content) < count:
            raise DataError(f"cannot read {self.describe(index)}: the archive has become shorter")
        return np.frombuffer(bytearray(content), np.uint8)

    def revision(self) -> str:
        paths = [os.path.abspath(path) for path in self.shards]
        return hashlib.blake2b(repr([(path, file_state(path)) for path in paths]).encode()).hexdigest()

    def describe(self, index: int) -> str:
        return f"{self.shards[self.names.folder[index]]}/{self.names.basename(index)}"

    def digest(self) -> str:
        """Hex digest of names, sizes, labels and archive numbers of all images, and of the first 64 KiB of some
        4,000 of them, spread evenly."""
        state = hashlib.blake2b(digest_size=16)
        for name in self.names.basenames():
            state.update(f"{name}\0".encode(errors="surrogateescape"))
        for array in (self.sizes, self.names.folder, self._targets):
            state.update(b"-" if array is None else np.asarray(array).tobytes())
        step = -(-len(self) // _SAMPLED_MEMBERS)
        for part in threaded(self._digest_start, range(0, len(self), step)):
            state.update(part)
        return state.hexdigest()

    def _digest_start(self, index: int) -> bytes:
        start = self.start(index, min(int(self.sizes[index]), _SAMPLED_BYTES))
        return hashlib.blake2b(start.tobytes()).digest()


def _indexed(shards: Sequence[Path]) -> list[ShardIndex]:
    """The indices of all archives. Of several processes one makes what is missing, the others wait for it."""
    kept = [kept_index(shard) for shard in shards]
    if None not in kept:
        return [index for index in kept if index is not None]
    names = "\0".join(str(shard.resolve()) for shard in shards)
    name = hashlib.blake2b(names.encode(errors="surrogateescape"), digest_size=16).hexdigest()
    with locked_if_possible(default_folder() / "shards" / f"{name}.lock", logger.info, "indexes the same shards"):
        return list(_read(shards))


def _read(shards: Sequence[Path]) -> Iterator[ShardIndex]:
    told = time.monotonic()
    for number, index in enumerate(map(read_index, shards), start=1):
        if time.monotonic() - told > _PROGRESS_SECONDS:
            told = time.monotonic()
            logger.info("indexed %d of %d shards", number, len(shards))
        yield index
