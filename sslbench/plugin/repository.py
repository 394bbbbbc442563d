"""Whether files are as the last commit has them, without running anything that their repository names.

``git status`` runs the filters and monitors of a repository's own settings, and a repository may be anybody's. So
git tells only which blobs the commit has, and the files are compared with those here. The programs that convert
files are replaced by the two usual conversions: line endings, and Git LFS, whose blobs are a digest and a size.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

LARGE = 8 << 20
"""A file of more bytes, such as embedded weights, counts by its name and size: a run must not wait for it."""
_SECONDS = 10.0
_POINTER = 200
"""Bytes that the blob of a file in Git LFS has at most."""
#: Objects that a partial clone lacks are fetched by programs that its settings name: not here.
_NO_FETCHING = {"GIT_NO_LAZY_FETCH": "1", "GIT_ALLOW_PROTOCOL": "none"}


@dataclass(frozen=True)
class State:
    """What a repository's last commit says of some files."""

    commit: str
    modified: bool
    """Whether one of them differs from the commit, is missing, or is in none."""


@dataclass(frozen=True)
class _Blob:
    digest: str
    size: int


def state_of(files: Collection[Path], roots: Collection[Path]) -> State | None:
    """Compare files with the last commit; None if there is none, or they lie in several repositories.

    Args:
        files: absolute, with resolved folders.
        roots: the folders and files whose content they are; what the commit has there must be there.
    """
    try:
        top, commit = _last_commit(next(iter(files)).parent)
        blobs = _blobs(top, commit, roots)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    unknown = any(file not in blobs for file in files)
    missing = any(not os.path.lexists(path) for path in blobs)
    return State(commit, unknown or missing or not all(_holds(file, blobs[file]) for file in files))


def _last_commit(folder: Path) -> tuple[Path, str]:
    """Where the working tree begins, and its commit."""
    top, _, commit = _git(folder, "rev-parse", "--show-toplevel", "HEAD").strip("\n").rpartition("\n")
    return Path(top), commit


def _blobs(top: Path, commit: str, roots: Collection[Path]) -> dict[Path, _Blob]:
    """What a commit has below the roots."""
    inside = [root.relative_to(top).as_posix() for root in roots]
    listing = _git(top, "ls-tree", "-r", "-l", "-z", commit, "--", *(name for name in inside if name != "."))
    rows = (row.split("\t", 1) for row in listing.split("\0") if row)
    facts = {top / name: about.split() for about, name in rows}
    return {path: _Blob(fact[2], int(fact[3])) for path, fact in facts.items() if fact[1] == "blob"}


def _git(folder: Path, *words: str) -> str:
    done = subprocess.run(
        ["git", *words],
        cwd=folder,
        env={**os.environ, **_NO_FETCHING},
        capture_output=True,
        encoding="utf-8",
        errors="surrogateescape",
        timeout=_SECONDS,
        check=True,
    )
    return done.stdout


def _holds(file: Path, blob: _Blob) -> bool:
    """Whether a file is what a blob stands for."""
    try:
        size = file.lstat().st_size
        if size > LARGE:
            return blob.size == size or blob.size <= _POINTER
        content = os.fsencode(file.readlink()) if file.is_symlink() else file.read_bytes()
    except OSError:
        return False
    return any(_digest(form, len(blob.digest)) == blob.digest for form in _forms(content))


def _forms(content: bytes) -> Iterator[bytes]:
    """What git may have stored for a file with this content."""
    yield content
    yield content.replace(b"\r\n", b"\n")
    digest = hashlib.sha256(content).hexdigest()
    yield f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(content)}\n".encode()


def _digest(content: bytes, letters: int) -> str:
    """The name of a blob, in a repository whose names have so many letters."""
    algorithm = "sha1" if letters == 40 else "sha256"
    return hashlib.new(algorithm, b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
