"""Small image files for tests of data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

DECODER_WARNING = "ignore:The image decoding and encoding:DeprecationWarning"


def write_image(path: Path, colour: int = 0, size: tuple[int, int] = (12, 12)) -> Path:
    """A JPEG or PNG of one colour; ``size`` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (colour % 256, 40, 120)).save(path, "PNG" if path.suffix == ".png" else "JPEG")
    return path


def link_images(original: Path, paths: Iterable[Path]) -> None:
    """Many names of one image."""
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        os.link(original, path)
