"""What a run remembers of the plugins that took part in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Identities = Sequence[Mapping[str, str]]
"""As :meth:`sslbench.plugin.entry.Registered.identity` gives them, each with its ``kind``."""


def plugin_tags(plugins: Identities) -> dict[str, str]:
    """One tag per kind, such as ``sslbench.plugin.method``; of a kind that has several, all in one."""
    from sslbench.plugin.provenance import short

    told: dict[str, list[str]] = {}
    for plugin in plugins:
        problem = f" ({plugin['problem']})" if "problem" in plugin else ""
        told.setdefault(f"sslbench.plugin.{plugin['kind']}", []).append(short(plugin) + problem)
    return {tag: "; ".join(words) for tag, words in told.items()}


def new_ones(before: Identities, now: Identities) -> list[dict[str, str]]:
    """Those that a run has not had in this form."""
    return [dict(plugin) for plugin in now if plugin not in before]


def changed(before: Identities, now: Identities) -> list[str]:
    """A sentence for each package whose files are not those that a run began with."""
    known: dict[str, set[str]] = {}
    for plugin in before:
        known.setdefault(plugin.get("distribution", ""), set()).add(plugin.get("package_sha256", ""))
    differing: dict[str, list[str]] = {}
    for plugin in now:
        owner = plugin["distribution"]
        if owner in known and plugin["package_sha256"] not in known[owner]:
            differing.setdefault(f"{owner} {plugin['version']}", []).append(f"{plugin['kind']} {plugin['name']}")
    return [f"{owner} has changed since the run began: {', '.join(it)}" for owner, it in differing.items()]
