"""What an examination finds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Level = Literal["ok", "warning", "failure"]


@dataclass(frozen=True)
class Check:
    """One finding."""

    section: str
    name: str
    level: Level
    detail: str
    advice: str = ""
    """What to type next."""
    data: Mapping[str, Any] = field(default_factory=dict)
    """The same for programs, where words are not enough."""


def judged(section: str, name: str, passed: bool, detail: str, advice: str = "") -> Check:
    """A check that either holds or is a failure; advice is for the latter."""
    return Check(section, name, "ok" if passed else "failure", detail, "" if passed else advice)
