"""The files of a data set in a temporary folder, where they can be changed and damaged."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslbench.plugin.api import Options
from sslbench.testing.rules import NotTriedError

MOST_FILES = 2_000
MOST_BYTES = 16 << 20


@dataclass
class Elsewhere:
    """Copies of the folders that options name."""

    options: Options
    """That name the copies."""
    folders: dict[Path, Path]
    """From each original to its copy."""

    @classmethod
    def copy(cls, cfg: Options, target: Path) -> Elsewhere:
        """
        Raises:
            NotTriedError: the options name no folder, or one that is too large.
        """
        folders = {folder: target / str(number) for number, folder in enumerate(named_folders(cfg))}
        for original, place in folders.items():
            check_small(original)
            shutil.copytree(original, place)
        return cls(moved(cfg, folders), folders)

    @property
    def files(self) -> list[Path]:
        """All of the copies, in a fixed order; hidden ones are what data sets keep for themselves."""
        found = (path for folder in self.folders.values() for path in sorted(folder.rglob("*")))
        return [path for path in found if path.is_file() and not path.name.startswith(".")]

    def file_in(self, text: str) -> Path | None:
        """The file of a copy whose path ``text`` is."""
        path = Path(text)
        below = any(path.is_relative_to(folder) for folder in self.folders.values())
        return path if below and path.is_file() else None


@contextmanager
def changed(contents: dict[Path, bytes]) -> Iterator[None]:
    """Files hold something else for a while."""
    originals = {path: path.read_bytes() for path in contents}
    try:
        for path, content in contents.items():
            path.write_bytes(content)
        yield
    finally:
        for path, content in originals.items():
            path.write_bytes(content)


def moved(cfg: Options, folders: dict[Path, Path]) -> Options:
    """Options in which every path below one of the folders is below another one."""

    def move(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: move(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [move(inner) for inner in value]
        return _moved(value, folders) if _names_a_path(value) else value

    return type(cfg).model_validate(move(cfg.model_dump()))


def _moved(value: str | Path, folders: dict[Path, Path]) -> str | Path:
    path = os.path.abspath(os.path.expanduser(value))
    for original, place in folders.items():
        if Path(path).is_relative_to(original):
            return type(value)(place / Path(path).relative_to(original))
    return value


def named_folders(cfg: Options) -> list[Path]:
    """The outermost existing folders that options name, as paths or as patterns of paths.

    Raises:
        NotTriedError: there are none.
    """
    found = {_existing(value) for value in _values(cfg.model_dump()) if _names_a_path(value)}
    known = sorted(folder for folder in found if folder is not None)
    if not known:
        raise NotTriedError("its options name no folder")
    return [folder for folder in known if not any(other in folder.parents for other in known)]


def _values(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _values(value)
    else:
        yield tree


def _names_a_path(value: Any) -> bool:
    """Strings such as ``user/name`` are paths only if there is such a file."""
    if isinstance(value, str):
        return os.sep in value and (os.path.isabs(os.path.expanduser(value)) or os.path.exists(value))
    return isinstance(value, Path)


def _existing(value: str | Path) -> Path | None:
    """The folder itself, the folder of a file, or the last one that a pattern names in full."""
    path = Path(os.path.abspath(os.path.expanduser(value)))
    if isinstance(value, Path) and not path.exists():
        return None
    return next((folder for folder in (path, *path.parents) if folder.is_dir()), None)


def check_small(folder: Path) -> None:
    """
    Raises:
        NotTriedError: it is too large to be copied.
    """
    files = size = 0
    for place, _, names in os.walk(folder, followlinks=True):
        files += len(names)
        size += sum(os.path.getsize(path) for name in names if os.path.exists(path := os.path.join(place, name)))
        if files > MOST_FILES or size > MOST_BYTES:
            raise NotTriedError(
                f"{folder} has more than {MOST_FILES:,} files or {MOST_BYTES >> 20} MiB: "
                "try a small folder of the same layout"
            )
