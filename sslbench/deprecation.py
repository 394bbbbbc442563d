"""Old names that go on working, with a warning, until the version that drops them.

There is one way for each thing that has a name:

* an option: ``renamed = {"tau": Renamed("temperature", "ssl-vicreg 2.0")}`` on its :class:`Options`;
* a plugin: the same on its class, and its old entry point in the group with ``.renamed`` behind its name, such as
  ``sslbench.methods.renamed``;
* a function, class or constant of a module: ``__getattr__ = former_names(__name__, {"old": Renamed(...)})``;
* a parameter of a hook: ``@hookspec(warn_on_impl_args=former_parameters(old=Renamed(...)))``; the specification
  keeps both parameters and the caller passes both.

Users are told in a line of the log, authors by a ``DeprecationWarning``, which pytest shows them.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

__all__ = ["Renamed", "former_names", "former_parameters", "tell_user"]


@dataclass(frozen=True)
class Renamed:
    """What an old name is called now."""

    to: str
    removed_in: str
    """Package and version without the old name: ``sslbench 0.4``."""

    def notice(self, what: str, old: str, new: str | None = None) -> str:
        """The warning.

        Args:
            what: ``option``, ``method``, ...
            new: the new name in full, if ``to`` is only its last part.
        """
        return f"the {what} '{old}' is now '{new or self.to}'; the old name will be gone in {self.removed_in}"


@cache
def tell_user(message: str) -> None:
    """Warn the person at the command line, once, and not on each rank."""
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("sslbench").warning(message)


def former_names(module: str, renamed: Mapping[str, Renamed]) -> Callable[[str], Any]:
    """A module's ``__getattr__`` that knows its old names.

    Args:
        renamed: old name to a name of the same module, or to a dotted one such as ``sslbench.nn.heads.mlp``.
    """

    def former(name: str) -> Any:
        if name not in renamed:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        home, _, attribute = renamed[name].to.rpartition(".")
        message = renamed[name].notice("name", f"{module}.{name}", f"{home or module}.{attribute}")
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return getattr(importlib.import_module(home or module), attribute)

    return former


def former_parameters(**renamed: Renamed) -> dict[str, Warning]:
    """For ``hookspec(warn_on_impl_args=...)``: a plugin with an old parameter is warned of when it is loaded."""
    return {old: DeprecationWarning(new.notice("hook parameter", old)) for old, new in renamed.items()}
