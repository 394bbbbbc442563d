"""Verdicts on plugins, as ``sslbench check`` prints them."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from sslbench.report.listing import print_json
from sslbench.report.show import out
from sslbench.testing.rules import Checkup

_STYLES = {"held": "green", "broken": "bold red", "not tried": "dim"}


def print_checkups(checkups: Sequence[Checkup], as_json: bool, *, several: bool) -> None:
    """One table of rules, or with ``several`` one of plugins; below, what is broken and how to mend it."""
    if as_json:
        plain = [to_json(checkup) for checkup in checkups]
        print_json(plain if several else plain[0])
        return
    console = out()
    if several:
        console.print(_plugins(checkups))
    for checkup in checkups:
        if not several:
            console.print(_rules(checkup))
        for verdict in checkup.broken:
            head = f"{checkup.name}: " if several else ""
            console.print(Text.assemble((f"{head}{verdict.rule}", "bold red")), soft_wrap=True)
            console.print(f"  found: {verdict.detail}", soft_wrap=True)
            if verdict.hint:
                console.print(f"  mend:  {verdict.hint}", soft_wrap=True)
    if not several:
        console.print(f"{checkups[0].kind} '{checkups[0].name}': {_summary(checkups[0])}")


def to_json(checkup: Checkup) -> dict[str, Any]:
    """Plain data."""
    return {**dataclasses.asdict(checkup), "passed": not checkup.broken}


def _rules(checkup: Checkup) -> Table:
    table = _table("rule", "verdict", "found", "seconds")
    for verdict in checkup.verdicts:
        style = _STYLES[verdict.outcome]
        # What is broken is told in full below.
        detail = "see below" if verdict.outcome == "broken" else verdict.detail
        table.add_row(verdict.rule, Text(verdict.outcome, style), detail, f"{verdict.seconds:.1f}")
    return table


def _plugins(checkups: Sequence[Checkup]) -> Table:
    table = _table(checkups[0].kind if checkups else "plugin", "verdict", "rules", "seconds")
    for checkup in checkups:
        tried = any(verdict.outcome == "held" for verdict in checkup.verdicts)
        outcome = "broken" if checkup.broken else "held" if tried else "not tried"
        seconds = sum(verdict.seconds for verdict in checkup.verdicts)
        table.add_row(checkup.name, Text(outcome, _STYLES[outcome]), _summary(checkup), f"{seconds:.1f}")
    return table


def _summary(checkup: Checkup) -> str:
    counts: Counter[str] = Counter(verdict.outcome for verdict in checkup.verdicts)
    return ", ".join(f"{counts[outcome]} {outcome}" for outcome in _STYLES if counts[outcome])


def _table(*columns: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", justify="right" if column == "seconds" else "left")
    return table
