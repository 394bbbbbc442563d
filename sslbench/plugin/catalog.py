"""The catalogue of plugins: found from metadata, imported one at a time when a run names them.

pluggy's own entry-point loader imports every plugin and lets the first broken one take all others down. Here an
entry is found by (kind, name), its module imported in isolation, registered with pluggy, checked for misspelt
hooks, and asked for its classes. Listing imports nothing.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sslbench.deprecation import tell_user
from sslbench.errors import PluginError, did_you_mean
from sslbench.plugin.entry import (
    EXTENSIONS,
    KINDS,
    OWN,
    REGISTRIES,
    RENAMED,
    Entry,
    Kind,
    Registered,
    entry_points,
    registered,
    spelled,
)
from sslbench.plugin.loading import check_has_hooks, import_file, import_registered, offered

if TYPE_CHECKING:
    from sslbench.plugin.extensions import Extension

__all__ = ["EXTENSIONS", "KINDS", "ONLY", "Catalog", "Entry", "Kind"]

ONLY = "SSLBENCH_PLUGINS"
"""Environment variable: packages or plugins, separated by commas, that may be loaded beside the built-in ones."""
_BASES: dict[Kind, str] = {
    "method": "Method",
    "dataset": "Dataset",
    "backbone": "Backbone",
    "eval": "EvalProtocol",
}


def _allowed() -> frozenset[str] | None:
    words = os.environ.get(ONLY)
    return None if words is None else frozenset(word.strip() for word in words.split(",") if word.strip())


@dataclass
class Catalog:
    """All plugins of this environment.

    Args:
        local: plugin files named with ``-p FILE``.
        blocked: names (plugins or distributions) named with ``-p no:NAME``.
        allowed: names (plugins or distributions) beside the built-in ones and ``local``; None: all of them. By
            default what ``SSLBENCH_PLUGINS`` says.
    """

    local: Sequence[Path] = ()
    blocked: frozenset[str] = frozenset()
    allowed: frozenset[str] | None = field(default_factory=_allowed)
    _classes: dict[Entry, type] = field(default_factory=dict, repr=False)

    @cached_property
    def _points(self) -> Any:
        """All entry points, read once."""
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
        catalog = cls(tuple(dict.fromkeys(local)), frozenset(blocked))
        catalog.check_blocked()
        return catalog

    def check_blocked(self) -> None:
        """See that what shall be kept out is known: a slip of the pen would let it in.

        Raises:
            PluginError: nothing has one of the names.
        """
        known = self.everything() if self.blocked else []
        for word in sorted(self.blocked):
            if not any(entry.is_among([word]) for entry in known):
                guess = did_you_mean(word, {name for e in known for name in (e.name, e.distribution)})
                raise PluginError(
                    f"-p no:{word}: no plugin and no package has this name{guess}",
                    hint="sslbench list   shows all of them",
                )

    def entries(self, kind: Kind) -> list[Entry]:
        """Every plugin of a kind that may be loaded, by name."""
        return [entry for entry in self._known(kind) if self._may_load(entry)]

    def names(self, kind: Kind) -> list[str]:
        return sorted({entry.name for entry in self.entries(kind)})

    def find(self, kind: Kind, name: str) -> Entry:
        """The entry that ``name`` (or ``distribution:name``) means.

        Raises:
            PluginError: nothing or more than one plugin has this name.
        """
        name = self.current_name(kind, name)
        wanted = [e for e in self.entries(kind) if _answers(e, name)]
        if not wanted:
            raise self._unknown(kind, name)
        if len(wanted) > 1:
            raise _claimed(f"two plugins claim the {kind} '{name}'", wanted)
        return wanted[0]

    def split(self, kind: Kind, text: str) -> tuple[str, str | None]:
        """A plugin's name and the value behind it: ``timm:resnet18`` is ``("timm", "resnet18")``.

        Nothing is imported. An address (``distribution:name``) is a name, and so is what no plugin answers to;
        ``distribution:name:value`` has both.
        """
        return _parted(text, _words(self._known(kind))) or (text, None)

    def options_of(self, kind: Kind, name: str, value: str | None) -> dict[str, str]:
        """The option that a value behind a plugin's name sets (its ``selector``).

        Raises:
            PluginError: the plugin takes no such value, or the value is empty.
        """
        if value is None:
            return {}
        selector = self.load(kind, name).selector
        if selector is None:
            raise PluginError(
                f"the {kind} '{name}' takes nothing behind its name, got '{name}:{value}'",
                hint=f"{name}, or an option of it: sslbench info {kind} {name}",
            )
        if not value:
            raise PluginError(f"'{name}:' lacks the {selector}", hint=f"{name}:{selector.upper()}")
        return {selector: value}

    def choose(self, kind: Kind, text: str) -> tuple[str, dict[str, str]]:
        """A plugin as users write it (``NAME`` or ``NAME:VALUE``), as its name and the options that sets."""
        name, value = self.split(kind, self.current_name(kind, text))
        return name, self.options_of(kind, name, value)

    def current_name(self, kind: Kind, text: str) -> str:
        """What a plugin is called now that had another name, with the value behind it; any other text as it is.

        Entry points of old names are in a group of their own, so that nobody is offered them. Nor can they take
        a name from a plugin that has it now.

        Raises:
            PluginError: several plugins had this name, or the one that had it cannot be imported.
        """
        points = self._points.select(group=f"{KINDS[kind]}{RENAMED}")
        former = [entry for point in points if self._may_load(entry := Entry.of_point(kind, point))]
        found = _parted(text, _words(former))
        if found is None:
            return text
        known = _words(self._known(kind))
        if _parted(text, known):
            return text
        name, value = found
        claims = [entry for entry in former if _answers(entry, name)]
        if len(claims) > 1:
            raise _claimed(f"several plugins had the {kind} name '{name}'", claims)
        current = _current(claims[0])
        address = f"{claims[0].distribution}:{current}"
        renamed = address if name != claims[0].name and spelled(address) in known else current
        return renamed if value is None else f"{renamed}:{value}"

    def load(self, kind: Kind, name: str) -> type[Any]:
        """Import the plugin and return its class.

        Raises:
            PluginError: unknown, ambiguous, failing to import, or not keeping to its contract.
        """
        entry = self.find(kind, name)
        if entry not in self._classes:
            self._classes[entry] = _class_of(entry, _offered(entry))
        return self._classes[entry]

    def extensions(self) -> list[Extension]:
        """Every observer, imported; those that cannot be used say why."""
        from sslbench.plugin.extensions import local_extension, open_extension

        local = [extension for path in self.local if (extension := local_extension(path))]
        return [open_extension(entry) for entry in self.observers()] + local

    def observers(self) -> list[Registered]:
        """The extensions of installed packages that may be loaded."""
        return self._of_group(EXTENSIONS)

    def registries(self) -> list[Registered]:
        """The recipes and published results of installed packages."""
        return self._of_group(REGISTRIES)

    def everything(self) -> list[Registered]:
        """All that is installed, whether it may be loaded or not."""
        others = [registered(p) for group in (EXTENSIONS, REGISTRIES) for p in self._points.select(group=group)]
        return [*(entry for kind in KINDS for entry in self._known(kind)), *others]

    def _of_group(self, group: str) -> list[Registered]:
        found = [registered(point) for point in self._points.select(group=group)]
        return sorted((e for e in found if self._may_load(e)), key=lambda e: (e.distribution, e.name))

    def _known(self, kind: Kind) -> list[Entry]:
        found = [Entry.of_point(kind, point) for point in self._points.select(group=KINDS[kind])]
        found += [entry for path in self.local for entry in _local_entries(kind, path)]
        return sorted(found, key=lambda e: (e.name, e.distribution))

    def _may_load(self, entry: Registered) -> bool:
        return not entry.is_among(self.blocked) and not self._is_left_out(entry)

    def _is_left_out(self, entry: Registered) -> bool:
        if self.allowed is None or entry.is_local or entry.distribution == OWN:
            return False
        return not entry.is_among(self.allowed)

    def _unknown(self, kind: Kind, name: str) -> PluginError:
        hidden = [e for e in self._known(kind) if _answers(e, name)]
        for word in sorted(self.blocked):
            if any(entry.is_among([word]) for entry in hidden):
                return PluginError(f"the {kind} '{name}' is blocked by -p no:{word}", hint=f"drop -p no:{word}")
        if hidden:
            return PluginError(
                f"the {kind} '{name}' of {hidden[0].owner} is left out: {ONLY}={os.environ.get(ONLY, '')}",
                hint=f"unset {ONLY}, or add {hidden[0].distribution} to it",
            )
        guess = did_you_mean(name, self.names(kind))
        return PluginError(
            f"no {kind} is named '{name}'{guess}", hint=f"sslbench list {kind}s   shows all of them"
        )


def _answers(entry: Entry, name: str) -> bool:
    """Whether this is its name or its address."""
    return name == entry.name or spelled(name) == spelled(entry.address)


def _words(entries: Iterable[Entry]) -> dict[str, str]:
    """Names and addresses, by the form in which they are compared."""
    return {spelled(word): word for entry in entries for word in (entry.name, entry.address)}


def _parted(text: str, words: Mapping[str, str]) -> tuple[str, str | None] | None:
    """The longest of the words that a text begins with, and the value behind it; None: it begins with none."""
    parts = text.split(":")
    for count in range(len(parts), 0, -1):
        head = ":".join(parts[:count])
        if spelled(head) in words:
            return words[spelled(head)], None if head == text else text[len(head) + 1 :]
    return None


def _claimed(problem: str, entries: Sequence[Entry]) -> PluginError:
    owners = " and ".join(f"{e.owner} ({e.module})" for e in entries)
    addresses = dict.fromkeys(spelled(e.address) for e in entries)
    if len(addresses) == len(entries):
        advice = f"name one: {' or '.join(e.address for e in entries)}"
    else:  # files of the same name, or classes of one file
        advice = "give one of them another name = ..., or leave one out"
    return PluginError(f"{problem}: {owners}", hint=advice)


def _current(entry: Entry) -> str:
    """The name that a plugin has now, told to the user; what its classes never were called stays as it is."""
    renamed = [getattr(cls, "renamed", {}).get(entry.name) for cls in _offered(entry)]
    found = next(filter(None, renamed), None)
    if found is None:
        return entry.name
    tell_user(found.notice(entry.kind, entry.name))
    return str(found.to)


def _local_entries(kind: Kind, path: Path) -> list[Entry]:
    hook, module = f"sslbench_{kind}s", import_file(path)
    check_has_hooks(module, path)
    classes = offered(module, hook, str(path), f"plugin file {path}")
    for cls in classes:
        if not isinstance(getattr(cls, "name", None), str):
            raise PluginError(
                f"plugin file {path}: {hook} offers {cls!r}, which has no name",
                hint=f'set name = "..." on the class: what --{kind} takes',
            )
    return [Entry(cls.name, str(path), path.stem, "local", path, kind) for cls in classes]


def _existing_file(value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise PluginError(
            f"-p {value}: there is no such file", hint="-p takes a Python file, or no:NAME to block a plugin"
        )
    return path.resolve()


def _offered(entry: Entry) -> list[Any]:
    what = f"{entry.kind} '{entry.name}'"
    module = import_registered(entry, what)
    classes = offered(module, f"sslbench_{entry.kind}s", entry.address, f"{what} of {entry.distribution}")
    if not classes:
        raise PluginError(
            f"{entry.module} has no hook that offers {entry.kind}s",
            hint=f"add @hookimpl def sslbench_{entry.kind}s(): return [YourClass]",
        )
    return classes


def _class_of(entry: Entry, classes: list[Any]) -> type:
    from sslbench.plugin import api  # with torch, which a listing can do without

    base = getattr(api, _BASES[entry.kind])
    matching = [cls for cls in classes if getattr(cls, "name", None) == entry.name]
    if not matching:
        names = ", ".join(repr(getattr(cls, "name", cls)) for cls in classes)
        raise PluginError(
            f"{entry.module} is registered as {entry.kind} '{entry.name}' but offers {names}",
            hint=f'set name = "{entry.name}" on the class or mend the entry point',
        )
    cls = cast("type[Any]", matching[0])
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise PluginError(f"{entry.module}: {cls!r} must be a subclass of sslbench.plugin.api.{base.__name__}")
    if inspect.isabstract(cls):
        missing = ", ".join(sorted(cls.__abstractmethods__))
        raise PluginError(
            f"{entry.kind} '{entry.name}' of {entry.owner}: {cls.__name__} does not define {missing}",
            hint=f"what it must return is in the docstring of sslbench.plugin.api.{base.__name__}",
        )
    if not issubclass(cls.Config, api.Options):
        raise PluginError(f"{entry.module}: {cls.__name__}.Config must be a subclass of Options")
    return cls
