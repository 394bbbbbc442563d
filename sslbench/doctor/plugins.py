"""Every plugin, imported in a process of its own: does it load, how long does it take, what fits together."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sslbench.doctor.child import SHARED, groups
from sslbench.doctor.finding import Check, Level, judged
from sslbench.plugin.catalog import KINDS, Catalog

IMPORT_SECONDS = 120.0
"""After which a module counts as hanging."""
SLOW_SECONDS = 1.0
"""Beyond what every run imports."""
_IMPORTTIME = re.compile(r"import time:\s*(\d+) \|\s*\d+ \|\s*(\S+)")
_MARK = "sslbench-doctor: from here on"


@dataclass(frozen=True)
class Loaded:
    """What became of one plugin."""

    kind: str
    name: str
    address: str
    module: str
    seconds: float
    answer: Mapping[str, Any]

    @property
    def facts(self) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.answer.get("facts", {})
        return found


def load_all(catalog: Catalog) -> list[Loaded]:
    """Import everything that may be loaded."""
    entries = [entry for kind in KINDS for entry in catalog.entries(kind)]
    wanted = groups(entries, catalog.observers())
    request = {
        "local": [str(path) for path in catalog.local],
        "blocked": sorted(catalog.blocked),
        "allowed": None if catalog.allowed is None else sorted(catalog.allowed),
        "seconds": IMPORT_SECONDS,
        "groups": wanted,
    }
    done = subprocess.run(
        [sys.executable, "-m", "sslbench.doctor.child"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        check=False,
    )
    answers = {answer["module"]: answer for answer in map(json.loads, done.stdout.splitlines())}
    return [loaded for group in wanted for loaded in _of_module(group, answers.get(group["module"]))]


def _of_module(group: Mapping[str, Any], answer: Mapping[str, Any] | None) -> Iterator[Loaded]:
    told = {(e["kind"], e["address"]): e for e in (answer or {}).get("entries", ())}
    failure = (answer or {"failure": "the process that imports plugins ended early"}).get("failure")
    seconds = (answer or {}).get("seconds", 0.0)
    for kind, name, address in group["entries"]:
        found = told.get((kind, address), {"problem": f"{group['module']}: {failure}"})
        yield Loaded(kind, name, address, group["module"], seconds, found)


def imports(loaded: Iterable[Loaded]) -> Iterator[Check]:
    """One row per plugin."""
    reasons: dict[str, str] = {}
    for plugin in loaded:
        distribution = plugin.address.partition(":")[0]
        advice = (
            plugin.answer.get("advice")
            or f"pip install --upgrade {distribution}, or block it: -p no:{distribution}"
        )
        name, data = f"{plugin.kind} {plugin.name}", {"seconds": round(plugin.seconds, 3), "from": distribution}
        if "missing" in plugin.answer:
            yield Check("plugins", name, "ok", f"not installed (optional): {plugin.answer['advice']}", data=data)
        elif "problem" in plugin.answer:
            yield Check("plugins", name, "failure", plugin.answer["problem"], advice, data)
        elif plugin.seconds > SLOW_SECONDS:
            reasons.setdefault(plugin.module, _slowest(plugin.module))
            words = f"{distribution}, import {plugin.seconds:.1f} s: {reasons[plugin.module]}"
            advice = "import what is heavy inside the function that needs it"
            yield Check("plugins", name, "warning", words, advice, data)
        else:
            yield Check("plugins", name, "ok", f"{distribution}, import {plugin.seconds:.2f} s", data=data)


def health(loaded: Iterable[Loaded]) -> Iterator[Check]:
    """What extensions have to say of themselves."""
    for plugin in loaded:
        for name, passed, advice in plugin.answer.get("health", ()):
            words = f"{'passed' if passed else 'failed'}, {plugin.address}"
            yield judged("extensions", name, passed, words, advice)


def _slowest(module: str) -> str:
    """What takes most of the time of an import, by itself and without what plugins share."""
    shared = f"import sys, {', '.join(SHARED)}"
    loading = f"import runpy; runpy.run_path({module!r})" if module.endswith(".py") else f"import {module}"
    code = f"{shared}; print({_MARK!r}, file=sys.stderr, flush=True); {loading}"
    try:
        done = subprocess.run(
            [sys.executable, "-X", "importtime", "-c", code],
            capture_output=True,
            text=True,
            timeout=IMPORT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return "what takes so long cannot be told"
    rows = [(int(m[1]), m[2]) for m in _IMPORTTIME.finditer(done.stderr.rpartition(_MARK)[2])]
    top = sorted(rows, reverse=True)[:3]
    return "most in " + ", ".join(f"{name} ({microseconds / 1e6:.1f} s)" for microseconds, name in top)


def clashes(catalog: Catalog) -> Iterator[Check]:
    """Names that several packages claim."""
    for kind in KINDS:
        owners: dict[str, list[str]] = {}
        for entry in catalog.entries(kind):
            owners.setdefault(entry.name, []).append(f"{entry.owner} ({entry.module})")
        for name, claimed in owners.items():
            if len(claimed) > 1:
                words = f"several packages claim it: {' and '.join(claimed)}"
                yield Check("plugins", f"{kind} {name}", "failure", words, "block one: -p no:PACKAGE")


def compatibility(loaded: Iterable[Loaded]) -> Iterator[Check]:
    """Methods times backbones: what one requires against what the other provides."""
    plugins = list(loaded)
    backbones = {p.name: set(p.facts["provides"]) for p in plugins if p.kind == "backbone" and p.facts}
    for method in (p for p in plugins if p.kind == "method" and p.facts):
        required = set(method.facts["requires"])
        fits = [name for name, provided in backbones.items() if required <= provided]
        lacking = [name for name in backbones if name not in fits]
        needs = f"needs {', '.join(sorted(required)) or 'nothing'}"
        words = f"{needs}; not with {', '.join(lacking)}" if lacking else f"{needs}; with every backbone"
        level: Level = "warning" if backbones and not fits else "ok"
        yield Check("compatibility", method.name, level, words, data={"fits": fits, "lacking": lacking})


def data_roots(loaded: Iterable[Loaded], configured: Mapping[str, str]) -> Iterator[Check]:
    """Where data sets look for their files.

    Args:
        configured: root of a data set that the registry's defaults name.
    """
    for plugin in loaded:
        if plugin.kind != "dataset" or "layout" not in plugin.facts:
            continue
        root = configured.get(plugin.name) or plugin.facts["root"]
        there = root is not None and Path(root).expanduser().is_dir()
        words = f"{root}: {'found' if there else 'not found'}" if root else "no root configured"
        layout = plugin.facts["layout"]
        advice = "" if there else f"dataset.root=PATH{f'; expected layout: {layout}' if layout else ''}"
        yield Check("data", plugin.name, "ok", words, advice, {"root": root, "found": there, "layout": layout})
