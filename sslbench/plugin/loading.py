"""Importing the code of a plugin in isolation, and asking its hooks."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from sslbench import API_VERSION
from sslbench.errors import MissingExtraError, PluginError, did_you_mean
from sslbench.plugin.entry import Registered

if TYPE_CHECKING:
    import pluggy

#: ``sys.exit`` at import must not end the command either.
FAILURES = (Exception, SystemExit)
_PREFIX = "sslbench_"
"""Of every hook."""


@cache
def import_file(path: Path) -> ModuleType:
    """The module of a plugin file.

    Raises:
        PluginError: with the line that failed.
    """
    import hashlib  # a listing does without

    digest = hashlib.sha256(str(path).encode()).hexdigest()[:8]
    name = f"sslbench_local_{path.stem}_{digest}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {path} is not a Python file", hint="name it something.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        with redirect_stdout(sys.stderr):  # what a plugin prints is no part of --json
            spec.loader.exec_module(module)
    except FAILURES as error:
        del sys.modules[name]
        raise PluginError(f"plugin file {path} cannot be imported: {cause(error)}") from error
    return module


def import_registered(entry: Registered, what: str) -> ModuleType:
    """The module of a plugin or an extension.

    Args:
        what: names it in messages, such as ``method 'simclr'``.

    Raises:
        PluginError: it cannot be imported, or was written for another version of the API.
    """
    try:
        module = import_file(Path(entry.module)) if entry.is_local else _import_installed(entry, what)
    except PluginError:
        _check_api_version(_stated_version(entry.path), entry, what)  # says more than that a name is missing
        raise
    _check_api_version(str(getattr(module, "API_VERSION", API_VERSION)), entry, what)
    return module


def _import_installed(entry: Registered, what: str) -> ModuleType:
    try:
        with redirect_stdout(sys.stderr):
            return importlib.import_module(entry.module)
    except MissingExtraError:
        raise
    except FAILURES as error:
        raise PluginError(
            f"{what} of {entry.owner} cannot be imported ({entry.module}): {cause(error)}",
            hint=f"other plugins still work; report it to the authors of {entry.distribution}",
        ) from error


def _check_api_version(wanted: str, entry: Registered, what: str) -> None:
    """A plugin runs with its own major version of the API, and not with an older minor one."""
    numbers = re.fullmatch(r"(\d+)\.(\d+)", wanted)
    if numbers is None:
        raise PluginError(
            f"{what} of {entry.owner} says API_VERSION = {wanted!r}, which is not MAJOR.MINOR",
            hint=f'API_VERSION = "{API_VERSION}" is that of this sslbench',
        )
    wants = (int(numbers[1]), int(numbers[2]))
    major, minor = map(int, API_VERSION.split("."))
    if wants[0] != major or wants[1] > minor:
        raise PluginError(
            f"{what} of {entry.distribution} was written for plugin API {wanted}; this sslbench has {API_VERSION}",
            hint=_way_to_fit(entry, is_newer=wants > (major, minor)),
        )


def _way_to_fit(entry: Registered, *, is_newer: bool) -> str:
    if is_newer:
        return "pip install --upgrade sslbench"
    if entry.is_local:
        return f'bring {entry.path} to API {API_VERSION}, then let it say API_VERSION = "{API_VERSION}"'
    return f"pip install --upgrade {entry.distribution}"


def _stated_version(path: Path | None) -> str:
    """``API_VERSION = "..."`` in a source that could not be imported; else our own."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8") if path else "")
    except (OSError, SyntaxError, ValueError):
        return API_VERSION
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "API_VERSION":
            return str(node.value.value) if isinstance(node.value, ast.Constant) else API_VERSION
    return API_VERSION


def cause(error: BaseException) -> str:
    """The error and the line it was raised at, without the machinery's frames."""
    return f"{type(error).__name__}: {error}{_place(error)}"


def _place(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return ""  # its words name file and line; it was raised where that file is read
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is None:
        return ""
    return f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})"


def manager_of(module: ModuleType, name: str, owner: str) -> pluggy.PluginManager:
    """A manager that knows this module alone, so that a failing hook is nobody else's.

    Args:
        name: of the plugin, in traces.
        owner: whom to name in messages.

    Raises:
        PluginError: the module has a hook that does not exist.
    """
    import pluggy  # a listing needs no hooks

    from sslbench.plugin import hooks
    from sslbench.plugin.trace import trace

    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    trace(manager)
    try:
        manager.register(module, name=name)
        manager.check_pending()
    except pluggy.PluginValidationError as error:
        known = sorted(hook for hook in dir(hooks) if hook.startswith(_PREFIX))
        unknown = re.search(r"unknown hook '(\w+)'", str(error))
        guess = did_you_mean(unknown[1], known) if unknown else ""
        raise PluginError(
            f"{owner} does not fit the hooks: {error}{guess}", hint=f"known hooks: {', '.join(known)}"
        ) from error
    return manager


def check_has_hooks(module: ModuleType, path: Path) -> None:
    """A file that somebody has named must take part in something.

    Raises:
        PluginError: no function of it is a hook.
    """
    manager = manager_of(module, str(path), f"plugin file {path}")
    if any(manager.get_hookcallers(plugin) for plugin in manager.get_plugins()):
        return
    unmarked = [name for name in vars(module) if name.startswith(_PREFIX)]
    why = f"{', '.join(unmarked)} lacks @hookimpl" if unmarked else "it has no hook"
    raise PluginError(
        f"plugin file {path} offers nothing: {why}",
        hint="from sslbench.plugin.hooks import hookimpl; then put @hookimpl before "
        f"{'it' if unmarked else 'def sslbench_methods(): return [YourMethod]'}",
    )


def offered(module: ModuleType, hook: str, name: str, owner: str) -> list[Any]:
    """The classes that a module's hook returns.

    Raises:
        PluginError: it fails, or returns something else than a list of them.
    """
    calls = getattr(manager_of(module, name, owner).hook, hook)
    try:
        results = [list(result) if isinstance(result, Iterable) else result for result in calls()]
        results += [None] * (len(calls.get_hookimpls()) - len(results))  # which pluggy leaves out
    except PluginError:
        raise
    except FAILURES as error:
        raise PluginError(f"{owner} failed in {hook}: {cause(error)}") from error
    for result in results:
        if not isinstance(result, list):
            raise PluginError(
                f"{owner}: {hook} must return a list of classes, not {result!r}", hint="return [YourClass]"
            )
    return [cls for result in results for cls in result]
