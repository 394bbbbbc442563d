"""registry.yaml: recipes (reviewed hyper-parameters with their source) and published results."""

from __future__ import annotations

import os
import sysconfig
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import Field, PrivateAttr, ValidationError

from sslbench.config.options import Options
from sslbench.config.tree import read_yaml
from sslbench.errors import ConfigError, did_you_mean

FILE_NAME = "registry.yaml"
ENVIRONMENT = "SSLBENCH_REGISTRY"


class _Reviewed(Options):
    _origin: str = PrivateAttr("sslbench")

    @property
    def origin(self) -> str:
        """The package it comes from, with its version; ``sslbench`` for the registry file itself."""
        return self._origin

    def of(self, origin: str, **changes: Any) -> Self:
        """The same as a part of another package."""
        copy = self.model_copy(update=changes)
        copy._origin = origin
        return copy


class Recipe(_Reviewed):
    """A complete, reviewed set of options."""

    summary: str
    source: str
    """Where the values come from: paper, section, file of the authors' program, or our own measurement."""
    extends: str | None = None
    """Another recipe whose values this one starts from."""
    config: dict[str, Any] = Field(default_factory=dict)


class Reference(_Reviewed):
    """A published result of a recipe."""

    recipe: str
    metric: str
    """Metric key, such as ``eval/test.v1/imagenet/top1``; in words if no protocol here measures it."""
    value: float
    tolerance: float = Field(ge=0)
    """How far a reproduction may be away, in the metric's units."""
    source: str
    verified: bool = True
    """False: taken from a source that could not be checked."""
    protocol_note: str | None = None
    """How the published protocol differs from ours."""

    @property
    def measurable(self) -> bool:
        """Whether a protocol here measures it."""
        return self.metric.startswith("eval/")


class Registry(Options):
    """The contents of one registry file."""

    version: int
    defaults: dict[str, Any] = Field(default_factory=dict)
    recipes: dict[str, Recipe] = Field(default_factory=dict)
    references: tuple[Reference, ...] = ()

    def resolve(self, name: str) -> str:
        """The key of ``recipes`` that a user means.

        Raises:
            ConfigError: nothing has this name.
        """
        if name in self.recipes:
            return name
        raise ConfigError(
            f"no recipe is named '{name}'{did_you_mean(name, self.recipes)}",
            hint="sslbench list recipes   shows all of them",
        )

    def sources_of(self, recipe: str | None) -> list[dict[str, str]]:
        """Identities of the packages whose registries took part in a recipe, and of those that were ignored."""
        return []

    def recipe_chain(self, name: str) -> list[tuple[str, Recipe]]:
        """The recipe and those it extends, base first.

        Raises:
            ConfigError: unknown recipe, or recipes that extend each other in a circle.
        """
        chain: list[tuple[str, Recipe]] = []
        current: str | None = self.resolve(name)
        while current is not None:
            if current not in self.recipes:
                child, recipe = chain[0]
                guess = did_you_mean(current, self.recipes)
                raise ConfigError(
                    f"recipe '{child}' of {recipe.origin} extends '{current}', which there is not{guess}",
                    hint="sslbench list recipes   shows all of them",
                )
            if any(current == seen for seen, _ in chain):
                raise ConfigError(f"recipe '{name}' extends itself through '{current}'")
            chain.insert(0, (current, self.recipes[current]))
            current = self.recipes[current].extends
        return chain


def find_registry(option: Path | None = None) -> Path:
    """``--registry``, ``SSLBENCH_REGISTRY``, the nearest registry.yaml upward, or the installed copy.

    A registry.yaml found upward that is not ours (no ``recipes`` key) is passed over.
    """
    named = option or (Path(os.environ[ENVIRONMENT]) if os.environ.get(ENVIRONMENT) else None)
    if named is not None:
        if not named.is_file():
            raise ConfigError(f"registry file {named} does not exist", hint=f"check --registry or {ENVIRONMENT}")
        return named
    for folder in (Path.cwd(), *Path.cwd().parents):
        candidate = folder / FILE_NAME
        if candidate.is_file() and "recipes:" in candidate.read_text(encoding="utf-8"):
            return candidate
    return _installed_copy()


def _installed_copy() -> Path:
    beside_package = Path(__file__).resolve().parents[2] / FILE_NAME
    shared = Path(sysconfig.get_path("data"), "share", "sslbench", FILE_NAME)
    for candidate in (beside_package, shared):
        if candidate.is_file():
            return candidate
    raise ConfigError(
        f"the installed {FILE_NAME} is missing ({shared})", hint="reinstall sslbench or pass --registry FILE"
    )


def load_registry(path: Path) -> Registry:
    """Read and validate a registry file."""
    try:
        raw = read_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    try:
        return Registry.model_validate(raw)
    except ValidationError as error:
        rows = "\n".join(f"  {'.'.join(map(str, e['loc']))}   {e['msg']}" for e in error.errors())
        raise ConfigError(f"{path} is not a valid registry:\n{rows}") from error
