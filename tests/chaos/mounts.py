"""Small disks that fill up, and disks that become read-only."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from chaos.children import promise


class Disk:
    """A file system in memory, mounted at a folder."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def protect(self) -> None:
        """Make it read-only, for root as well; files that are open for writing are closed to the next write."""
        # A plain remount is refused while a file is open for writing.
        _mount("--bind", str(self.path), str(self.path))
        _mount("-o", "remount,bind,ro", str(self.path))

    def release(self) -> None:
        """Make it writable again."""
        _mount("-o", "remount,bind,rw", str(self.path))

    def fill(self) -> None:
        """Take all the room that there is."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            try:
                while file.write(bytes(4096)):
                    pass
            except OSError:
                return

    def empty(self) -> None:
        """Give the room back."""
        (self.path / "filler").unlink()


@contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Disk]:
    """A disk of this size; it takes the right to mount file systems."""
    path.mkdir()
    _mount("-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path))
    try:
        yield Disk(path)
    finally:
        while subprocess.run(["umount", "-l", str(path)], capture_output=True, check=False).returncode == 0:
            pass


def _mount(*words: str) -> None:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    promise(done.returncode == 0, f"mount {' '.join(words)}: {done.stderr.strip()}")
