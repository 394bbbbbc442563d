"""Tar archives of images (shards): finding them, and an index of what each holds."""

from __future__ import annotations

import glob
import hashlib
import logging
import os
import re
import tarfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from sslbench.data.arrays import read_arrays
from sslbench.data.entry import default_folder
from sslbench.errors import DataError

logger = logging.getLogger(__name__)

IMAGES = frozenset({"jpg", "jpeg", "png", "webp"})
_LABEL_DIGITS = 6
"""A class number as large as memory would make as many classes."""
INDEX_VERSION = 1
"""Part of every index file. Bump it when the same archive may give another index."""

_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


class ShardIndex(NamedTuple):
    """Where the images of one archive are."""

    names: tuple[str, ...]
    """Of the image members, in the order of the archive."""
    offsets: NDArray[np.int64]
    """``[N]``: first byte of each image."""
    sizes: NDArray[np.int64]
    """``[N]``: bytes of each image."""
    labels: NDArray[np.int64]
    """``[N]``: class numbers from the members KEY.cls; -1 without one."""


def find_shards(patterns: Sequence[str]) -> list[Path]:
    """The archives that paths, brace expressions (``{000..146}``, ``{a,b}``) and wildcards name, in that order.

    Raises:
        DataError: naming those that do not exist.
    """
    paths = [Path(path) for pattern in patterns for text in expand_braces(pattern) for path in _matches(text)]
    missing = [str(path) for path in paths if not path.is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(paths)} shards do not exist: {', '.join(missing[:3])}",
            hint="dataset.shards=/PATH/train-{000000..000146}.tar, or wildcards, or a list",
        )
    return paths


def expand_braces(text: str) -> list[str]:
    """``a{08..10}`` to a08, a09, a10; ``a{x,y}`` to ax, ay."""
    found = re.search(r"\{([^{}]*)\}", text)
    if not found:
        return [text]
    limits = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if limits:
        numbers = range(int(limits[1]), int(limits[2]) + 1)
        items = [str(number).zfill(len(limits[1])) for number in numbers]
    else:
        items = found[1].split(",")
    return [text[: found.start()] + item + rest for item in items for rest in expand_braces(text[found.end() :])]


def _matches(text: str) -> list[str]:
    path = os.path.expanduser(text)
    if not glob.has_magic(path):
        return [path]
    return sorted(glob.glob(path)) or [path]


def kept_index(shard: Path) -> ShardIndex | None:
    """The index of an archive, from its file beside the archive or in the cache folder; None if there is none.

    A file counts only for the size and the time stamp that the archive has now.
    """
    stamp = _stamp(shard)
    found = (_load_index(place, stamp) for place in _index_files(shard))
    return next((index for index in found if index is not None), None)


def read_index(shard: Path) -> ShardIndex:
    """The index of an archive: the one that is kept, else one that is made and kept now.

    Raises:
        DataError: the archive is compressed, damaged, or holds something else.
    """
    kept = kept_index(shard)
    if kept is not None:
        return kept
    stamp, places = _stamp(shard), _index_files(shard)
    index = _scan(shard)
    for place in places:
        if _save_index(index, stamp, place):
            break
    return index


def _stamp(shard: Path) -> NDArray[np.int64]:
    about = shard.stat()
    return np.array([INDEX_VERSION, about.st_size, about.st_mtime_ns])


def _index_files(shard: Path) -> tuple[Path, Path]:
    """Beside the archive; where that folder cannot be written, in the user's cache."""
    name = hashlib.blake2b(os.fsencode(shard.resolve()), digest_size=16).hexdigest()
    return shard.with_name(f".{shard.name}.index.npz"), default_folder() / "shards" / f"{name}.npz"


def _load_index(file: Path, stamp: NDArray[np.int64]) -> ShardIndex | None:
    """None if there is none, it is damaged, or the archive has changed."""
    try:
        arrays = read_arrays(file)
        if not np.array_equal(arrays["stamp"], stamp):
            return None
        names = arrays["names"].tobytes().decode(errors="surrogateescape").split("\0")[:-1]
        index = ShardIndex(tuple(names), arrays["offsets"], arrays["sizes"], arrays["labels"])
    except (OSError, ValueError, KeyError):
        return None
    return index if _is_sound(index, int(stamp[1])) else None


def _is_sound(index: ShardIndex, archive_bytes: int) -> bool:
    """Whether it speaks of the archive: its file may have come along with somebody else's data."""
    _, offsets, sizes, labels = index
    if any(part.dtype != np.int64 or part.shape != (len(index.names),) for part in index[1:]):
        return False
    inside = (offsets >= 0) & (sizes >= 0) & (sizes <= archive_bytes) & (offsets <= archive_bytes - sizes)
    return bool(inside.all() and ((labels >= -1) & (labels < 10**_LABEL_DIGITS)).all())


def _save_index(index: ShardIndex, stamp: NDArray[np.int64], file: Path) -> bool:
    """Whether it could be written."""
    names = "".join(f"{name}\0" for name in index.names).encode(errors="surrogateescape")
    arrays = index._asdict() | {"names": np.frombuffer(names, np.uint8), "stamp": stamp}
    partial = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, **arrays)
        partial.replace(file)
    except OSError as error:
        logger.debug("the index of a shard was not kept as %s: %s", file, error)
        with suppress(OSError):
            partial.unlink()
        return False
    return True


def _scan(shard: Path) -> ShardIndex:
    """Read the headers of an archive once."""
    images: list[tuple[str, int, int]] = []
    labels: dict[str, int] = {}
    try:
        with tarfile.open(shard, "r:", errors="surrogateescape") as archive:
            for member in archive:
                key, extension = _key(member.name)
                if not member.isreg() or member.issparse():
                    continue
                if extension in IMAGES:
                    images.append((member.name, member.offset_data, member.size))
                elif extension == "cls":
                    labels[key] = _label(archive, member, shard)
            _check_end(archive)
    except (tarfile.TarError, EOFError) as error:
        raise DataError(_why(shard, error)) from error
    names = tuple(name for name, _, _ in images)
    places = np.array([place for _, *place in images], np.int64).reshape(-1, 2)
    known = np.array([labels.get(_key(name)[0], -1) for name in names], np.int64)
    return ShardIndex(names, places[:, 0], places[:, 1], known)


def _check_end(archive: tarfile.TarFile) -> None:
    """``tarfile`` takes a header that is cut off or damaged for the end; an archive ends with zeros."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    if archive.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"it breaks off at byte {archive.offset}")


def _key(name: str) -> tuple[str, str]:
    """What the members of one sample share, and the rest: the base name is split at its first dot."""
    folder, slash, base = name.rpartition("/")
    key, _, extension = base.partition(".")
    return f"{folder}{slash}{key}", extension.lower()


def _label(archive: tarfile.TarFile, member: tarfile.TarInfo, shard: Path) -> int:
    content = archive.extractfile(member)
    text = content.read(32) if content else b""
    if not re.fullmatch(rb"\s*\d{1,%d}\s*" % _LABEL_DIGITS, text):
        raise DataError(f"{shard}: {member.name} holds {text!r}, not a class number")
    return int(text)


def _why(shard: Path, error: Exception) -> str:
    with shard.open("rb") as file:
        start = file.read(8)
    for magic, kind in _COMPRESSED.items():
        if start.startswith(magic):
            return f"{shard} is compressed ({kind}), so single images cannot be reached: unpack it to a plain .tar"
    return f"{shard} is not a whole tar archive: {error}"
