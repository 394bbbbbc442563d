"""What packages have registered, told from their metadata: nothing is imported here."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from importlib.machinery import ModuleSpec
    from importlib.metadata import Distribution, EntryPoint

Kind = Literal["method", "dataset", "backbone", "eval"]
KINDS: dict[Kind, str] = {
    "method": "sslbench.methods",
    "dataset": "sslbench.datasets",
    "backbone": "sslbench.backbones",
    "eval": "sslbench.evals",
}
EXTENSIONS = "sslbench.extensions"
REGISTRIES = "sslbench.registries"
RENAMED = ".renamed"
"""Ends the names of the groups for entry points of old names."""
OWN = "sslbench"
"""The distribution of the built-in plugins."""


@dataclass(frozen=True)
class Registered:
    """Something that a package, or a local file, has registered."""

    name: str
    module: str
    """Dotted module name, or the path of a local file."""
    distribution: str
    version: str
    """``local`` for a file named with ``-p``."""
    path: Path | None
    """Source file, if it can be told without importing."""

    @property
    def address(self) -> str:
        """The unambiguous name, ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def owner(self) -> str:
        """Whose it is: distribution and version."""
        return f"{self.distribution} {self.version}"

    @property
    def is_local(self) -> bool:
        return self.version == "local"

    @property
    def summary(self) -> str:
        """First line of the module's docstring, read without importing it."""
        return _docstring_summary(self.path) if self.path else ""

    def identity(self) -> dict[str, str]:
        """Name, distribution, version, digests and git state, as every run records them."""
        from sslbench.plugin.provenance import identity

        return identity(self)

    def is_among(self, words: Iterable[str]) -> bool:
        """Whether one of the words is its name, its distribution, or both as ``distribution:name``."""
        own = (normalized(self.distribution), spelled(self.address))
        return any(word == self.name or _normalized_address(word) in own for word in words)


@dataclass(frozen=True)
class Entry(Registered):
    """A plugin the catalogue knows of, without having imported it."""

    kind: Kind

    @classmethod
    def of_point(cls, kind: Kind, point: EntryPoint) -> Entry:
        return cls(**_fields(point), kind=kind)


def registered(point: EntryPoint) -> Registered:
    """What an entry point of no plugin kind stands for: an extension, a registry."""
    return Registered(**_fields(point))


def _fields(point: EntryPoint) -> dict[str, Any]:
    name, version = _named(point.dist) if point.dist else ("unknown", "unknown")
    # An author may have written module:Class, as for console scripts; the module's hooks say which class.
    module = point.value.partition(":")[0].strip()
    return {
        "name": point.name,
        "module": module,
        "distribution": name,
        "version": version,
        "path": source_of(module),
    }


def entry_points() -> Any:
    """All entry points of this environment: a file of every installed distribution is opened."""
    from importlib import metadata

    try:
        return metadata.entry_points()
    except (UnicodeDecodeError, ValueError):  # a damaged file of one package must not hide all others
        return metadata.EntryPoints(p for d in metadata.distributions() for p in _points_of(d))


def _points_of(distribution: Distribution) -> list[EntryPoint]:
    try:
        return list(distribution.entry_points)
    except (UnicodeDecodeError, ValueError):
        return []


@cache
def _named(distribution: Distribution) -> tuple[str, str]:
    """Name and version, from the first lines: importlib parses the whole file, README included, as an email."""
    try:
        text = distribution.read_text("METADATA") or distribution.read_text("PKG-INFO") or ""
    except UnicodeDecodeError:
        text = ""
    fields = dict(line.split(": ", 1) for line in text.partition("\n\n")[0].splitlines() if ": " in line)
    return fields.get("Name", "unknown"), fields.get("Version", "unknown")


@cache
def source_of(module: str) -> Path | None:
    """Where a module's source lies, importing nothing (``find_spec`` of a top-level name executes no code)."""
    top, *rest = module.split(".")
    spec = found(top)
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
def found(top: str) -> ModuleSpec | None:
    """The spec of a top-level module or package."""
    try:
        return importlib.util.find_spec(top)
    except (ImportError, ValueError):
        return None


def normalized(distribution: str) -> str:
    """The form in which names of distributions are compared (``My_SSL.pkg`` is ``my-ssl-pkg``)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


def spelled(word: str) -> str:
    """A name as it is; an address (``distribution:name``) in the form in which addresses are compared."""
    return _normalized_address(word) if ":" in word else word


def _normalized_address(word: str) -> str:
    distribution, colon, name = word.partition(":")
    return f"{normalized(distribution)}{colon}{name}"


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
