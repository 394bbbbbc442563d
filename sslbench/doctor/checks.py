"""All checks together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from sslbench.config.registry import Registry
from sslbench.doctor import machine, plugins, recipes
from sslbench.doctor.finding import Check
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
    checks, configured = recipes.registries(catalog, registry, loaded)
    return [*found, *checks, *plugins.data_roots(loaded, configured), *plugins.compatibility(loaded)]


def _broken_file(path: Path) -> Check | None:
    """What is wrong with a file given with ``-p``."""
    try:
        Catalog((path,)).entries("method")
    except SslbenchError as error:
        return Check("plugins", str(path), "failure", error.message, error.hint or "mend the file")
    return None


def _left_out(catalog: Catalog) -> Iterator[Check]:
    """What blocking and ``SSLBENCH_PLUGINS`` keep away, and words of the latter that mean nothing."""
    everything = catalog.everything()
    loadable: Iterable[object] = (e for kind in KINDS for e in catalog.entries(kind))
    kept = {*loadable, *catalog.observers(), *catalog.registries()}
    hidden = [entry.address for entry in everything if entry not in kept]
    if hidden:
        yield Check("plugins", "left out", "ok", ", ".join(dict.fromkeys(hidden)))
    for word in sorted(catalog.allowed or ()):
        if not any(entry.is_among([word]) for entry in everything):
            words = f"{ONLY}={os.environ.get(ONLY, '')} names it, and nothing installed has this name"
            yield Check("plugins", word, "warning", words)
