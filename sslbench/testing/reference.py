"""Which plugin is meant, said so that other processes find it too."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Self

from sslbench.errors import PluginError
from sslbench.plugin.catalog import Catalog, Kind


@dataclass(frozen=True)
class PluginReference:
    """A plugin by the name it is installed under, by its file, or by its class."""

    kind: Kind
    name: str
    file: Path | None = None
    module: str | None = None
    """Of a class, whose qualified name ``name`` is then."""

    @classmethod
    def of(cls, kind: Kind, plugin: type[Any] | str | Path | PluginReference) -> PluginReference:
        """
        Raises:
            PluginError: a class that other processes cannot find, or a file without exactly one of the kind.
        """
        if isinstance(plugin, PluginReference):
            return plugin
        if isinstance(plugin, type):
            return cls._of_class(kind, plugin)
        if isinstance(plugin, Path) or plugin.endswith(".py"):
            return cls._of_file(kind, Path(plugin).resolve())
        return cls(kind, plugin)

    @classmethod
    def in_catalog(cls, catalog: Catalog, kind: Kind, name: str) -> Self:
        """
        Raises:
            PluginError: nothing or more than one plugin of the catalogue has this name.
        """
        entry = catalog.find(kind, name)
        return cls(kind, entry.address, Path(entry.module) if entry.version == "local" else None)

    @classmethod
    def _of_class(cls, kind: Kind, plugin: type[Any]) -> Self:
        if "<locals>" in plugin.__qualname__:
            raise PluginError(
                f"{plugin.__qualname__} is defined inside a function, where other processes cannot find it",
                hint="define the class at the top of its module",
            )
        return cls(kind, plugin.__qualname__, Path(inspect.getfile(plugin)).resolve(), plugin.__module__)

    @classmethod
    def _of_file(cls, kind: Kind, file: Path) -> Self:
        entries = Catalog.from_options([str(file)]).entries(kind)
        names = [entry.name for entry in entries if entry.version == "local"]
        if len(names) != 1:
            raise PluginError(
                f"{file.name} offers {len(names)} {kind}s: {', '.join(names) or 'none'}",
                hint="pass the class of the one that is meant",
            )
        return cls(kind, f"{file.stem}:{names[0]}", file)

    @property
    def title(self) -> str:
        """Its name in reports."""
        return str(getattr(self.load(), "name", self.name))

    def load(self) -> type[Any]:
        """The class, in any process."""
        if self.module is None:
            return Catalog(local=(self.file,) if self.file else ()).load(self.kind, self.name)
        found: Any = self._imported(self.module)
        for part in self.name.split("."):
            found = getattr(found, part)
        return found  # type: ignore[no-any-return]

    def _imported(self, module: str) -> ModuleType:
        """By its name, or from its file where this process does not know the name."""
        if module in sys.modules and module != "__main__":
            return sys.modules[module]
        try:
            known = importlib.util.find_spec(module) if module != "__main__" else None
        except (ImportError, ValueError):
            known = None
        return importlib.import_module(module) if known else _from_file(self.file)


def _from_file(file: Path | None) -> ModuleType:
    assert file is not None
    spec = importlib.util.spec_from_file_location(f"sslbench_checked_{file.stem}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
