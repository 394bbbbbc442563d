"""Parts of a labelled training set: a balanced percentage, or the names in a published list."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from sslbench.data.paths import PathTable
from sslbench.errors import DataError

_NAMED = 5


def balanced_subset(
    paths: PathTable, targets: NDArray[np.int64], classes: Sequence[str], percent: int
) -> NDArray[np.int64]:
    """Choose a percentage of the images, nearly the same number of each class, by a hash of their names.

    The whole choice has ``N * percent // 100`` images (12,811 and 128,116 of ImageNet's 1,281,167, as the lists
    published with SimCLR have). Classes get equal shares, and what is left goes to the classes of the smallest
    hash, one image each. Within a class the images of the smallest hash of CLASS/NAME are taken. So the choice
    depends on names only and is the same everywhere.

    Args:
        paths: below class folders.
        targets: int64 ``[N]``.

    Returns:
        int64 numbers of the chosen files, ascending.
    """
    wanted = _shares(len(paths) * percent // 100, classes)
    counts = np.bincount(targets, minlength=len(classes))
    hashes = np.fromiter(map(_hash, _names(paths)), np.uint64, len(paths))
    by_class = np.lexsort((hashes, targets))
    place = np.arange(len(paths)) - np.repeat(counts.cumsum() - counts, counts)
    return np.sort(by_class[place < np.repeat(wanted, counts)])


def _shares(total: int, classes: Sequence[str]) -> NDArray[np.int64]:
    """How many images each class gives: at least one."""
    share, left = divmod(total, len(classes))
    shares = np.full(len(classes), share, np.int64)
    shares[np.argsort([_hash(name) for name in classes], kind="stable")[:left]] += 1
    return shares.clip(min=1)


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).digest())


def _names(paths: PathTable) -> Iterator[str]:
    """Class folder and base name of each file."""
    tops = paths.tops()
    return (f"{tops[folder]}/{name}" for folder, name in zip(paths.folder, paths.basenames(), strict=True))


def listed_subset(paths: PathTable, file: Path) -> NDArray[np.int64]:
    """Choose the images that a file names, one ``CLASS_REST`` a line, in folders named ``CLASS``.

    Returns:
        int64 numbers of the chosen files, ascending.

    Raises:
        DataError: the file cannot be read, is empty, or names images that are not there.
    """
    try:
        lines = file.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read the list of images {file}: {error}",
            hint="dataset.subset=none, 1%, 10% or a file of names",
        ) from error
    wanted = {f"{name.partition('_')[0]}/{name}" for name in lines}
    found = {name: number for number, name in enumerate(_names(paths)) if name in wanted}
    missing = sorted(wanted - found.keys())
    if missing or not found:
        named = ", ".join(missing[:_NAMED]) or "no names"
        raise DataError(f"{file} lists {len(missing)} images that are not below {paths.root}: {named}")
    return np.array(sorted(found.values()), np.int64)
