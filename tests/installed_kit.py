"""Lays down installed distributions as pip would: modules, a dist-info folder, entry points."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path

from sslbench.plugin import entry


def install(
    site: Path,
    name: str,
    files: Mapping[str, str],
    points: Mapping[str, Mapping[str, str]],
    version: str = "1.0",
) -> Path:
    """A distribution in the folder ``site``, with a RECORD.

    Args:
        files: path -> content.
        points: group behind ``sslbench.`` -> name -> value.

    Returns:
        The dist-info folder.
    """
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_text(content)
    info = site / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        "\n".join([f"[sslbench.{group}]", *(f"{key} = {value}" for key, value in entries.items())])
        for group, entries in points.items()
    ]
    (info / "entry_points.txt").write_text("\n\n".join(sections) + "\n")
    recorded = [*files, *(f"{info.name}/{part}" for part in ("METADATA", "entry_points.txt", "RECORD"))]
    (info / "RECORD").write_text("".join(f"{path},,\n" for path in recorded))
    importlib.invalidate_caches()
    for known in (entry.found, entry.source_of):  # of a package with this name in another test
        known.cache_clear()
    return info
