"""All checks together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sslbench.config.published import with_packages
from sslbench.config.registry import Registry
from sslbench.doctor import machine, plugins
from sslbench.doctor.finding import Check, Level
from sslbench.doctor.strays import files_without_entry_points
from sslbench.doctor.variables import variables
from sslbench.errors import SslbenchError
from sslbench.plugin.catalog import KINDS, ONLY, Catalog


def run_checks(catalog: Catalog, runs: Path, registry: Callable[[], Registry]) -> list[Check]:
    """All checks. One that fails never stops the others.

    Args:
        runs: folder of the run directories.
        registry: reads the registry file.
    """
    found = [*machine.versions(), *machine.devices(), machine.disk(runs), machine.store(), *variables()]
    broken = [check for path in catalog.local if (check := _broken_file(path))]
    if broken:
        names = {check.name for check in broken}
        catalog = replace(catalog, local=[path for path in catalog.local if str(path) not in names])
    found += broken
    loaded = plugins.load_all(catalog)
    found += [*plugins.imports(loaded), *plugins.clashes(catalog), *_left_out(catalog), *plugins.health(loaded)]
    found += files_without_entry_points(catalog, Path.cwd())
    checks, configured = _registries(catalog, registry)
    return [*found, *checks, *plugins.data_roots(loaded, configured), *plugins.compatibility(loaded)]


def _broken_file(path: Path) -> Check | None:
    """What is wrong with a file given with ``-p``."""
    try:
        Catalog((path,)).entries("method")
    except SslbenchError as error:
        return Check("plugins", str(path), "failure", error.message, error.hint or "mend the file")
    return None


def _registries(catalog: Catalog, registry: Callable[[], Registry]) -> tuple[list[Check], dict[str, str]]:
    """The registry files, and the root of the data set that the main one's defaults name."""
    try:
        main = registry()
    except SslbenchError as error:
        return [Check("recipes", "registry", "failure", error.message, error.hint or "")], {}
    library = with_packages(main, catalog.registries())
    checks = [Check("recipes", "registry", "ok", f"{len(main.recipes)} recipes")]
    for origin, package in library.sources.items():
        why = library.ignored.get(origin)
        number = sum(recipe.origin == origin for recipe in library.recipes.values())
        advice = f"report it to the authors of {package.distribution}" if why else ""
        level: Level = "warning" if why else "ok"
        checks.append(Check("recipes", f"registry of {origin}", level, why or f"{number} recipes", advice))
    for name, origins in library.claims.items():
        words = f"several packages have it: {' and '.join(origins)}"
        checks.append(Check("recipes", name, "warning", words, f"name one as PACKAGE:{name}"))
    dataset = main.defaults.get("dataset", {})
    root = dataset.get("root") if isinstance(dataset, dict) else None
    return checks, {str(dataset["name"]): str(root)} if root and "name" in dataset else {}


def _left_out(catalog: Catalog) -> Iterator[Check]:
    """What blocking and ``SSLBENCH_PLUGINS`` keep away, and words of theirs that mean nothing."""
    everything = catalog.everything()
    loadable: Iterable[object] = (e for kind in KINDS for e in catalog.entries(kind))
    kept = {*loadable, *catalog.observers(), *catalog.registries()}
    hidden = [entry.address for entry in everything if entry not in kept]
    if hidden:
        yield Check("plugins", "left out", "ok", ", ".join(dict.fromkeys(hidden)))
    for words, source in (
        (catalog.allowed or (), f"{ONLY}={os.environ.get(ONLY, '')}"),
        (catalog.blocked, "-p no:"),
    ):
        for word in sorted(words):
            if not any(entry.is_among([word]) for entry in everything):
                yield Check("plugins", word, "warning", f"{source} names it, and nothing installed has this name")
