"""Programming mistakes in the code of a plugin, said as such: whose, in which line, and what to type next."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sslbench.errors import PluginError
from sslbench.plugin.api import Method

#: Not RuntimeError: it stands for full memory and lost ranks as well.
_MISTAKES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    NotImplementedError,
    TypeError,
    ValueError,
)


@contextmanager
def blaming(method: type[Method], when: str) -> Iterator[None]:
    """Turn a mistake that comes out of a method's own code into an error that names it.

    Raises:
        PluginError: with file and line. Other errors stay as they are.
    """
    try:
        yield
    except _MISTAKES as error:
        place = _line_of(method, error)
        if place is None:
            raise
        raise PluginError(
            f"method '{method.name}' failed {when} ({place}): {type(error).__name__}: {error}",
            hint=_hint(method, error),
        ) from error


def _line_of(method: type[Method], error: BaseException) -> str | None:
    """The deepest line of the method's own file that led to an error."""
    try:
        file = inspect.getfile(method)
    except (OSError, TypeError):
        return None
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
    return f"{Path(file).name}, line {frames[-1].lineno}" if frames else None


def _hint(method: type[Method], error: BaseException) -> str:
    if "None" in str(error) and not method.uses_labels:
        return "if it read batch.labels: they are None unless the method declares uses_labels = True"
    return f"sslbench check method {method.name}   tries all that is expected of a method"
