"""Small tables about files that take long to make, kept from one run to the next."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from sslbench.data.arrays import read_arrays
from sslbench.data.entry import default_folder
from sslbench.data.locking import locked_if_possible

logger = logging.getLogger(__name__)

WORTH_KEEPING = 2000
"""Files from which on a table is kept: half a second's work."""
TABLE_VERSION = 1
"""Part of every file's name. Bump it when the same files may give another table."""


def kept(
    kind: str, revision: Callable[[], str | None], make: Callable[[], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """A table that was kept for this revision, or that is made and kept now.

    Args:
        kind: what the table says; part of its file's name.
        revision: of the files; asked again after making, since a file may change meanwhile.

    Of several processes one makes it, the others wait for it.
    """
    before = revision()
    if before is None:
        return make()
    file = default_folder() / "tables" / f"{kind}-v{TABLE_VERSION}-{before}.npz"
    table = _load(file)
    if table is not None:
        return table
    with locked_if_possible(file.with_suffix(".lock"), logger.info, f"looks at the same files for their {kind}"):
        table = _load(file)
        if table is None:
            table = make()
            if revision() == before:
                _save(table, file)
    return table


def _load(file: Path) -> NDArray[np.int64] | None:
    """None if there is none or it is damaged."""
    try:
        arrays = read_arrays(file)
        table = np.asarray(arrays["table"], np.int64)
        return table if arrays["digest"].tobytes() == _digest(table) else None
    except (OSError, ValueError, KeyError):
        return None


def _digest(table: NDArray[np.int64]) -> bytes:
    return hashlib.blake2b(f"{table.shape}".encode() + table.tobytes(), digest_size=16).digest()


def _save(table: NDArray[np.int64], file: Path) -> None:
    partial = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, table=table, digest=np.frombuffer(_digest(table), np.uint8))
        partial.replace(file)
    except OSError as error:
        logger.debug("a table was not kept as %s: %s", file, error)
        with suppress(OSError):
            partial.unlink()
