"""What files look like from outside: a digest that changes when one of them may hold something else."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping

import numpy as np

from sslbench.data.imagefile import threaded
from sslbench.data.paths import PathTable

_GONE = (-1, -1, -1)


def file_state(path: str) -> tuple[int, int, int]:
    """Size, and the times of the last change of contents and of anything, in nanoseconds; links are followed.

    The second time cannot be set by a program. So a file that is replaced by one of the same size and date
    (``cp -p``, ``rsync -a``, unpacking an archive) is another one too.
    """
    try:
        about = os.stat(path)
    except OSError:
        return _GONE
    return about.st_size, about.st_mtime_ns, about.st_ctime_ns


def files_revision(tables: Mapping[str, PathTable]) -> str:
    """Hex digest of places, names, sizes and times of all files, by one look at each and none into it.

    On a local disk a look takes some 6 microseconds, so the 1.28 million of ImageNet take 8 seconds.
    """
    state = hashlib.blake2b(digest_size=16)
    for key, table in tables.items():
        root = os.path.abspath(table.root)
        # Strings, because making a Path takes longer than looking.
        paths = [f"{root}/{name}" for name in table.names()]
        state.update(f"{key}\0{root}\0".encode(errors="surrogateescape"))
        state.update("\0".join(paths).encode(errors="surrogateescape"))
        state.update(np.array(list(threaded(file_state, paths)), np.int64).tobytes())
    return state.hexdigest()
