"""Rules of a plugin kind, tried one by one: what held, what broke and how to mend it, what could not be tried."""

from __future__ import annotations

import inspect
import re
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Literal, TypeVar

from sslbench.errors import SslbenchError
from sslbench.testing.report import ConformanceError

Subject = TypeVar("Subject")


class BrokenRuleError(Exception):
    """Raised by a check: what is wrong, and how to mend it."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.hint = hint


class NotTriedError(Exception):
    """Raised by a check that does not apply to this plugin, or cannot be done on this machine; says why."""


@dataclass(frozen=True)
class Rule(Generic[Subject]):
    """One promise of a contract."""

    name: str
    """As a fact: ``same seed, same loss``."""
    check: Callable[[Subject], str]
    """Tries it; returns what was found in a few words.

    Raises:
        BrokenRuleError: it is broken.
        NotTriedError: it does not apply.
    """


@dataclass(frozen=True)
class Verdict:
    """What trying one rule has shown."""

    rule: str
    outcome: Literal["held", "broken", "not tried"]
    detail: str
    hint: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Checkup:
    """All verdicts on one plugin."""

    kind: str
    name: str
    verdicts: tuple[Verdict, ...]

    @property
    def broken(self) -> tuple[Verdict, ...]:
        return tuple(verdict for verdict in self.verdicts if verdict.outcome == "broken")

    def raise_if_broken(self) -> None:
        """
        Raises:
            ConformanceError: names every broken rule, and how to mend the first one.
        """
        if self.broken:
            found = "; ".join(f"{verdict.rule}: {verdict.detail}" for verdict in self.broken)
            raise ConformanceError(f"{self.kind} '{self.name}': {found}", hint=self.broken[0].hint)


def check_up(
    kind: str, name: str, subject: Subject, rules: Iterable[Rule[Subject]], first: Rule[Subject] | None = None
) -> Checkup:
    """Try every rule; one that is broken stops none of the others.

    Args:
        first: a rule without which the others cannot be tried, such as that the plugin can be built.
    """
    opening: tuple[Verdict, ...] = (_tried(first, subject),) if first else ()
    if any(verdict.outcome == "broken" for verdict in opening):
        reason = f"not '{opening[0].rule}'"
        return Checkup(kind, name, (*opening, *(Verdict(rule.name, "not tried", reason) for rule in rules)))
    return Checkup(kind, name, (*opening, *(_tried(rule, subject) for rule in rules)))


def _tried(rule: Rule[Subject], subject: Subject) -> Verdict:
    started = time.monotonic()

    def verdict(outcome: Literal["held", "broken", "not tried"], detail: str, hint: str = "") -> Verdict:
        return Verdict(rule.name, outcome, detail, hint, time.monotonic() - started)

    try:
        return verdict("held", rule.check(subject))
    except NotTriedError as reason:
        return verdict("not tried", str(reason))
    except BrokenRuleError as broken:
        return verdict("broken", str(broken), broken.hint)
    except SslbenchError as error:
        return verdict("broken", error.message, error.hint or "")
    except Exception as error:  # noqa: BLE001 - a foreign plugin may fail in any way
        return verdict("broken", f"{type(error).__name__}: {error}", _cure(error, getattr(subject, "cls", None)))


def _cure(error: BaseException, plugin: type | None) -> str:
    without_options = re.search(r"^'(Method|Eval)?(Config|Options)' object has no attribute", str(error))
    forgotten = (
        "set Config = ... on the plugin's class, with the class of its options; " if without_options else ""
    )
    return f"{forgotten}raised in {_place(error, plugin)}"


def _place(error: BaseException, plugin: type | None) -> str:
    """The deepest line of the plugin's own file; else of what is no library; else of all."""
    try:
        own = inspect.getfile(plugin) if plugin else ""
    except (OSError, TypeError):
        own = ""
    frames = traceback.extract_tb(error.__traceback__)
    candidates = (
        [frame for frame in frames if frame.filename == own],
        [frame for frame in frames if not _LIBRARIES & set(Path(frame.filename).parts)],
        frames,
    )
    deepest = next(found for found in candidates if found)[-1]
    return f"{deepest.filename}, line {deepest.lineno}"


_LIBRARIES = {"sslbench", "torch", "site-packages", "dist-packages"}
