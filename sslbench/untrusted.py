"""What others wrote: their files are read within limits, their names are shown and used without effect.

Run directories, recipes and data sets are passed around. Nothing in them may take memory without end, move a
terminal's cursor, or name a file outside its folder.
"""

from __future__ import annotations

import json
import os
import re
import unicodedata
from pathlib import Path, PurePosixPath
from typing import Any

#: A run's record with ten thousand checkpoints has about a megabyte.
JSON_BYTES = 64 << 20
_NAME_BYTES = 200
_SHOWN = frozenset("\n\t")


def printable(text: str) -> str:
    """The text with every character visible that would steer a terminal or reverse the order of letters.

    A file can name itself ``\\x1b]0;...`` or hide its ending behind a right-to-left mark. Line breaks and tabs
    stay.
    """
    if text.isascii() and text.replace("\n", "").replace("\t", "").isprintable():
        return text
    return "".join(char if char in _SHOWN or not _steers(char) else _escaped(char) for char in text)


def _steers(char: str) -> bool:
    # Control, format (bidirectional marks), surrogate, line and paragraph separators.
    return unicodedata.category(char) in ("Cc", "Cf", "Cs", "Zl", "Zp")


def _escaped(char: str) -> str:
    return char.encode("unicode_escape", "backslashreplace").decode("ascii")


def file_name(text: str) -> str:
    """The text as the name of one file or folder: no separators, not hidden, no ``..``, all printable."""
    plain = re.sub(r"[/\\\0]", "-", "".join("-" if _steers(char) else char for char in text))
    plain = plain.encode(errors="replace")[:_NAME_BYTES].decode(errors="ignore")
    return "-" + plain.lstrip(".") if plain.startswith(".") or not plain else plain


def is_inside(path: str) -> bool:
    """Whether a relative path, as text, stays below the folder that it starts from."""
    parts = PurePosixPath(path)
    return bool(path) and not parts.is_absolute() and ".." not in parts.parts


def read_whole(path: Path) -> bytes:
    """A file that is not larger than any of ours.

    Raises:
        OSError: it cannot be read.
        ValueError: it is larger.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > JSON_BYTES:
            raise ValueError(f"{size} bytes are more than the {JSON_BYTES} that are read")
        return file.read(JSON_BYTES + 1)


def read_json(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        OSError: it cannot be read.
        ValueError: it is something else, or larger or nested deeper than any of ours.
    """
    content = read_whole(path)
    try:
        found = json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__} instead of an object")
    return found
