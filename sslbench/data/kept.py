"""Small tables about files that take long to make, kept from one run to the next."""

from __future__ import annotations

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import numpy as np
from numpy.typing import NDArray

from sslbench.data.arrays import read_arrays
from sslbench.data.entry import default_folder

logger = logging.getLogger(__name__)

WORTH_KEEPING = 2000
"""Files from which on a table is kept: half a second's work."""


def kept(
    kind: str, revision: Callable[[], str | None], make: Callable[[], NDArray[np.int64]]
) -> NDArray[np.int64]:
    """A table that was kept for this revision, or that is made and kept now.

    Args:
        kind: what the table says; part of its file's name.
        revision: of the files; asked again after making, since a file may change meanwhile.
    """
    before = revision()
    if before is None:
        return make()
    file = default_folder() / "tables" / f"{kind}-{before}.npz"
    table = _load(file)
    if table is not None:
        return table
    table = make()
    if revision() == before:
        _save(table, file)
    return table


def _load(file: Path) -> NDArray[np.int64] | None:
    """None if there is none or it is damaged."""
    try:
        return np.asarray(read_arrays(file)["table"], np.int64)
    except (OSError, ValueError, KeyError):
        return None


def _save(table: NDArray[np.int64], file: Path) -> None:
    partial = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as stream:
            np.savez(stream, table=table)
        partial.replace(file)
    except OSError as error:
        logger.debug("a table was not kept as %s: %s", file, error)
        with suppress(OSError):
            partial.unlink()
