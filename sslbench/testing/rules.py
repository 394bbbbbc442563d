"""Rules of a plugin kind, tried one by one: what held, what broke and how to mend it, what could not be tried."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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
        return verdict("broken", f"{type(error).__name__}: {error}", _where(error))


def _where(error: BaseException) -> str:
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return f"raised in {frame.tb_frame.f_code.co_filename}, line {frame.tb_lineno}" if frame else ""
