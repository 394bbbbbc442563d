"""Recipes and published results: are they read, and can anything here measure what they state?"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping

from sslbench.config.published import Library, with_packages
from sslbench.config.registry import Reference, Registry
from sslbench.doctor.finding import Check, Level
from sslbench.doctor.plugins import Loaded
from sslbench.errors import SslbenchError, did_you_mean
from sslbench.plugin.catalog import Catalog

_KEY = re.compile(r"eval/(?P<name>[^/]+)\.v(?P<version>\d+)/(?P<dataset>[^/]+)/(?P<metric>.+)")


def registries(
    catalog: Catalog, registry: Callable[[], Registry], loaded: Iterable[Loaded]
) -> tuple[list[Check], dict[str, str]]:
    """The registry files, and the root of the data set that the main one's defaults name.

    Args:
        registry: reads the registry file.
        loaded: the plugins here, among them the protocols that published results may name.
    """
    try:
        main = registry()
    except SslbenchError as error:
        return [Check("recipes", "registry", "failure", error.message, error.hint or "")], {}
    library = with_packages(main, catalog.registries())
    protocols = {p.name: p.facts for p in loaded if p.kind == "eval"}
    checks = [Check("recipes", "registry", "ok", f"{len(main.recipes)} recipes"), *_packages(library)]
    checks += [check for reference in library.references if (check := _reference(reference, protocols))]
    dataset = main.defaults.get("dataset", {})
    root = dataset.get("root") if isinstance(dataset, dict) else None
    return checks, {str(dataset["name"]): str(root)} if root and "name" in dataset else {}


def _packages(library: Library) -> Iterator[Check]:
    for origin, package in library.sources.items():
        why = library.ignored.get(origin)
        number = sum(recipe.origin == origin for recipe in library.recipes.values())
        advice = f"report it to the authors of {package.distribution}" if why else ""
        level: Level = "warning" if why else "ok"
        yield Check("recipes", f"registry of {origin}", level, why or f"{number} recipes", advice)
    for name, origins in library.claims.items():
        words = f"several packages have it: {' and '.join(origins)}"
        yield Check("recipes", name, "warning", words, f"name one as PACKAGE:{name}")


def _reference(reference: Reference, protocols: Mapping[str, Mapping[str, object]]) -> Check | None:
    """What keeps a published result from ever being compared with."""
    why = _flaw(reference, protocols) if reference.measurable else None
    if why is None:
        return None
    return Check(
        "recipes", f"reference of {reference.recipe}", "warning", f"{reference.metric}: {why}", _advice(reference)
    )


def _flaw(reference: Reference, protocols: Mapping[str, Mapping[str, object]]) -> str | None:
    key = _KEY.fullmatch(reference.metric)
    if key is None:
        return "not of the form eval/PROTOCOL.vN/DATASET/METRIC"
    name = key["name"]
    if name not in protocols:
        return f"no evaluation is named '{name}'{did_you_mean(name, protocols)}"
    facts = protocols[name]
    if facts and facts["version"] != int(key["version"]):
        return f"{name} has version {facts['version']} here"
    known = facts.get("metrics", ())
    if facts and isinstance(known, list) and key["metric"] not in known:
        return f"{name} does not measure '{key['metric']}'{did_you_mean(key['metric'], known)}"
    return None


def _advice(reference: Reference) -> str:
    return f"metric: eval/PROTOCOL.vN/DATASET/METRIC, as compare --reference shows it ({reference.origin})"
