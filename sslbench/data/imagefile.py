"""Image files: finding, measuring, decoding and hashing them."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sslbench.errors import DataError

EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp"})
_TORCHVISION = frozenset({".jpg", ".jpeg", ".png", ".webp"})
_PER_TASK = 32
_MANY_FILES = 20_000
_MANY_BYTES = 2 << 30
_SAMPLED_BYTES = 64 << 10

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threaded(function: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """``map`` in a pool of threads, in order."""

    def run(part: Sequence[_In]) -> list[_Out]:
        return [function(item) for item in part]

    # Small files cost less than a task of a pool, hence a few dozen per task.
    parts = [items[start : start + _PER_TASK] for start in range(0, len(items), _PER_TASK)]
    with ThreadPoolExecutor(min(16, cores())) as pool:
        for results in pool.map(run, parts):
            yield from results


def find_images(folder: Path) -> list[Path]:
    """Image files below ``folder``, in a fixed order; hidden files and folders are ignored, links are followed."""
    found: list[Path] = []
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(parent, name) for name in sorted(files) if _is_image(name)]
    return found


def _is_image(name: str) -> bool:
    return not name.startswith(".") and os.path.splitext(name)[1].lower() in EXTENSIONS


def read_image(path: Path) -> Tensor:
    """Decode a file to uint8 ``[3,H,W]`` RGB. Alpha is dropped, 16-bit values are cut to their high byte.

    Raises:
        DataError: naming the file.
    """
    fast = _torchvision_decoder() if path.suffix.lower() in _TORCHVISION else None
    try:
        image = fast(path) if fast else None
        return _decode_pil(path) if image is None else image
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"cannot read image {path}: {error}", hint="repair or remove the file") from error


@lru_cache(maxsize=1)
def _torchvision_decoder() -> Callable[[Path], Tensor | None] | None:
    """torchvision's decoder, 1.4 to 2 times as fast as PIL; None in a torchvision that no longer has it."""
    try:
        from torchvision.io import ImageReadMode, decode_image, read_file
    except ImportError:
        return None
    warnings.filterwarnings("ignore", message="The image decoding and encoding", category=DeprecationWarning)

    def decode(path: Path) -> Tensor | None:
        try:
            image: Tensor = decode_image(read_file(str(path)), mode=ImageReadMode.RGB)
        except RuntimeError:
            return None  # a format under a wrong name or a rare JPEG, which PIL may read
        return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image

    return decode


def _decode_pil(path: Path) -> Tensor:
    with Image.open(path) as image:
        if image.mode.startswith("I"):
            # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
            values = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            pixels = np.broadcast_to(values[..., None], (*values.shape, 3))
        else:
            pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def image_size(path: Path) -> tuple[int, int]:
    """Height and width from the file's header; (0, 0) if it cannot be read."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0


def digest_files(root: Path, paths: Sequence[Path]) -> str:
    """Hex digest of names relative to ``root``, sizes and contents.

    Beyond 20,000 files or 2 GiB only the first 64 KiB of each file are read, so that a large data set takes
    seconds to minutes, not hours.
    """
    sizes = list(threaded(lambda path: path.stat().st_size, paths))
    sampled = len(paths) > _MANY_FILES or sum(sizes) > _MANY_BYTES
    return _digest(root, paths, _digest_start if sampled else _digest_file)


def digest_whole(root: Path, paths: Sequence[Path]) -> str:
    """Hex digest of names relative to ``root`` and whole contents, for a few large files."""
    return _digest(root, paths, _digest_file)


def _digest(root: Path, paths: Sequence[Path], content: Callable[[Path], bytes]) -> str:
    state = hashlib.blake2b(digest_size=16)
    for path, part in zip(paths, threaded(content, paths), strict=True):
        state.update(f"{path.relative_to(root).as_posix()}\0".encode() + part)
    return state.hexdigest()


def _digest_file(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _digest_start(path: Path) -> bytes:
    """Of a file's size and its first 64 KiB."""
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return hashlib.blake2b(file.read(_SAMPLED_BYTES) + str(size).encode()).digest()
