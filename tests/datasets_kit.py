"""Small image files for tests of data sets."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
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


def write_noise(path: Path, number: int, size: tuple[int, int] = (16, 16)) -> Path:
    """An image that no other number gives; ``size`` is width and height."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def write_classes(root: Path, counts: dict[str, int], size: tuple[int, int] = (16, 16), first: int = 0) -> Path:
    """Folders of PNG or JPEG files, by their pattern: ``{"train/cat/{}.png": 3}``; all images differ."""
    number = first
    for pattern, count in counts.items():
        for place in range(count):
            write_noise(root / pattern.format(place), number, size)
            number += 1
    return root
