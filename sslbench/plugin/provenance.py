"""Where the code of a plugin comes from: digests of its files and the state of their repository."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sslbench.plugin.entry import Registered, found
from sslbench.plugin.repository import LARGE, state_of

_CACHES = frozenset({"__pycache__", ".git", ".mypy_cache", ".ruff_cache", ".pytest_cache"})
_INSTALLED = frozenset({"site-packages", "dist-packages"})


@dataclass(frozen=True)
class Sources:
    """The files that belong to a plugin's package."""

    names: tuple[str, ...]
    """Packages and modules they lie in."""
    files: tuple[tuple[str, Path], ...]
    """Name from the package on, and place, in a fixed order."""

    @property
    def covers(self) -> str:
        """In words: which packages, how many files."""
        return f"{', '.join(self.names)}: {len(self.files)} file{'s' if len(self.files) != 1 else ''}"

    def digest(self) -> str:
        """Hex SHA-256 of all names and contents."""
        total = hashlib.sha256()
        for name, path in self.files:
            total.update(f"{name}\0{_content(path)}\n".encode())
        return total.hexdigest()


@cache
def identity(entry: Registered) -> dict[str, str]:
    """What a run records of a plugin.

    ``sha256`` is that of the plugin's own file, ``package_sha256`` that of every file of its package (``covers``
    says which). ``git_commit`` and ``git_modified`` describe the repository of a source that is not a copy: an
    editable installation or a local file; empty for others. All is taken once per process: what was imported does
    not change.
    """
    sources = sources_of(entry)
    return {
        "name": entry.name,
        "distribution": entry.distribution,
        "version": entry.version,
        "module": entry.module,
        "sha256": _file_digest(entry.path) if entry.path and entry.path.is_file() else "unknown",
        "package_sha256": _package_digest(sources),
        "covers": sources.covers,
        **(_git_state(sources) or {"git_commit": "", "git_modified": ""}),
    }


def short(identity: Mapping[str, str]) -> str:
    """An identity on one line, for tags and tables."""
    words = [f"{identity['name']} of {identity['distribution']} {identity['version']}"]
    words.append(f"sha256 {identity['sha256'][:12]}, package {identity['package_sha256'][:12]}")
    if identity["git_commit"]:
        changed = " with changes" if identity["git_modified"] == "true" else ""
        words.append(f"git {identity['git_commit'][:12]}{changed}")
    return ", ".join(words)


def sources_of(entry: Registered) -> Sources:
    """The files of the distribution that a plugin belongs to; of a local file, itself."""
    if entry.path is None:
        return Sources((), ())
    if entry.is_local:
        return Sources((entry.path.name,), ((entry.path.name, entry.path),))
    return _of_distribution(entry.distribution, entry.module.partition(".")[0], entry.path.resolve())


@cache
def _of_distribution(distribution: str, top: str, path: Path) -> Sources:
    """Those that it has installed; of an editable installation, those of the packages it names."""
    recorded = _recorded(distribution)
    if path in recorded.values():
        names = sorted({name.partition("/")[0].removesuffix(".py") for name in recorded})
        return Sources(tuple(names), tuple(sorted(recorded.items())))
    names = sorted({top, *_top_levels(distribution)})
    files = {name: place for top in names for name, place in _below(top)}
    return Sources(tuple(names), tuple(sorted(files.items())))


def _recorded(distribution: str) -> dict[str, Path]:
    """Name -> place of the installed files, without metadata, scripts and caches.

    Only what an installer has recorded: the list of sources that a build leaves in a checkout names tests and
    documents too.
    """
    from importlib.metadata import distributions

    installed = (found for found in distributions(name=distribution) if found.read_text("RECORD"))
    listed = next((found.files or [] for found in installed), [])
    parts = [file for file in listed if not (file.parts[0].endswith(".dist-info") or ".." in file.parts)]
    return {str(f): Path(str(f.locate())).resolve() for f in parts if _counts(f.parts) and len(f.parts) > 0}


def _top_levels(distribution: str) -> list[str]:
    from importlib.metadata import PackageNotFoundError
    from importlib.metadata import distribution as installed

    try:
        text = installed(distribution).read_text("top_level.txt") or ""
    except PackageNotFoundError:
        text = ""
    return text.split()


def _below(top: str) -> Iterable[tuple[str, Path]]:
    """The files of a top-level package or module."""
    spec = found(top)
    if spec is None:
        return
    folders = spec.submodule_search_locations or ()
    if not folders and spec.origin:
        yield Path(spec.origin).name, Path(spec.origin)
    for folder in folders:
        for parent, inside, names in os.walk(folder):
            inside[:] = [name for name in inside if name not in _CACHES]
            paths = {Path(parent, name).relative_to(folder): Path(parent, name) for name in names}
            yield from ((f"{top}/{p.as_posix()}", place) for p, place in paths.items() if _counts((top, *p.parts)))


def _counts(parts: Sequence[str]) -> bool:
    """Whether a file is part of what was written; a ``.pth`` beside packages only says where they lie."""
    says_where = len(parts) == 1 and parts[0].endswith(".pth")
    return not (_CACHES & set(parts) or parts[-1].endswith(".pyc") or says_where)


@cache
def _package_digest(sources: Sources) -> str:
    return sources.digest() if sources.files else "unknown"


def _content(path: Path) -> str:
    try:
        size = path.stat().st_size
        return f"{size} bytes" if size > LARGE else _file_digest(path)
    except OSError:
        return "unreadable"


def _file_digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@cache
def _git_state(sources: Sources) -> dict[str, str] | None:
    """Commit, and whether a file of the package differs from it; None for an installed copy or no repository."""
    if not sources.files or _INSTALLED & set(sources.files[0][1].parts):
        return None
    files = {path.parent.resolve() / path.name: name for name, path in sources.files}
    roots = sorted({_root_of(name, path) for path, name in files.items()})
    state = state_of(files, roots)
    return {"git_commit": state.commit, "git_modified": str(state.modified).lower()} if state else None


def _root_of(name: str, path: Path) -> Path:
    """The folder of the package, or the single file."""
    depth = name.count("/")
    return path.parents[depth - 1] if depth else path
