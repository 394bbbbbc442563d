"""Several files mapped into memory side by side, as one read-only tensor."""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

GRANULARITY = mmap.ALLOCATIONGRANULARITY
_FIXED = 0x10
"""MAP_FIXED, which Python's module does not name; the same number on Linux and macOS."""
_FAILED = ctypes.c_void_p(-1).value


def map_files(files: Sequence[tuple[Path, int]], dim: int) -> Tensor:
    """The beginnings of some files as one float32 tensor ``[N,D]``, in memory that the system can take back.

    Python and torch map one file at a time. Here a range of addresses is reserved and each file laid over its
    part, so a table needs no second copy in one piece. Writing to the tensor would end the process.

    Args:
        files: each with the bytes that are taken from its beginning: multiples of ``GRANULARITY`` but for the
            last.
        dim: D.

    Raises:
        OSError: a file cannot be opened or mapped, or is shorter.
    """
    total = sum(size for _, size in files)
    if total == 0:
        return torch.empty(0, dim)
    base = _map(None, total, 0, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0), -1)
    buffer: Any = (ctypes.c_char * total).from_address(base)
    weakref.finalize(buffer, _c().munmap, ctypes.c_void_p(base), ctypes.c_size_t(total)).atexit = False
    end = base
    for path, size in files:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < size:
                raise OSError(f"{path} is cut off")
            _map(end, size, mmap.PROT_READ, mmap.MAP_SHARED | _FIXED, file.fileno())
        end += size
    return torch.from_numpy(np.frombuffer(buffer, np.float32).reshape(-1, dim))


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found: int | None = _c().mmap(address, size, protection, flags, descriptor, 0)
    if found is None or found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return found


def _c() -> ctypes.CDLL:
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
    return library
