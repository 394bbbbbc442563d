"""``SSLBENCH_TRACE=1``: every hook call on stderr, with who answered, what, and how long it took."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from reprlib import Repr
from typing import TYPE_CHECKING, Any

from sslbench.untrusted import printable

if TYPE_CHECKING:
    import pluggy

ENVIRONMENT = "SSLBENCH_TRACE"
_SHORT = Repr()
_SHORT.maxlevel, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 3, 60, 60


def tracing() -> bool:
    return os.environ.get(ENVIRONMENT, "") not in ("", "0")


def trace(manager: pluggy.PluginManager) -> Callable[[], None] | None:
    """Make a manager tell of its hook calls, if the user wants to know; returns how to stop that."""
    if not tracing():
        return None
    calls = _Calls()
    undo: Callable[[], None] = manager.add_hookcall_monitoring(calls.before, calls.after)
    return undo


class _Calls:
    """Those in progress: a hook may lead to another one."""

    def __init__(self) -> None:
        self.started: list[float] = []

    def before(self, hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        self.started.append(time.perf_counter())

    def after(self, outcome: Any, hook: str, implementations: Sequence[Any], arguments: Mapping[str, Any]) -> None:
        milliseconds = 1000 * (time.perf_counter() - self.started.pop())
        for implementation in implementations:
            words = f"{hook}({_shown(arguments)}) by {_whose(implementation)} {_outcome(outcome)}"
            print(printable(f"trace: {words} in {milliseconds:.2f} ms"), file=sys.stderr)  # noqa: T201


def _whose(implementation: Any) -> str:
    code = implementation.function.__code__
    return f"{implementation.plugin_name} ({Path(code.co_filename).name}, line {code.co_firstlineno})"


def _outcome(outcome: Any) -> str:
    error = outcome.exception
    if error is not None:
        return f"raised {type(error).__name__}: {error}"
    return f"returned {_SHORT.repr(outcome.get_result())}"


def _shown(arguments: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_SHORT.repr(value)}" for name, value in arguments.items())
