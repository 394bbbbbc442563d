"""Listings, in plain text: what is installed and what was run. They answer at once, so rich stays out."""

from __future__ import annotations

import json
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sslbench.plugin.catalog import Catalog, Kind
from sslbench.plugin.entry import OWN
from sslbench.terminal import is_terminal
from sslbench.untrusted import printable

if TYPE_CHECKING:
    from sslbench.config.registry import Registry

_GAP = "   "
#: A column that is cut into lines keeps at least this many letters.
_NARROWEST = 8


def list_plugins(catalog: Catalog, kinds: Sequence[Kind], as_json: bool) -> None:
    """One table per kind, from metadata alone."""
    entries = [entry for kind in kinds for entry in catalog.entries(kind)]
    if as_json:
        fields = ("kind", "name", "summary", "distribution", "version", "module")
        print_json([{name: getattr(entry, name) for name in fields} for entry in entries])
        return
    for kind in kinds:
        rows = [
            (entry.name, entry.summary, f"{entry.distribution} {entry.version}")
            for entry in entries
            if entry.kind == kind
        ]
        print_table(f"{kind}s", ("name", "what it is", "from"), rows)


def list_recipes(registry: Registry, as_json: bool) -> None:
    """Recipes; in JSON with where their values come from, for which a line has no room."""
    rows = {
        name: recipe.model_dump(include={"summary", "source", "extends"}) | {"origin": recipe.origin}
        for name, recipe in registry.recipes.items()
    }
    if as_json:
        print_json([{"name": name, **row} for name, row in rows.items()])
        return
    cells = [(name, row["summary"], row["origin"]) for name, row in rows.items()]
    # Where all are of one origin, a column of it says nothing.
    columns = 3 if any(row["origin"] != OWN for row in rows.values()) else 2
    header = ("name", "what it is", "from")[:columns]
    print_table(
        "recipes (values and source of one: sslbench info recipe NAME)", header, [c[:columns] for c in cells]
    )


def list_runs(root: Path, as_json: bool) -> None:
    """Pretrained models under the runs folder, oldest first."""
    from sslbench.engine.runs import pretrained_runs
    from sslbench.report.results import run_status

    runs = pretrained_runs(root)
    if as_json:
        print_json([{**record, "run_dir": str(path)} for record, path in runs])
        return
    names = ("method", "dataset", "backbone", "epochs", "seed")
    rows = []
    for record, path in runs:
        tags = record.get("tags", {})
        status = run_status(record, path) + (" (limited)" if tags.get("sslbench.limited") == "true" else "")
        status += " (rolled back)" if tags.get("sslbench.rolled_back") else ""
        rows.append((str(record.get("name")), status, *(tags.get(f"sslbench.{name}", "") for name in names)))
    print_table(f"runs in {root}", ("name", "status", *names), rows)


def print_json(content: Any) -> None:
    """Machine-readable output."""
    print(json.dumps(content, default=str, indent=2))  # noqa: T201 - results go to stdout


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout, as wide as the terminal at most; on a pipe each row is one line."""
    width = shutil.get_terminal_size().columns if is_terminal() else None
    title, rows = printable(title), [[printable(cell) for cell in row] for row in rows]
    lines = table_lines(columns, rows, width)
    encoding = getattr(sys.stdout, "encoding", None) or ""
    rule = "─" if encoding.lower().startswith("utf") else "-"
    print(_bold(title), _bold(lines[0]), rule * max(map(len, lines)), *lines[1:], "", sep="\n")  # noqa: T201


def table_lines(columns: Sequence[str], rows: Sequence[Sequence[str]], width: int | None) -> list[str]:
    """Header and rows; cells that would exceed the width go on in the next line."""
    widths = _widths([columns, *rows], width)
    lines = []
    for row in [columns, *rows]:
        cells = [textwrap.wrap(cell, room) or [""] for cell, room in zip(row, widths, strict=True)]
        for parts in zip_longest(*cells, fillvalue=""):
            padded = (part.ljust(room) for part, room in zip(parts, widths, strict=True))
            lines.append(_GAP.join(padded).rstrip())
    return lines


def _widths(rows: Sequence[Sequence[str]], width: int | None) -> list[int]:
    """Letters per column. The widest gives way until the row fits, names, which people type again, last."""
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    room = (width or sys.maxsize) - len(_GAP) * (len(widths) - 1)
    while sum(widths) > room and max(widths) > _NARROWEST:
        first = 1 if max(widths[1:], default=0) > _NARROWEST else 0
        widths[widths.index(max(widths[first:]), first)] -= 1
    return widths


def _bold(text: str) -> str:
    plain = not is_terminal() or "NO_COLOR" in os.environ or os.environ.get("TERM") == "dumb"
    return text if plain else f"\033[1m{text}\033[0m"
