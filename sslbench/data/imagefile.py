"""Image files: measuring, decoding and hashing them."""

from __future__ import annotations

import hashlib
import io
import os
import stat
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import IO, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError, features
from torch import Tensor

from sslbench.cores import usable_cores
from sslbench.data.paths import PathTable
from sslbench.errors import DataError

_TORCHVISION = frozenset({".jpg", ".jpeg", ".webp"})
_FORMATS = ("JPEG", "PNG", "PPM", "BMP", "GIF", "TIFF", *(["WEBP"] if features.check("webp") else []))
"""What Pillow may take a file for: among its others is EPS, for which it starts a PostScript interpreter."""
_MOST_PIXELS = 178_956_970
"""From here on Pillow refuses too: a file of a few kilobytes can be a picture of many gigabytes."""
_RGB = 3
"""``torchvision.io.ImageReadMode.RGB``"""
_PER_TASK = 32
_MANY_FILES = 20_000
_MOST_FILES = 100_000
_SAMPLED_FILES = 4096
_MANY_BYTES = 2 << 30
_SAMPLED_BYTES = 64 << 10

_In = TypeVar("_In")
_Out = TypeVar("_Out")


def threaded(function: Callable[[_In], _Out], items: Sequence[_In]) -> Iterator[_Out]:
    """``map`` in a pool of threads, in order."""

    def run(start: int) -> list[_Out]:
        return [function(item) for item in items[start : start + _PER_TASK]]

    # Small files cost less than a task of a pool, hence a few dozen per task.
    with ThreadPoolExecutor(min(16, usable_cores())) as pool:
        for results in pool.map(run, range(0, len(items), _PER_TASK)):
            yield from results


def read_bytes(path: Path) -> NDArray[np.uint8]:
    """The bytes of an image file.

    Raises:
        DataError: naming the file.
    """
    try:
        check_regular(path)
        return np.fromfile(path, np.uint8)
    except OSError as error:
        raise _unreadable(str(path), error) from error


def decode_image(content: NDArray[np.uint8], name: str) -> Tensor:
    """Decode the bytes of an image file to uint8 ``[3,H,W]`` RGB.

    Alpha is dropped, 16-bit values are cut to their high byte.

    Args:
        name: for messages; its ending chooses the decoder that is tried first.

    Raises:
        DataError: naming the image.
    """
    if not len(content):
        raise _unreadable(name, ValueError("it is empty"))
    try:
        fast = _torchvision_decoder() if os.path.splitext(name)[1].lower() in _TORCHVISION else None
        fast = fast if _check_pixels(content) else None
        image = fast(torch.from_numpy(content)) if fast else None
        return _decode_pil(content) if image is None else image
    except (OSError, ValueError, RuntimeError, SyntaxError, Image.DecompressionBombError) as error:
        raise _unreadable(name, error) from error


def check_regular(path: Path) -> None:
    """Refuse pipes and devices, such as a link to ``/dev/zero`` that is called an image: reading has no end there.

    Raises:
        OSError: it is none or there is nothing.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError("it is no regular file")


def _check_pixels(content: NDArray[np.uint8]) -> bool:
    """Whether torchvision may decode it: a JPEG or WebP that is not malformed.

    A PNG with a wrong bit in its pixels takes the process down with torchvision 0.29, without an exception.

    Raises:
        ValueError: its header announces too many pixels.
    """
    start = content[:24].tobytes()
    is_png = start[:8] == b"\x89PNG\r\n\x1a\n"
    if is_png and start[12:16] == b"IHDR" and len(start) == 24:
        width, height = struct.unpack(">II", start[16:])
    elif start[:2] == b"\xff\xd8":
        height, width = _jpeg_size(content.data)
    else:
        height, width = image_size(io.BytesIO(content.data)) if start[8:12] == b"WEBP" else (0, 0)
    if height * width > _MOST_PIXELS:
        raise ValueError(f"{width}x{height} pixels are more than the {_MOST_PIXELS} that are decoded")
    return bool(height * width) and not is_png


def _jpeg_size(data: memoryview) -> tuple[int, int]:
    """Height and width from the first frame header; zeros if it is not where the standard wants it."""
    place = 2
    while place + 9 < len(data) and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == 0xFF:
            place += 1
        elif 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            height, width = struct.unpack(">HH", data[place + 5 : place + 9])
            return height, width
        elif 0xD0 <= marker <= 0xD9 or marker == 0x01:  # without a length
            place += 2
        else:
            place += 2 + int.from_bytes(data[place + 2 : place + 4], "big")
    return 0, 0


def _unreadable(name: str, error: Exception) -> DataError:
    # Pillow names the object in memory that it read from, which tells nobody anything.
    reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
    return DataError(f"cannot read image {name}: {reason}", hint="repair or remove the file")


@lru_cache(maxsize=1)
def _torchvision_decoder() -> Callable[[Tensor], Tensor | None] | None:
    """torchvision's decoder, 1.4 to 2 times as fast as PIL; None in a torchvision that no longer has it."""
    try:
        torch.ops.load_library(_torchvision_library())  # type: ignore[no-untyped-call]
        decode = torch.ops.image.decode_image
    except (ImportError, OSError, AttributeError):
        return None

    def decoded(content: Tensor) -> Tensor | None:
        try:
            image: Tensor = decode(content, _RGB, False)
        except RuntimeError:
            return None  # a format under a wrong name or a rare JPEG, which PIL may read
        if image.dim() != 3:
            return None  # an animation, of which PIL gives the first picture
        return (image.to(torch.int32) >> 8).to(torch.uint8) if image.dtype == torch.uint16 else image

    return decoded


def _torchvision_library() -> Path:
    """The library that ``torchvision.io`` loads, without the rest of torchvision.

    To import that takes over a second, and each worker process of each loader would do it again.
    """
    package = find_spec("torchvision")
    if package is None or package.origin is None:
        raise ImportError("torchvision is not installed")
    for path in Path(package.origin).parent.glob("image*.so"):
        return path
    raise ImportError("torchvision has no image library")


def _decode_pil(content: NDArray[np.uint8]) -> Tensor:
    with Image.open(io.BytesIO(content.tobytes()), formats=_FORMATS) as image:
        if image.mode.startswith("I"):
            # PIL's own conversion clips 16-bit values at 255 instead of scaling them.
            values = (np.asarray(image).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            pixels = np.broadcast_to(values[..., None], (*values.shape, 3))
        else:
            pixels = np.asarray(image.convert("RGB"))
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def image_size(file: Path | IO[bytes]) -> tuple[int, int]:
    """Height and width from a file's header; (0, 0) if it cannot be read."""
    try:
        if isinstance(file, Path):
            check_regular(file)
        with Image.open(file, formats=_FORMATS) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0


def digest_files(tables: Mapping[str, PathTable], *, folders: bool = True) -> str:
    """Hex digest of the files' names and contents, never of dates or of where they lie.

    It has to be quick, since every run takes it. Up to 20,000 files and 2 GiB it covers names and whole contents;
    up to 100,000 files names, sizes and the first 64 KiB of each; beyond that (COCO, ImageNet) the names of all,
    and size and first 64 KiB of about 4,000 files spread evenly over the list. A changed pixel in another file of
    so large a set goes unnoticed; a file that is added, missing or renamed does not.

    Args:
        tables: by a name that becomes part of the digest, such as the split's.
        folders: whether the names include the folders below the table's root.
    """
    state = hashlib.blake2b(digest_size=16)
    total = sum(len(table) for table in tables.values())
    step = -(-total // _SAMPLED_FILES) if total > _MOST_FILES else 1
    content = _digest_start if total > _MANY_FILES or _are_large(tables.values()) else _digest_file
    for key, table in tables.items():
        for name in table.names() if folders else table.basenames():
            state.update(f"{key}/{name}\0".encode(errors="surrogateescape"))
        for part in threaded(content, table[::step]):
            state.update(part)
    return state.hexdigest()


def _are_large(tables: Iterable[PathTable]) -> bool:
    return sum(sum(threaded(_file_size, table)) for table in tables) > _MANY_BYTES


def _file_size(path: Path) -> int:
    return path.stat().st_size


def digest_whole(root: Path, paths: Sequence[Path]) -> str:
    """Hex digest of names relative to ``root`` and whole contents, for a few large files."""
    state = hashlib.blake2b(digest_size=16)
    for path, part in zip(paths, threaded(_digest_file, paths), strict=True):
        state.update(f"{path.relative_to(root).as_posix()}\0".encode() + part)
    return state.hexdigest()


def _digest_file(path: Path) -> bytes:
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "blake2b").digest()


def _digest_start(path: Path) -> bytes:
    """Of a file's size and its first 64 KiB."""
    check_regular(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return hashlib.blake2b(file.read(_SAMPLED_BYTES) + str(size).encode()).digest()
