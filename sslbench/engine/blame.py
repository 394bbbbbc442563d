"""Programming mistakes in the code of a plugin, said as such: whose, in which line, and what to type next."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import CodeType

from sslbench.errors import PluginError
from sslbench.plugin.api import Backbone, Method

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


Plugin = type[Method] | type[Backbone]


@contextmanager
def blaming(plugins: Sequence[Plugin], when: str) -> Iterator[None]:
    """Turn a mistake that comes out of the code of a plugin into an error that names it.

    Args:
        plugins: whose code runs here, the one that calls the others first.

    Raises:
        PluginError: with file and line. Other errors stay as they are.
    """
    try:
        yield
    except _MISTAKES as error:
        culprit = _culprit(plugins, error)
        if culprit is None:
            raise
        plugin, place = culprit
        raise PluginError(
            f"{_kind(plugin)} '{plugin.name}' failed {when} ({place}): {type(error).__name__}: {error}",
            hint=_hint(plugin, error),
        ) from error


def _culprit(plugins: Sequence[Plugin], error: BaseException) -> tuple[Plugin, str] | None:
    """Whose own file the deepest line lies in that led to an error, and that line."""
    owners: dict[str, list[Plugin]] = {}
    for plugin in plugins:
        owners.setdefault(_file(plugin), []).append(plugin)
    for frame, line in reversed(list(traceback.walk_tb(error.__traceback__))):
        code = frame.f_code
        if code.co_filename in owners:
            return _owner(owners[code.co_filename], code), f"{Path(code.co_filename).name}, line {line}"
    return None


def _own(plugin: Plugin) -> type:
    """The class as its author wrote it: what shards parameters puts one of its own on top."""
    return next((cls for cls in plugin.__mro__ if "name" in vars(cls)), plugin)


def _file(plugin: Plugin) -> str:
    try:
        return inspect.getfile(_own(plugin))
    except (OSError, TypeError):
        return ""


def _owner(plugins: Sequence[Plugin], code: CodeType) -> Plugin:
    """The plugin whose class a function belongs to; of others in the same file, the first."""
    inside = (plugin for plugin in plugins if code.co_qualname.startswith(f"{_own(plugin).__qualname__}."))
    return next(inside, plugins[0])


def _kind(plugin: Plugin) -> str:
    return "method" if issubclass(plugin, Method) else "backbone"


def _hint(plugin: Plugin, error: BaseException) -> str:
    if issubclass(plugin, Method) and "None" in str(error) and not plugin.uses_labels:
        return "if it read batch.labels: they are None unless the method declares uses_labels = True"
    kind = _kind(plugin)
    return f"sslbench check {kind} {plugin.name}   tries all that is expected of a {kind}"
