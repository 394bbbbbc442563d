"""Data sets whose files lie under a root and can be fetched by torchvision."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from sslbench.config.options import cosmetic
from sslbench.errors import DataError
from sslbench.plugin.api import Options


class DownloadOptions(Options):
    """Options of data sets that can be downloaded."""

    root: Path = cosmetic(...)
    """Folder that holds, or will hold, the unpacked files."""
    download: bool = cosmetic(False)
    """Download into the root if files are missing."""


def require_files(
    name: str, options: DownloadOptions, folder: str, files: Sequence[str], download: Callable[[Path], object]
) -> Path:
    """Make sure that a data set's files are there.

    Args:
        name: of the data set, for messages.
        options: where to look and whether to download.
        folder: below the root.
        files: that must be in ``folder``.
        download: fetches and verifies them, given the root.

    Returns:
        The folder with the files.

    Raises:
        DataError: naming what is missing and the layout that is expected.
    """
    root = options.root.expanduser()
    base = root / folder
    missing = [file for file in files if not (base / file).is_file()]
    if missing and options.download:
        _download(name, root, download)
        missing = [file for file in files if not (base / file).is_file()]
    if missing:
        raise DataError(
            f"data set '{name}': missing under {base}: {', '.join(missing)}; expected layout: "
            f"{root.name or root}/{folder}/{{{','.join(files)}}}",
            hint="dataset.download=true fetches them, dataset.root=PATH looks elsewhere",
        )
    return base


@contextmanager
def _confined() -> Iterator[None]:
    """Archives that torchvision unpacks meanwhile cannot write outside their folder, nor make links and devices.

    Python does so by itself from 3.14 on.
    """
    before = tarfile.TarFile.extraction_filter
    tarfile.TarFile.extraction_filter = staticmethod(tarfile.data_filter)
    try:
        yield
    finally:
        tarfile.TarFile.extraction_filter = before


def _download(name: str, root: Path, download: Callable[[Path], object]) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _confined():
            download(root)
    except (OSError, RuntimeError, tarfile.TarError) as error:
        raise DataError(
            f"data set '{name}' could not be downloaded to {root}: {error}",
            hint="check the network, or unpack the archive there by hand",
        ) from error
