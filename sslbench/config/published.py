"""Recipes and published results that installed packages ship, beside those of the registry file.

A package names the folder of its ``registry.yaml`` by an entry point of the group ``sslbench.registries``. The
file is read when somebody asks for a recipe; nothing is imported. One that cannot be used is left out and named.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sslbench.config.registry import FILE_NAME, Recipe, Reference, Registry, load_registry
from sslbench.errors import ConfigError
from sslbench.plugin.entry import OWN, Registered, spelled


@dataclass(frozen=True)
class _Part:
    """One file's contribution."""

    distribution: str
    origin: str
    registry: Registry

    def key(self, name: str, clashing: Container[str], main: Container[str] = ()) -> str:
        """What a recipe that this file names is called beside all others: its own one, or that of ``main``."""
        if name not in clashing:
            return name
        if name in self.registry.recipes:
            return f"{self.distribution}:{name}"
        return f"{OWN}:{name}" if name in main else name

    def recipes(self, clashing: Container[str], main: Container[str]) -> dict[str, Recipe]:
        """Its recipes under their keys."""
        return {
            self.key(name, clashing): recipe.of(
                self.origin, extends=self.key(recipe.extends, clashing, main) if recipe.extends else None
            )
            for name, recipe in self.registry.recipes.items()
        }

    def references(self, clashing: Container[str], main: Container[str]) -> list[Reference]:
        """Its published results, of its own recipes or of those of ``main``."""
        return [r.of(self.origin, recipe=self.key(r.recipe, clashing, main)) for r in self.registry.references]


class Library(Registry):
    """The registry file and those of installed packages.

    A name that several claim is none: each is called ``distribution:name`` then, which is always understood.
    """

    claims: dict[str, tuple[str, ...]]
    """A name -> origins, for names that several have."""
    addresses: dict[str, str]
    """``distribution:name``, as addresses are compared -> key of ``recipes``."""
    sources: dict[str, Registered]
    """Origin -> the package."""
    ignored: dict[str, str]
    """Origin -> why its file is not used."""

    @property
    def problems(self) -> list[str]:
        """Sentences about files that are not used."""
        return [
            f"the recipes of {origin} are ignored: {why}\n  Next: report it to the authors of "
            f"{self.sources[origin].distribution}; -p no:{self.sources[origin].distribution} leaves them out"
            for origin, why in self.ignored.items()
        ]

    def resolve(self, name: str) -> str:
        """The key of ``recipes`` that a user means.

        Raises:
            ConfigError: nothing has this name, or several packages.
        """
        if name in self.claims:
            choices = [address for address in self.addresses if address.partition(":")[2] == name]
            raise ConfigError(
                f"several packages have a recipe '{name}': {' and '.join(self.claims[name])}",
                hint=f"name one: {' or '.join(choices)}",
            )
        return super().resolve(self.addresses.get(spelled(name), name))

    def sources_of(self, recipe: str | None) -> list[dict[str, str]]:
        """Identities of the packages whose registries took part in a recipe, and of those that were ignored."""
        chain = [part.origin for _, part in self.recipe_chain(recipe)] if recipe else []
        used = [self._identity(origin) for origin in dict.fromkeys(chain) if origin in self.sources]
        return used + [self._identity(origin) | {"problem": why} for origin, why in self.ignored.items()]

    def _identity(self, origin: str) -> dict[str, str]:
        return {"kind": "registry", **self.sources[origin].identity()}


def with_packages(main: Registry, packages: Sequence[Registered]) -> Library:
    """The registry file together with those of installed packages."""
    parts, ignored = [_Part(OWN, OWN, main)], {}
    for package in packages:
        try:
            parts.append(_Part(package.distribution, package.owner, _read(package)))
        except ConfigError as error:
            ignored[package.owner] = error.message
    counts = Counter(name for part in parts for name in part.registry.recipes)
    claims = {
        name: tuple(part.origin for part in parts if name in part.registry.recipes)
        for name, count in counts.items()
        if count > 1
    }
    return Library(
        version=main.version,
        defaults=main.defaults,
        recipes={key: recipe for part in parts for key, recipe in part.recipes(claims, main.recipes).items()},
        references=tuple(reference for part in parts for reference in part.references(claims, main.recipes)),
        claims=claims,
        addresses=_addresses(parts, claims),
        sources={package.owner: package for package in packages},
        ignored=ignored,
    )


def _addresses(parts: Sequence[_Part], claims: Mapping[str, object]) -> dict[str, str]:
    return {spelled(f"{p.distribution}:{name}"): p.key(name, claims) for p in parts for name in p.registry.recipes}


def _read(package: Registered) -> Registry:
    path = _file_of(package)
    registry = load_registry(path)
    if registry.defaults:
        raise ConfigError(f"{path} has defaults, which would change the runs of everybody who installs it")
    return registry


def _file_of(package: Registered) -> Path:
    """The registry.yaml in the folder of a package, or of the package that a module lies in."""
    if package.path is None:
        raise ConfigError(f"there is no package '{package.module}'; has it an __init__.py?")
    if package.path.name != "__init__.py" and "." not in package.module:
        raise ConfigError(f"'{package.module}' is a single module; {FILE_NAME} must lie in a package")
    return package.path.parent / FILE_NAME
