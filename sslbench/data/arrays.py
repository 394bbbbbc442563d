"""Files of arrays, which may lie beside data that somebody else has packed."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray


def read_arrays(file: Path) -> dict[str, NDArray[Any]]:
    """The arrays that ``numpy.savez`` wrote.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged, holds objects, or is compressed, as ``savez`` never does: a few kilobytes could
            then unpack to all of the memory.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError(f"{file} is compressed")
        with np.load(file, allow_pickle=False) as arrays:
            return {name: arrays[name] for name in arrays.files}
    except (KeyError, EOFError, zipfile.BadZipFile, MemoryError, SyntaxError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
