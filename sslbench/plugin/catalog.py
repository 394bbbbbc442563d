"""The catalogue of plugins: found from metadata, imported one at a time when a run names them.

pluggy's own entry-point loader imports every plugin and lets the first broken one take all others down. Here an
entry is found by (kind, name), its module imported in isolation, registered with pluggy, checked for misspelt
hooks, and asked for its classes. Listing imports nothing.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal, cast

from sslbench import API_VERSION
from sslbench.errors import PluginError, did_you_mean

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, EntryPoint

    import pluggy

Kind = Literal["method", "dataset", "backbone", "eval"]
KINDS: dict[Kind, str] = {
    "method": "sslbench.methods",
    "dataset": "sslbench.datasets",
    "backbone": "sslbench.backbones",
    "eval": "sslbench.evals",
}
EXTENSIONS = "sslbench.extensions"
_BASES: dict[Kind, str] = {
    "method": "Method",
    "dataset": "Dataset",
    "backbone": "Backbone",
    "eval": "EvalProtocol",
}


@dataclass(frozen=True)
class Entry:
    """A plugin the catalogue knows of, without having imported it."""

    kind: Kind
    name: str
    module: str
    """Dotted module name, or the path of a local file."""
    distribution: str
    version: str
    path: Path | None
    """Source file, if it can be told without importing."""

    @property
    def address(self) -> str:
        """The unambiguous name, ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def summary(self) -> str:
        """First line of the module's docstring, read without importing it."""
        return _docstring_summary(self.path) if self.path else ""

    def identity(self) -> dict[str, str]:
        """Name, distribution, version and source hash, as every run records them."""
        digest = _sha256(self.path.read_bytes()) if self.path else "unknown"
        return {
            "name": self.name,
            "distribution": self.distribution,
            "version": self.version,
            "module": self.module,
            "sha256": digest,
        }


@dataclass
class Catalog:
    """All plugins of this environment.

    Args:
        local: plugin files named with ``-p FILE``.
        blocked: names (plugins or distributions) named with ``-p no:NAME``.
    """

    local: Sequence[Path] = ()
    blocked: frozenset[str] = frozenset()
    _classes: dict[Entry, type] = field(default_factory=dict, repr=False)

    @cached_property
    def _points(self) -> Any:
        """All entry points, read once: it opens a file of every installed distribution."""
        from importlib.metadata import entry_points

        return entry_points()

    @classmethod
    def from_options(cls, plugins: Iterable[str]) -> Catalog:
        """Read ``-p`` values: ``FILE.py`` or ``no:NAME``."""
        local: list[Path] = []
        blocked: set[str] = set()
        for value in plugins:
            if value.startswith("no:"):
                blocked.add(value.removeprefix("no:"))
            else:
                local.append(_existing_file(value))
        return cls(tuple(local), frozenset(blocked))

    def entries(self, kind: Kind) -> list[Entry]:
        """Every plugin of a kind that is not blocked, by name."""
        found = [_entry_of(kind, ep) for ep in self._points.select(group=KINDS[kind])]
        found += [entry for path in self.local for entry in self._local_entries(kind, path)]
        return sorted((e for e in found if not self._is_blocked(e)), key=lambda e: (e.name, e.distribution))

    def names(self, kind: Kind) -> list[str]:
        return sorted({entry.name for entry in self.entries(kind)})

    def find(self, kind: Kind, name: str) -> Entry:
        """The entry that ``name`` (or ``distribution:name``) means.

        Raises:
            PluginError: nothing or more than one plugin has this name.
        """
        entries = self.entries(kind)
        wanted = [e for e in entries if name in (e.name, e.address)]
        if not wanted:
            raise self._unknown(kind, name, entries)
        if len(wanted) > 1:
            owners = " and ".join(f"{e.distribution} {e.version} ({e.module})" for e in wanted)
            choices = " or ".join(e.address for e in wanted)
            raise PluginError(f"two plugins claim the {kind} '{name}': {owners}", hint=f"name one: {choices}")
        return wanted[0]

    def load(self, kind: Kind, name: str) -> type[Any]:
        """Import the plugin and return its class.

        Raises:
            PluginError: unknown, ambiguous, failing to import, or not keeping to its contract.
        """
        entry = self.find(kind, name)
        if entry not in self._classes:
            module = _import_entry(entry)
            self._classes[entry] = _class_of(entry, _offered(module, kind, entry))
        return self._classes[entry]

    def observers(self) -> tuple[pluggy.PluginManager, list[str]]:
        """A manager with every extension registered, and a message for each that failed to load."""
        manager = _new_manager()
        problems = []
        for ep in self._points.select(group=EXTENSIONS):
            if ep.name in self.blocked:
                continue
            try:
                manager.register(importlib.import_module(ep.value), name=ep.name)
                manager.check_pending()
            except Exception as error:  # noqa: BLE001 - a foreign extension may fail in any way
                problems.append(f"extension '{ep.name}' is ignored: {_cause(error)}")
        for path in self.local:
            manager.register(_import_file(path), name=str(path))
        return manager, problems

    def _is_blocked(self, entry: Entry) -> bool:
        return not self.blocked.isdisjoint({entry.name, entry.distribution, entry.address})

    def _local_entries(self, kind: Kind, path: Path) -> list[Entry]:
        module = _import_file(path)
        return [
            Entry(kind, cls.name, str(path), path.stem, "local", path)
            for cls in _call_hook(module, kind, f"plugin file {path}")
        ]

    def _unknown(self, kind: Kind, name: str, entries: list[Entry]) -> PluginError:
        if name in self.blocked:
            return PluginError(f"the {kind} '{name}' is blocked by -p no:{name}", hint=f"drop -p no:{name}")
        guess = did_you_mean(name, [e.name for e in entries])
        return PluginError(
            f"no {kind} is named '{name}'{guess}", hint=f"sslbench list {kind}s   shows all of them"
        )


def _entry_of(kind: Kind, ep: EntryPoint) -> Entry:
    name, version = _named(ep.dist) if ep.dist else ("unknown", "unknown")
    return Entry(kind, ep.name, ep.value, name, version, _source_of(ep.value))


@cache
def _named(distribution: Distribution) -> tuple[str, str]:
    """Name and version, from the first lines: importlib parses the whole file, README included, as an email."""
    text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    fields = dict(line.split(": ", 1) for line in text.partition("\n\n")[0].splitlines() if ": " in line)
    return fields.get("Name", "unknown"), fields.get("Version", "unknown")


@cache
def _source_of(module: str) -> Path | None:
    """Where a module's source lies, importing nothing (``find_spec`` of a top-level name executes no code)."""
    top, *rest = module.split(":")[0].split(".")
    spec = _found(top)
    if spec is None:
        return None
    if not rest:
        return Path(spec.origin) if spec.origin else None
    for folder in spec.submodule_search_locations or ():
        stem = Path(folder, *rest)
        for candidate in (stem.with_suffix(".py"), stem / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


@cache
def _found(top: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


def _sha256(content: bytes) -> str:
    import hashlib

    return hashlib.sha256(content).hexdigest()


def _docstring_summary(path: Path) -> str:
    try:
        doc = ast.get_docstring(ast.parse(_opening(path.read_text(encoding="utf-8"))))
    except (OSError, SyntaxError, ValueError):
        return "(its source cannot be read)"
    return doc.strip().splitlines()[0] if doc else ""


def _opening(source: str) -> str:
    """The source up to the end of its docstring: listing need not parse whole modules."""
    parts = source.split('"""', 2)
    return f'"""{parts[1]}"""' if len(parts) == 3 and not parts[0].strip() else source


def _existing_file(value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise PluginError(
            f"-p {value}: there is no such file", hint="-p takes a Python file, or no:NAME to block a plugin"
        )
    return path.resolve()


@cache
def _import_file(path: Path) -> ModuleType:
    name = f"sslbench_local_{path.stem}_{_sha256(str(path).encode())[:8]}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError(f"plugin file {path} is not a Python file", hint="name it something.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise PluginError(f"plugin file {path} cannot be imported: {_cause(error)}") from error
    return module


def _import_entry(entry: Entry) -> ModuleType:
    if entry.version == "local":
        return _import_file(Path(entry.module))
    try:
        return importlib.import_module(entry.module)
    except Exception as error:
        raise PluginError(
            f"{entry.kind} '{entry.name}' of {entry.distribution} {entry.version} cannot be imported "
            f"({entry.module}): {_cause(error)}",
            hint=f"other plugins still work; report it to the authors of {entry.distribution}",
        ) from error


def _cause(error: BaseException) -> str:
    """The error and the line it was raised at, without the machinery's frames."""
    where = ""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    if frame is not None:
        where = f" ({Path(frame.tb_frame.f_code.co_filename).name}, line {frame.tb_lineno})"
    return f"{type(error).__name__}: {error}{where}"


def _new_manager() -> pluggy.PluginManager:
    import pluggy  # a listing needs no hooks

    from sslbench.plugin import hooks

    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return manager


def _call_hook(module: ModuleType, kind: Kind, owner: str) -> list[Any]:
    """Register the module alone, refuse misspelt hooks, and return the classes of its hook for ``kind``."""
    from pluggy import PluginValidationError

    from sslbench.plugin import hooks

    manager = _new_manager()
    try:
        manager.register(module)
        manager.check_pending()
    except PluginValidationError as error:
        known = ", ".join(sorted(name for name in dir(hooks) if name.startswith("sslbench_")))
        raise PluginError(f"{owner} does not fit the hooks: {error}", hint=f"known hooks: {known}") from error
    results = getattr(manager.hook, f"sslbench_{kind}s")()
    return [cls for result in results for cls in result]


def _offered(module: ModuleType, kind: Kind, entry: Entry) -> list[Any]:
    _check_api_version(module, entry)
    classes = _call_hook(module, kind, f"{entry.kind} '{entry.name}' of {entry.distribution}")
    if not classes:
        raise PluginError(
            f"{entry.module} has no hook that offers {kind}s",
            hint=f"add @hookimpl def sslbench_{kind}s(): return [YourClass]",
        )
    return classes


def _check_api_version(module: ModuleType, entry: Entry) -> None:
    wanted = str(getattr(module, "API_VERSION", API_VERSION))
    if wanted.split(".")[0] != API_VERSION.split(".")[0]:
        raise PluginError(
            f"{entry.kind} '{entry.name}' of {entry.distribution} was written for plugin API {wanted}; "
            f"this sslbench has {API_VERSION}",
            hint=f"pip install --upgrade {entry.distribution}",
        )


def _class_of(entry: Entry, classes: list[Any]) -> type:
    from sslbench.plugin import api  # with torch, which a listing can do without

    base = getattr(api, _BASES[entry.kind])
    matching = [cls for cls in classes if getattr(cls, "name", None) == entry.name]
    if not matching:
        offered = ", ".join(repr(getattr(cls, "name", cls)) for cls in classes)
        raise PluginError(
            f"{entry.module} is registered as {entry.kind} '{entry.name}' but offers {offered}",
            hint=f'set name = "{entry.name}" on the class or mend the entry point',
        )
    cls = cast("type[Any]", matching[0])
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{entry.module}: {cls!r} must be a subclass of sslbench.plugin.api.{base.__name__}")
    if not issubclass(cls.Config, api.Options):
        raise PluginError(f"{entry.module}: {cls.__name__}.Config must be a subclass of Options")
    return cls
