"""Decoded images kept on disk from one run to the next, mapped into memory by all processes that use them.

An entry is a folder that appears complete or not at all. It is found by what its images were read from
(:meth:`sslbench.plugin.api.Source.revision`), so a changed file makes another entry and never shows old pixels.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sslbench.data.imagefile import threaded
from sslbench.errors import SslbenchError, write_failure
from sslbench.plugin.api import Source

Log = Callable[[str], None]

CACHE_VERSION = 1
"""Part of every key. Bump it when the same files may give other pixels."""

PIXELS, CHECKS, ABOUT = "pixels", "checks", "about.json"

_GROUP_BYTES = 64 << 10
_CHECKED_GROUPS = 4096
_SPARED = 1 << 30
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class MappedPixels:
    """Images that lie in a file and in the page cache, once for all processes of a machine."""

    pixels: Tensor
    """uint8 ``[N,3,H,W]``, not to be written to; zeros where an image is unreadable."""
    unreadable: dict[int, str]
    """By number, why an image cannot be read."""


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/sslbench`` or ``~/.cache/sslbench``; for a user without a home, a temporary folder."""
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslbench"
    except RuntimeError:
        return Path(tempfile.gettempdir(), f"sslbench-{os.getuid()}")


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


class PixelCache:
    """The entry of one source's images of one size.

    Args:
        source: its images are decoded one at a time.
        revision: the source's.
        size: height and width of all its images.
        folder: where entries are kept.
        log: receives progress and what stands in the way.
    """

    def __init__(self, source: Source, revision: str, size: tuple[int, int], folder: Path, log: Log) -> None:
        self.source = source
        self.log = log
        self._size = size
        self._shape = (len(source), 3, *size)
        self._image_bytes = 3 * size[0] * size[1]
        self._per_group = max(1, _GROUP_BYTES // self._image_bytes)
        decoders = [version("torchvision"), version("pillow")]
        key = json.dumps([CACHE_VERSION, revision, self._shape, decoders])
        self.revision = revision
        self.path = folder / f"images-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"

    @property
    def total_bytes(self) -> int:
        """Of all pixels."""
        return len(self.source) * self._image_bytes

    def find(self) -> MappedPixels | None:
        """What an earlier run has kept; None if there is nothing, or it is damaged."""
        try:
            about = json.loads((self.path / ABOUT).read_text())
            unreadable = {int(index): self._read(int(index)) for index in about["unreadable"]}
            pixels = self._map()
        except (OSError, ValueError, KeyError, TypeError):
            return None
        # An image that could not be read once, perhaps for want of a permission, may be readable now.
        reasons = {index: found for index, found in unreadable.items() if isinstance(found, str)}
        return MappedPixels(pixels, reasons) if len(reasons) == len(unreadable) else None

    def find_or_build(self) -> MappedPixels | None:
        """What is kept, or what is decoded and kept now; None if it cannot be kept, which is logged.

        Only one process builds an entry; others wait for it.
        """
        found = self.find()
        if found is not None:
            return found
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.with_suffix(".lock"), self.log) as alone:
                return self.find() or self._build(alone)
        except OSError as error:
            reason = write_failure(error, self.path) or str(error)
            self.log(f"decoded images are not kept in {self.path.parent}: {reason}")
            return None

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
        if rows.size != self.total_bytes or len(checks) != groups:
            raise ValueError(f"{self.path} is cut off")
        step, size = -(-groups // _CHECKED_GROUPS), self._per_group * self._image_bytes
        if any(zlib.crc32(rows[g * size : (g + 1) * size].data) != checks[g] for g in range(0, groups, step)):
            raise ValueError(f"{self.path} is damaged")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(rows).view(self._shape)

    def _build(self, alone: bool) -> MappedPixels | None:
        """Decode everything into a folder of another name, which then gets its own.

        Args:
            alone: no other process builds this entry, so what is half-built is left over from one that was ended.
        """
        if alone:
            for abandoned in self.path.parent.glob(f"{self.path.name}.*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)
        free = shutil.disk_usage(self.path.parent).free
        if free < self.total_bytes + _SPARED:
            need = f"{self.total_bytes >> 20} MiB and {_SPARED >> 20} MiB to spare, {free >> 20} MiB are free"
            self.log(f"decoded images are not kept in {self.path.parent}, which is too full: they take {need}")
            return None
        partial = self.path.with_name(f"{self.path.name}.{uuid4().hex}.partial")
        partial.mkdir()
        try:
            self._write(partial)
            if self.source.revision() != self.revision:
                self.log("decoded images are not kept: files changed while they were read")
                return None
            if self.path.exists():  # but was not found
                self.log(f"{self.path} was damaged and is replaced")
                shutil.rmtree(self.path, ignore_errors=True)
            partial.rename(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.find()

    def _write(self, folder: Path) -> None:
        with (folder / PIXELS).open("wb") as file:
            writer = _Writer(self._read, file.fileno(), self._shape, self._per_group)
            checks = writer.run(self.log)
            os.fsync(file.fileno())
        _write_synced(folder / CHECKS, checks.tobytes())
        about = {
            "first": self.source.describe(0),
            "shape": self._shape,
            "unreadable": sorted(writer.unreadable),
        }
        _write_synced(folder / ABOUT, json.dumps(about, indent=1).encode())


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


def _write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _locked(path: Path, log: Log) -> Iterator[bool]:
    """Wait until no other process holds the lock. It ends with the process.

    Yields:
        Whether the lock is held; False on a file system without locks.
    """
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log(f"waiting for another process that decodes the same images into {path.parent}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
