"""Folders of things made from images, kept from one run to the next.

An entry appears complete or not at all. It is found by what its images were read from
(:meth:`sslbench.plugin.api.Source.revision`), so a changed file makes another entry and never shows old pixels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
import tempfile
from abc import ABC, abstractmethod
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Generic, TypeVar
from uuid import uuid4

from sslbench.config.schema import DataOptions
from sslbench.data.locking import Log, locked
from sslbench.errors import DataError, write_failure
from sslbench.plugin.api import Source

CACHE_VERSION = 1
"""Part of every key. Bump it when the same files may give other pixels."""

_SPARED = 1 << 30

_Content = TypeVar("_Content")


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/sslbench`` or ``~/.cache/sslbench``; for a user without a home, a temporary folder.

    Raises:
        DataError: the temporary folder is another user's.
    """
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sslbench"
    except RuntimeError:
        return _private(Path(tempfile.gettempdir(), f"sslbench-{os.getuid()}"))


def _private(folder: Path) -> Path:
    """A folder of ours alone, in one where everybody may make some: its name can be guessed, and was perhaps."""
    with suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise DataError(
            f"{folder}, where decoded images would be kept, is not a folder of user {os.getuid()}",
            hint="export XDG_CACHE_HOME=FOLDER",
        )
    if stat.S_IMODE(found.st_mode) != 0o700:
        folder.chmod(0o700)
    return folder


def cache_folder(options: DataOptions) -> Path:
    """Where entries are kept."""
    return options.cache_dir.expanduser() if options.cache_dir else default_folder()


class Entry(ABC, Generic[_Content]):
    """One folder.

    Args:
        name: how its folder's name starts.
        source: the images.
        revision: the source's.
        options: what else the content depends on.
        folder: where entries are kept.
        log: receives progress and what stands in the way.
    """

    def __init__(self, name: str, source: Source, revision: str, options: object, folder: Path, log: Log) -> None:
        self.source = source
        self.revision = revision
        self.log = log
        codecs = [version("torchvision"), version("pillow")]
        key = json.dumps([CACHE_VERSION, revision, len(source), options, codecs])
        self.path = folder / f"{name}-{hashlib.blake2b(key.encode(), digest_size=16).hexdigest()}"

    @property
    @abstractmethod
    def needed_bytes(self) -> int:
        """About how much room the entry takes."""

    @abstractmethod
    def find(self) -> _Content | None:
        """What an earlier run has kept; None if there is nothing, or it is damaged."""

    @abstractmethod
    def write(self, folder: Path) -> None:
        """Make the content in an empty folder."""

    def find_or_build(self) -> _Content | None:
        """What is kept, or what is made and kept now; None if it cannot be kept, which is logged.

        Only one process builds an entry; others wait for it.
        """
        found = self.find()
        if found is not None:
            return found
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock = self.path.with_name(f"{self.path.name}.lock")
            with locked(lock, self.log, "decodes the same images") as alone:
                return self.find() or self._build(alone)
        except OSError as error:
            reason = write_failure(error, self.path) or str(error)
            self.log(f"decoded images are not kept in {self.path.parent}: {reason}")
            return None

    def _build(self, alone: bool) -> _Content | None:
        """Make everything in a folder of another name, which then gets its own.

        Args:
            alone: no other process builds this entry, so what is half-built is left over from one that was ended.
        """
        if alone:
            for abandoned in self.path.parent.glob(f"{self.path.name}.*.partial"):
                shutil.rmtree(abandoned, ignore_errors=True)
        if not self._has_room():
            return None
        partial = self.path.with_name(f"{self.path.name}.{uuid4().hex}.partial")
        partial.mkdir()
        try:
            self.write(partial)
            if self.source.revision() != self.revision:
                self.log("decoded images are not kept: files changed while they were read")
                return None
            if (finished := self.find()) is not None:  # where locks do not work, another process may be faster
                return finished
            if self.path.exists():
                self.log(f"{self.path} was damaged and is replaced")
                shutil.rmtree(self.path, ignore_errors=True)
            partial.rename(self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        return self.find()

    def _has_room(self) -> bool:
        free = shutil.disk_usage(self.path.parent).free
        if free >= self.needed_bytes + _SPARED:
            return True
        need = f"{self.needed_bytes >> 20} MiB and {_SPARED >> 20} MiB to spare, {free >> 20} MiB are free"
        self.log(f"decoded images are not kept in {self.path.parent}, which is too full: they take {need}")
        return False


def write_synced(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
