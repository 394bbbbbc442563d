"""A comparison as a terminal table, Markdown, CSV or JSON."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sslbench.plugin.entry import OWN
from sslbench.report.compare import Cell, Column, Comparison, Row, Verdict


def render_table(comparison: Comparison) -> Table:
    """A rich table: one row per configuration, best value of a column bold."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for header in _facts_header(comparison):
        table.add_column(header, justify="right" if header in ("epochs", "seeds") else "left")
    for column in comparison.columns:
        table.add_column(_header(column, "\n"), justify="right", no_wrap=True)
    for row in comparison.rows:
        cells = [_cell_text(row.cells.get(column)) for column in comparison.columns]
        table.add_row(*_facts(row, comparison), *cells)
    if comparison.remarks:
        table.caption = Text("\n".join(comparison.remarks))
    return table


def to_markdown(comparison: Comparison) -> str:
    """A Markdown table, best values in bold."""
    facts = _facts_header(comparison)
    header = [*facts, *(_header(column, " ") for column in comparison.columns)]
    align = [":--"] * len(facts) + ["--:"] * len(comparison.columns)
    lines = [_markdown_line(header), _markdown_line(align)]
    for row in comparison.rows:
        cells = [_markdown_cell(row.cells.get(column)) for column in comparison.columns]
        lines.append(_markdown_line([*_facts(row, comparison), *cells]))
    return "\n".join([*lines, *(f"\n{remark}" for remark in comparison.remarks)]) + "\n"


def overview(comparison: Comparison) -> str:
    """Markdown whose first line ranks the models, followed by the whole table.

    The ranking is by the column that most models have, the first of those: a transfer of one model ranks nobody.
    Models trained with labels stand behind it, as upper bounds.
    """
    if not comparison.columns or not comparison.rows:
        return "No finished evaluation yet."
    column = max(comparison.columns, key=lambda column: sum(column in row.cells for row in comparison.rows))
    scored = [(row, cell) for row in comparison.rows if (cell := row.cells.get(column)) is not None]
    scored.sort(key=lambda pair: pair[1].mean, reverse=column.direction == "max")
    named = [(row.uses_labels, f"**{row.method}** {cell}") for row, cell in scored]
    ranking = " > ".join([words for labels, words in named if not labels][:_RANKED])
    bounds = ", ".join([words for labels, words in named if labels][:_RANKED])
    places = "; ".join(filter(None, [ranking, bounds and f"with labels: {bounds}"]))
    line = f"{column.protocol} v{column.version}, {column.dataset}, {column.metric}: {places}"
    return f"{line}\n\n{to_markdown(comparison)}"


def to_csv(comparison: Comparison) -> str:
    """Mean, standard deviation and number of seeds of every cell, for spreadsheets."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = [f"{column.key} {column.remark}".strip() for column in comparison.columns]
    parts = [f"{name} {part}" for name in names for part in ("mean", "std", "n")]
    writer.writerow([*_FACTS, "remark", "uses_labels", *parts])
    for row in comparison.rows:
        cells = [row.cells.get(column) for column in comparison.columns]
        numbers = [value for cell in cells for value in _numbers(cell)]
        writer.writerow([*_plain_facts(row), row.remark, row.uses_labels, *numbers])
    return text.getvalue()


def to_json(comparison: Comparison) -> dict[str, Any]:
    """Plain data: rows with their cells by column number, columns, remarks."""
    return {
        "columns": [{"key": column.key, **asdict(column)} for column in comparison.columns],
        "rows": [
            {
                **{key: value for key, value in vars(row).items() if key != "cells"},
                "cells": [_json_cell(row.cells.get(column)) for column in comparison.columns],
            }
            for row in comparison.rows
        ],
        "remarks": list(comparison.remarks),
    }


def render_verdicts(verdicts: Sequence[Verdict]) -> Table:
    """Published results beside ours."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for header in ("recipe", "metric", "published", "ours", "verdict", "source"):
        table.add_column(header, justify="right" if header in ("published", "ours") else "left")
    for v in verdicts:
        published = f"{v.reference.value:g} ± {v.reference.tolerance:g}"
        doubt = "" if v.reference.verified else " (not verified)"
        doubt += "" if v.reference.origin == OWN else f" [{v.reference.origin}]"
        published += "" if v.reference.verified else " ?"
        table.add_row(
            v.row.recipe,
            v.reference.metric,
            published,
            str(v.cell) if v.cell else "-",
            Text(v.verdict, style=_VERDICT_STYLE[v.verdict]),
            Text(v.reference.source + doubt),
        )
    return table


_VERDICT_STYLE = {"reproduced": "green", "above": "cyan", "below": "red", "missing": "dim", "no protocol": "dim"}
#: How many models the first line of an overview names.
_RANKED = 8
_FACTS = ("method", "backbone", "pretrained on", "epochs", "seeds")


def _facts_header(comparison: Comparison) -> list[str]:
    return [*_FACTS, *(["differs in"] if any(row.remark for row in comparison.rows) else [])]


def _plain_facts(row: Row) -> list[str]:
    return [row.method, row.backbone, row.dataset, row.epochs, str(len(row.seeds))]


def _facts(row: Row, comparison: Comparison) -> list[str]:
    method = f"{row.method} *" if row.uses_labels else row.method
    facts = [method, *_plain_facts(row)[1:]]
    return [*facts, row.remark] if any(r.remark for r in comparison.rows) else facts


def _header(column: Column, line_break: str) -> str:
    lines = [f"{column.protocol} v{column.version}", column.dataset, f"{column.metric} {column.arrow}"]
    return line_break.join([*lines, *([column.remark] if column.remark else [])])


def _cell_text(cell: Cell | None) -> Text:
    if cell is None:
        return Text("-", style="dim")
    return Text(str(cell), style="bold green" if cell.best else "")


def _markdown_cell(cell: Cell | None) -> str:
    if cell is None:
        return ""
    return f"**{cell}**" if cell.best else str(cell)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"


def _numbers(cell: Cell | None) -> list[float | int | str]:
    if cell is None:
        return ["", "", 0]
    return [cell.mean, "" if cell.std is None else cell.std, cell.n]


def _json_cell(cell: Cell | None) -> dict[str, Any] | None:
    return None if cell is None else asdict(cell)
