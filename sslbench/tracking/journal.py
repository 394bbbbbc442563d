"""The journal: every metric of a run, one JSON object per line. It is the truth; the MLflow store is a copy."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sslbench.tracking.clock import now


class Entry(NamedTuple):
    """One line of the journal."""

    step: int
    time: float
    """Seconds since 1970."""
    metrics: dict[str, float]
    headline: bool
    """Whether these are results of the whole run rather than points of its curves."""
    end: int
    """Byte offset behind the line."""


def _encode(value: float) -> float | str:
    # JSON has no NaN or infinity: strict readers would refuse the whole line.
    return value if math.isfinite(value) else str(value)


def _decode(line: bytes, end: int) -> Entry | None:
    try:
        raw: dict[str, Any] = json.loads(line)
        metrics = {key: float(value) for key, value in raw["metrics"].items()}
        return Entry(int(raw["step"]), float(raw["time"]), metrics, bool(raw.get("headline")), end)
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
        return None


class Journal:
    """``metrics.jsonl``: appended and flushed line by line, readable while it grows.

    Lines that are not complete (the process died while writing) or damaged are passed over.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._last_time: float | None = None

    def append(self, step: int, metrics: Mapping[str, float], *, headline: bool = False) -> None:
        """Add one line. One write in append mode, so that several processes may do it."""
        record: dict[str, Any] = {
            "step": int(step),
            "time": round(self._time(), 3),
            "metrics": {key: _encode(float(value)) for key, value in metrics.items()},
        }
        if headline:
            record["headline"] = True
        with self.path.open("ab", buffering=0) as file:
            line = self._line_break(file.tell()) + json.dumps(record).encode() + b"\n"
            if file.write(line) < len(line):  # a disk that is nearly full takes a part without an error
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))

    def last_time(self) -> float:
        """Time of the last entry, 0 for an empty journal."""
        if self._last_time is None:
            self._last_time = max((entry.time for entry in self.entries()), default=0.0)
        return self._last_time

    def _time(self) -> float:
        """Never before the entry before: of two values of one step, MLflow shows the one with the later time."""
        self._last_time = max(now(), self.last_time())
        return self._last_time

    def _line_break(self, size: int) -> bytes:
        """A line break if the file ends in half a line."""
        if size == 0:
            return b""
        with self.path.open("rb") as file:
            file.seek(-1, 2)
            return b"" if file.read(1) == b"\n" else b"\n"

    def entries(self, offset: int = 0) -> Iterator[Entry]:
        """Entries behind a byte offset, oldest first; a last line without its line break is left for later."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(offset)
            for line in file:
                offset += len(line)
                entry = _decode(line, offset) if line.endswith(b"\n") else None
                if entry is not None:
                    yield entry

    def size(self) -> int:
        """Bytes written so far."""
        return self.path.stat().st_size if self.path.exists() else 0

    def last_step(self) -> int:
        """The largest step of any entry, 0 for an empty journal."""
        return max((entry.step for entry in self.entries()), default=0)

    def truncate_after(self, step: int) -> list[Entry]:
        """Drop entries beyond a step and return them with the offsets they had."""
        entries = list(self.entries())
        dropped = [entry for entry in entries if entry.step > step]
        if dropped:
            self._rewrite([entry for entry in entries if entry.step <= step])
        return dropped

    def _rewrite(self, entries: list[Entry]) -> None:
        partial = self.path.with_suffix(".partial")
        partial.unlink(missing_ok=True)
        lines = [
            json.dumps(
                {"step": e.step, "time": e.time, "metrics": {k: _encode(v) for k, v in e.metrics.items()}}
                | ({"headline": True} if e.headline else {})
            )
            for e in entries
        ]
        partial.write_text("".join(f"{line}\n" for line in lines))
        partial.replace(self.path)
