"""A page for each built-in plugin, and the index of them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import yaml
from pydantic import BaseModel

from sslbench.config.registry import Registry
from sslbench.config.tree import merge, plain
from sslbench.plugin.catalog import KINDS, Catalog, Entry, Kind
from sslbench.plugin.viewspec import ViewSpec
from sslbench.report.describe import describe_options, nested_models
from sslbench.report.reference.markdown import first_line, option_table, prose, table

_INDEX = """# Built-in plugins

What comes with sslbench. `sslbench info KIND NAME` prints the same for any plugin, yours included.
"""
_PREFIX: dict[Kind, str] = {"method": "method.", "dataset": "dataset.", "backbone": "backbone."}


class Family(NamedTuple):
    """The plugins of one module, which share a page."""

    kind: Kind
    entries: tuple[Entry, ...]
    classes: tuple[Any, ...]

    @property
    def path(self) -> str:
        """Of the page, in the folder of the reference."""
        module = self.entries[0].module.rpartition(".")[2]
        return f"{self.kind}s/{self.entries[0].name if len(self.entries) == 1 else module}.md"

    @property
    def doc(self) -> str | None:
        module = inspect.getmodule(self.classes[0])
        return module.__doc__ if module else None


def plugin_pages(catalog: Catalog, registry: Registry) -> dict[str, str]:
    """The index and all pages."""
    families = [family for kind in KINDS for family in _families(catalog, kind)]
    used = _used(registry)
    return {"plugins.md": _index(families)} | {f.path: "\n".join(_page(f, registry, used)) for f in families}


def _families(catalog: Catalog, kind: Kind) -> Iterator[Family]:
    own = [entry for entry in catalog.entries(kind) if entry.distribution == "sslbench"]
    for _, group in groupby(sorted(own, key=lambda e: (e.module, _natural(e.name))), key=lambda e: e.module):
        entries = tuple(group)
        yield Family(kind, entries, tuple(catalog.load(kind, entry.name) for entry in entries))


def _index(families: Sequence[Family]) -> str:
    parts = [_INDEX]
    for kind in KINDS:
        rows = [
            (f"[{entry.name}]({family.path})", _gist(family, cls))
            for family in families
            if family.kind == kind
            for entry, cls in zip(family.entries, family.classes, strict=True)
        ]
        parts += [f"## {kind.capitalize()}s\n", table(("name", "what it is"), rows)]
    return "\n".join(parts)


def _gist(family: Family, cls: type[Any]) -> str:
    """What one plugin is: a file with several of them says it class by class."""
    return first_line(family.doc if len(family.entries) == 1 else vars(cls).get("__doc__") or family.doc)


def _page(family: Family, registry: Registry, used: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    kind, names = family.kind, [entry.name for entry in family.entries]
    yield f"# {', '.join(names)}\n"
    yield prose(family.doc) + "\n"
    yield "\n".join(f"- {fact}" for cls in family.classes for fact in _facts(kind, cls) if fact) + "\n"
    yield from _options(family)
    for cls in family.classes:
        if getattr(cls, "defaults", None):
            yield "## Core options it changes\n"
            yield f"```yaml\n{yaml.safe_dump(plain(cls.defaults), sort_keys=False)}```\n"
    recipes = [recipe for recipe, tree in used.items() if _names_in(tree, kind) & set(names)]
    if recipes:
        yield "## Recipes\n"
        yield _recipes(registry, recipes, sources=kind == "method")
    if kind == "method":
        yield from _references(registry, recipes)


def _options(family: Family) -> Iterator[str]:
    """One table for each set of options: plugins of one module mostly share theirs."""
    for model, group in groupby(zip(family.entries, family.classes, strict=True), key=lambda pair: pair[1].Config):
        names = [entry.name for entry, _ in group]
        alone = len(names) == len(family.entries)
        yield "## Options\n" if alone else f"## Options of {', '.join(names)}\n"
        prefix = _PREFIX.get(family.kind, f"evals.{names[0]}.")
        yield option_table(model, prefix) or "None.\n"
        parts: list[type[BaseModel]] = nested_models(model)
        if ViewSpec in parts:
            yield "`ViewSpec` is explained in [options](../options.md#views).\n"
        for part in parts:
            if part.__module__ != ViewSpec.__module__:
                yield f"### {part.__name__}\n"
                yield f"{inspect.getdoc(part)}\n"
                yield option_table(part)
        if any(row["cosmetic"] for row in describe_options(model)):
            yield "° stays out of the configuration hash.\n"


def _facts(kind: Kind, cls: Any) -> list[str]:
    """What a class declares beside its options."""
    if kind == "method":
        return _method_facts(cls)
    if kind == "backbone":
        has = ", ".join(f"`{name}`" for name in sorted(cls.provides))
        width = f"{cls.dim} features; " if hasattr(cls, "dim") else ""
        return [f"{cls.name}: {first_line(cls.__doc__)} {width}provides {has}"]
    if kind == "eval":
        opens = ", ".join(f"`{split}`" for split in sorted(cls.splits)) or "none itself"
        metrics = ", ".join(f"`{name}` ({way})" for name, way in cls.metrics.items())
        return [f"{cls.name}: version {cls.version}; opens {opens}; metrics {metrics}; headline `{cls.primary}`"]
    return [first_line(cls.__doc__)]


def _method_facts(cls: Any) -> list[str]:
    needs = ", ".join(f"`{name}`" for name in sorted(cls.requires)) or "nothing"
    facts = [f"needs of the backbone: {needs}"]
    if cls.uses_labels:
        facts.append("trains with labels: shown as an upper bound, never ranked")
    if not cls.trains:
        facts.append("does not train")
    if cls.accumulates:
        facts.append("its gradient can be computed in parts (`train.accumulate`)")
    if not cls.shardable:
        facts.append("not with `train.parallel=fsdp`")
    return facts


def _used(registry: Registry) -> dict[str, dict[str, Any]]:
    """Recipes with their complete values, those they extend included."""
    merged: dict[str, dict[str, Any]] = {}
    for name in registry.recipes:
        merged[name] = {}
        for origin, part in registry.recipe_chain(name):
            merge(merged[name], part.config, origin, {})
    return merged


def _names_in(tree: Mapping[str, Any], kind: Kind) -> set[str]:
    """The plugins of a kind that a recipe names."""
    if kind == "eval":
        return {*tree.get("evals", {}), *tree.get("run", {}).get("evals", ())}
    return {str(tree.get(kind, {}).get("name"))}


def _recipes(registry: Registry, names: Sequence[str], sources: bool) -> str:
    rows = [(f"`{name}`", registry.recipes[name].summary, registry.recipes[name].source) for name in names]
    columns = ("recipe", "what it is", "source")[: 3 if sources else 2]
    return table(columns, [row[: len(columns)] for row in rows])


def _references(registry: Registry, recipes: Sequence[str]) -> Iterator[str]:
    rows = [
        (
            f"`{reference.recipe}`",
            f"`{reference.metric}`" if reference.measurable else reference.metric,
            f"{reference.value:g} ± {reference.tolerance:g}",
            reference.source
            + ("" if reference.verified else " (not verified)")
            + (f"; {reference.protocol_note}" if reference.protocol_note else ""),
        )
        for reference in registry.references
        if reference.recipe in recipes
    ]
    if rows:
        yield "## Published results\n"
        yield table(("recipe", "metric", "value", "source; how its protocol differs"), rows)


def _natural(name: str) -> Iterable[Any]:
    """``resnet8`` before ``resnet32``."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
