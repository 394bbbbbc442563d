"""The images of a benchmark: real ones decoded once, or textures, in a file that all programs read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SUFFIXES = {".jpg", ".jpeg", ".png"}


@contextmanager
def image_file(folder: Path | None, count: int, side: int) -> Iterator[Path]:
    """A file of uint8 ``[N,H,W,3]``, as torchvision's CIFAR10 holds its images.

    Args:
        folder: images of one size, at any depth, of which the first ``count`` (by name) are taken; None: textures.
        count: how many.
        side: of the textures in pixels.
    """
    with tempfile.TemporaryDirectory(prefix="sslbench-images-") as scratch:
        path = Path(scratch, "images.npy")
        np.save(path, decode(folder, count) if folder else textures(count, side))
        yield path


def decode(folder: Path, count: int) -> NDArray[np.uint8]:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)[:count]
    if not files:
        raise SystemExit(f"no images below {folder}")
    with ThreadPoolExecutor() as pool:
        return np.stack(list(pool.map(_read, files)))


def _read(path: Path) -> NDArray[np.uint8]:
    return np.asarray(Image.open(path).convert("RGB"))


def textures(count: int, side: int, seed: int = 0) -> NDArray[np.uint8]:
    """Coloured clouds with some grain: gradients and edges of all directions, which noise alone lacks."""
    generator = np.random.default_rng(seed)
    clouds = generator.integers(0, 256, (min(count, 512), 5, 5, 3), dtype=np.uint8)
    large = np.stack(
        [np.asarray(Image.fromarray(cloud).resize((side, side), Image.Resampling.BICUBIC)) for cloud in clouds]
    )
    chosen = large[generator.integers(0, len(large), count)]
    grain = generator.integers(0, 32, (count, side, side, 1), dtype=np.uint8)
    return np.where(chosen > 223, chosen, chosen + grain).astype(np.uint8)


def write_photos(folder: Path, count: int, side: int) -> None:
    """Textures as JPEG files, two classes, for what decodes files."""
    for number, pixels in enumerate(textures(count, side)):
        path = folder / "train" / f"class{number % 2}" / f"{number:05d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)
