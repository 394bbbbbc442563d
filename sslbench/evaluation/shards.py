"""A table of features on disk: files of some rows each, which appear whole or not at all."""

from __future__ import annotations

import fcntl
import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from sslbench.evaluation.mapping import GRANULARITY, map_files

SHARD_ROWS = 4096
"""Most images of a shard: what a killed extraction loses, per process."""
ABOUT = "about.json"


@dataclass(frozen=True)
class Layout:
    """How a table ``[N,D]`` is cut into shards."""

    rows: int
    """N"""
    dim: int
    """D"""
    shard: int
    """Rows of every shard but the last."""

    @classmethod
    def of(cls, rows: int, dim: int, world: int) -> Layout:
        """Shards that ``world`` processes can share out, whose files can be mapped side by side."""
        unit = GRANULARITY // math.gcd(GRANULARITY, 4 * dim)
        wanted = max(1, min(SHARD_ROWS, -(-rows // world)))
        return cls(rows, dim, -(-wanted // unit) * unit)

    @cached_property
    def ranges(self) -> list[range]:
        """The rows of each shard."""
        return [range(start, min(start + self.shard, self.rows)) for start in range(0, self.rows, self.shard)]


class ShardedTable:
    """The folder of one table. Files are complete: they get their names when their bytes are on the disk.

    A shard is the bytes of its rows and then a JSON object: their checksum, and the positions of rows that hold
    nothing because their images cannot be read.
    """

    def __init__(self, folder: Path, layout: Layout) -> None:
        self.folder = folder
        self.layout = layout

    @classmethod
    def known_layout(cls, folder: Path) -> Layout | None:
        """How the table that was begun in a folder is cut."""
        try:
            about = json.loads((folder / ABOUT).read_text())
            return Layout(*(int(about[name]) for name in ("rows", "dim", "shard")))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def begin(self, key: Mapping[str, Any]) -> None:
        """Make the folder, or get it into order.

        Raises:
            OSError: it can be neither made nor written to.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(self.folder)
        if self.known_layout(self.folder) != self.layout:
            write_whole(
                self.folder / ABOUT, [json.dumps({**asdict(self.layout), "key": key}, default=str).encode()]
            )

    def discard(self, number: int) -> None:
        """Remove a shard that is of no use."""
        self.path(number).unlink(missing_ok=True)

    def path(self, number: int) -> Path:
        """A shard's file."""
        rows = self.layout.ranges[number]
        return self.folder / f"rows-{rows.start:09}-{rows.stop:09}"

    def write(self, number: int, rows: Tensor, missing: Iterable[int]) -> None:
        """Store a shard ``[n,D]`` on the CPU.

        Raises:
            OSError: it cannot be written; what was before stays.
        """
        content = _bytes(rows)
        footer = {"crc32": zlib.crc32(content), "missing": list(missing)}
        write_whole(self.path(number), [content, json.dumps(footer).encode()])

    def footer(self, number: int) -> list[int]:
        """The positions of a shard's rows that hold nothing.

        Raises:
            OSError, ValueError: there is no such shard, or it is damaged.
        """
        return self._footer(number)[1]

    def check(self, number: int) -> list[int] | None:
        """:meth:`footer` of a shard whose bytes are what was written; None if there is no such shard.

        Raises:
            ValueError: it is damaged.
        """
        try:
            checksum, missing = self._footer(number)
            if zlib.crc32(_bytes(self.read(number))) != checksum:
                raise ValueError("it does not match its checksum")
            return missing
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise ValueError(f"{self.path(number)}: {error}") from error

    def _footer(self, number: int) -> tuple[int, list[int]]:
        with self.path(number).open("rb") as file:
            file.seek(self._size(number))
            footer = _parsed(file.read())
        return footer["crc32"], [int(row) for row in footer["missing"]]

    def mapped(self) -> Tensor:
        """The whole table ``[N,D]``, read from the files as it is looked at.

        Raises:
            OSError: a shard is missing or cut off.
        """
        numbers = range(len(self.layout.ranges))
        return map_files([(self.path(number), self._size(number)) for number in numbers], self.layout.dim)

    def read(self, number: int) -> Tensor:
        """One shard ``[n,D]``, mapped."""
        return map_files([(self.path(number), self._size(number))], self.layout.dim)

    def _size(self, number: int) -> int:
        return len(self.layout.ranges[number]) * self.layout.dim * torch.float32.itemsize


def _parsed(text: bytes) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("its end is nested too deeply") from None


def _bytes(rows: Tensor) -> memoryview:
    values: Any = rows.contiguous().numpy()
    return memoryview(values).cast("B")


def write_whole(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Write a file that has its name only when all its bytes are on the disk."""
    partial = path.with_name(f".{path.name}.{uuid4().hex}.partial")
    try:
        with partial.open("wb") as file:
            _lock(file.fileno())
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
            partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _lock(descriptor: int) -> bool:
    """Whether no process that lives holds it; where locks do not work, it may be held."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _remove_abandoned(folder: Path) -> None:
    """Unfinished files of processes that were ended; those who write hold a lock."""
    for partial in folder.glob(".*.partial"):
        try:
            with partial.open("rb") as file:
                if _lock(file.fileno()):
                    partial.unlink(missing_ok=True)
        except OSError:
            continue
