"""Between the shell and the commands: word order, library settings, error messages."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from sslbench.errors import SslbenchError
from sslbench.untrusted import printable

#: Options of ``sslbench`` itself, all with a value, that people also write behind a command.
_GLOBAL = ("-p", "--plugin", "--runs", "--registry")


def hoisted(arguments: Sequence[str]) -> list[str]:
    """``pretrain -p my.py`` as ``-p my.py pretrain``: global options may stand anywhere."""
    first: list[str] = []
    rest: list[str] = []
    words = iter(arguments)
    for word in words:
        if word in _GLOBAL:
            first += [word, *(value for value in [next(words, None)] if value is not None)]
        elif word.startswith(tuple(f"{name}=" for name in _GLOBAL if name.startswith("--"))):
            first.append(word)
        else:
            rest.append(word)
    return first + rest


def is_terminal() -> bool:
    """Whether a person reads stdout; it may be closed."""
    return sys.stdout is not None and sys.stdout.isatty()


def prepare_environment() -> None:
    """What libraries look at when they are first imported; a user's own variables win. Messages go to stderr."""
    handler = logging.StreamHandler()
    handler.setFormatter(_Levels())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    for name in ("sslbench", "sslbench_plugins"):
        logging.getLogger(name).setLevel(logging.INFO)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")


class _Levels(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        mark = "Warning: " if record.levelno >= logging.WARNING else ""
        return printable(f"{mark}{record.getMessage()}")


def warn(message: str) -> None:
    """A sentence on stderr about something that does not stop the command."""
    print(printable(f"Warning: {message}"), file=sys.stderr)  # noqa: T201


def report(error: SslbenchError) -> None:
    from rich.text import Text

    from sslbench.screen import Screen

    console = Screen(stderr=True)
    console.print(Text.assemble((f"{error.title}: ", "bold red"), error.message), soft_wrap=True)
    if error.hint:
        console.print(Text.assemble(("  Next: ", "bold"), error.hint), soft_wrap=True)
