"""Folders that list their files in another order than usual, as other file systems do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self


class _Entries:
    """What ``os.scandir`` returns, from the last entry to the first."""

    def __init__(self, scan: Any) -> None:
        with scan:
            self._entries = iter(sorted(scan, key=lambda entry: entry.name, reverse=True))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Any:
        return next(self._entries)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """All entries have been read already."""


@contextmanager
def backwards() -> Iterator[None]:
    """``os.listdir`` and ``os.scandir``, and what is built on them, go through folders backwards."""
    listdir, scandir = os.listdir, os.scandir
    patched: Any = os
    patched.listdir = lambda *path: sorted(listdir(*path), reverse=True)
    patched.scandir = lambda *path: _Entries(scandir(*path))
    try:
        yield
    finally:
        patched.listdir, patched.scandir = listdir, scandir
