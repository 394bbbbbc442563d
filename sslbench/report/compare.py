"""The comparison table: one row per configuration, mean and spread over seeds, one column per kind of number."""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from sslbench.report.results import Direction, EvalResult, RunResult

if TYPE_CHECKING:
    from sslbench.config.registry import Reference


@dataclass(frozen=True)
class Column:
    """Numbers that may be compared: same protocol, version, options, data and metric."""

    protocol: str
    version: int
    dataset: str
    metric: str
    direction: Direction
    fingerprint: str
    options: str
    remark: str = ""
    """What sets it apart from a column with the same key."""

    @property
    def key(self) -> str:
        """``eval/<protocol>.v<n>/<dataset>/<metric>``"""
        return f"eval/{self.protocol}.v{self.version}/{self.dataset}/{self.metric}"

    @property
    def arrow(self) -> str:
        """Which direction is better."""
        return "↑" if self.direction == "max" else "↓"


@dataclass(frozen=True)
class Cell:
    """A number over seeds."""

    mean: float
    std: float | None
    """Sample standard deviation; None for a single seed."""
    n: int
    best: bool = False

    def __str__(self) -> str:
        return f"{self.mean:.2f}" if self.std is None else f"{self.mean:.2f} ± {self.std:.2f}"


@dataclass(frozen=True)
class Row:
    """Runs that differ by nothing but the seed."""

    method: str
    backbone: str
    dataset: str
    epochs: str
    recipe: str
    uses_labels: bool
    group: str
    seeds: tuple[str, ...]
    runs: tuple[str, ...]
    cells: Mapping[Column, Cell]
    remark: str = ""
    """The options that set it apart from rows that look the same."""


@dataclass(frozen=True)
class Comparison:
    """Rows, columns, and in words what was left out and why."""

    rows: tuple[Row, ...]
    columns: tuple[Column, ...]
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """A row judged against a published result."""

    row: Row
    reference: Reference
    cell: Cell | None
    """None: the metric was not computed."""
    verdict: Literal["reproduced", "below", "above", "missing", "no protocol"] = "missing"
    """`missing`: not evaluated yet; `no protocol`: nothing here measures it."""


def compare(results: Sequence[RunResult]) -> Comparison:
    """Group runs by everything but the seed and line up their headline metrics.

    Limited and unfinished runs stay out. Numbers of another protocol version, other protocol options or other
    data get a column of their own; they are never averaged or ranked together.
    """
    usable, remarks = _usable(results)
    newest, superseded = _newest_per_seed(usable)
    if superseded:
        remarks.append(f"{_runs(superseded)} left out: a newer run has the same configuration and seed")
    columns = _columns(newest)
    groups: dict[str, list[RunResult]] = defaultdict(list)
    for result in newest:
        groups[f"{result.method}/{result.group}"].append(result)
    rows = _with_remarks([_row(group, columns) for group in groups.values()], groups.values())
    rows = _mark_best(sorted(rows, key=_row_order), columns)
    remarks += _column_remarks(columns)
    if any(row.uses_labels for row in rows):
        remarks.append("* trains with labels: an upper bound, not ranked")
    return Comparison(tuple(rows), tuple(columns), tuple(remarks))


def judge(comparison: Comparison, references: Iterable[Reference]) -> list[Verdict]:
    """Judge each row that follows a recipe against the published results of that recipe."""
    verdicts = []
    for reference in references:
        for row in comparison.rows:
            if row.recipe == reference.recipe:
                cells = [cell for column, cell in row.cells.items() if column.key == reference.metric]
                verdicts += [_verdict(row, reference, cell) for cell in cells]
                verdicts += [Verdict(row, reference, None, _absent(reference))] * (not cells)
    return verdicts


def _absent(reference: Reference) -> Literal["missing", "no protocol"]:
    return "missing" if reference.measurable else "no protocol"


def _verdict(row: Row, reference: Reference, cell: Cell) -> Verdict:
    difference = cell.mean - reference.value
    if abs(difference) <= reference.tolerance:
        return Verdict(row, reference, cell, "reproduced")
    return Verdict(row, reference, cell, "above" if difference > 0 else "below")


def _usable(results: Sequence[RunResult]) -> tuple[list[RunResult], list[str]]:
    limited = [r for r in results if r.limited]
    going = [r for r in results if not r.limited and r.status == "RUNNING"]
    unfinished = [r for r in results if not r.limited and r.status not in ("FINISHED", "RUNNING")]
    usable = [r for r in results if not r.limited and r.status == "FINISHED"]
    silent = [r for r in usable if not r.evals]
    remarks = [
        f"{_runs(len(left_out))} left out: {why}"
        for left_out, why in (
            (limited, "stopped early by train.limit"),
            (going, "pretraining goes on, or its machine cannot be seen from here"),
            (unfinished, "pretraining did not finish"),
            (silent, "no evaluation yet"),
        )
        if left_out
    ]
    return [r for r in usable if r.evals], remarks


def _runs(count: int) -> str:
    return "1 run" if count == 1 else f"{count} runs"


def _newest_per_seed(results: Sequence[RunResult]) -> tuple[list[RunResult], int]:
    """Repetitions with one seed are no independent samples: the newest counts."""
    newest = {(r.method, r.group, r.seed): r for r in sorted(results, key=lambda r: r.started)}
    return list(newest.values()), len(results) - len(newest)


def _column(result: EvalResult, metric: str) -> Column:
    direction = result.directions.get(metric, "max")
    return Column(
        result.protocol, result.version, result.dataset, metric, direction, result.fingerprint, result.options
    )


def _columns(results: Sequence[RunResult]) -> list[Column]:
    """All columns, the test protocol first, with remarks where two share a key."""
    found = {_column(e, e.primary) for r in results for e in r.evals if not e.limited}
    same_key: dict[tuple[str, str, str], list[Column]] = defaultdict(list)
    for column in found:
        same_key[column.protocol, column.dataset, column.metric].append(column)
    told = [_apart(column, group) for group in same_key.values() for column in group]
    return sorted(told, key=lambda c: (c.protocol != "test", c.protocol, c.dataset, -c.version, c.remark))


def _apart(column: Column, group: Sequence[Column]) -> Column:
    """Name what differs from its neighbours of the same version."""
    same = [other for other in group if other.version == column.version]
    words = []
    if len({c.fingerprint for c in same}) > 1:
        words.append(f"data {column.fingerprint[:6]}")
    if len({c.options for c in same}) > 1:
        words.append(f"options {column.options[:6]}")
    return replace(column, remark=", ".join(words))


def _column_remarks(columns: Sequence[Column]) -> list[str]:
    versions: dict[tuple[str, str], set[int]] = defaultdict(set)
    for column in columns:
        versions[column.protocol, column.dataset].add(column.version)
    remarks = [
        f"{protocol} on {dataset} was run in versions {', '.join(map(str, sorted(found)))}: "
        "not comparable, so each has a column; evaluate the older runs again"
        for (protocol, dataset), found in versions.items()
        if len(found) > 1
    ]
    for what in ("data", "options"):
        keys = dict.fromkeys(c.key for c in columns if f"{what} " in c.remark)
        remarks += [
            f"{key} was computed with different {what}: not comparable, so each has a column" for key in keys
        ]
    return remarks


def _row(runs: Sequence[RunResult], columns: Sequence[Column]) -> Row:
    first = runs[0]
    return Row(
        method=first.method,
        backbone=first.backbone,
        dataset=first.dataset,
        epochs=first.epochs,
        recipe=first.recipe,
        uses_labels=first.uses_labels,
        group=first.group,
        seeds=tuple(run.seed for run in runs),
        runs=tuple(run.name for run in runs),
        cells={column: cell for column in columns if (cell := _cell(runs, column)) is not None},
    )


def _cell(runs: Sequence[RunResult], column: Column) -> Cell | None:
    plain = replace(column, remark="")
    values = [
        e.metrics[column.metric]
        for run in runs
        for e in run.evals
        if not e.limited and column.metric in e.metrics and _column(e, column.metric) == plain
    ]
    if not values:
        return None
    return Cell(statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, len(values))


def _identity(row: Row) -> tuple[str, ...]:
    return row.method, row.backbone, row.dataset, row.epochs


def _row_order(row: Row) -> tuple[Any, ...]:
    return row.dataset, row.backbone, row.uses_labels, row.method, row.epochs, row.remark


def _with_remarks(rows: Sequence[Row], groups: Iterable[Sequence[RunResult]]) -> list[Row]:
    """Rows that look the same name the options in which they differ."""
    runs = {row.group: group[0] for row, group in zip(rows, groups, strict=True)}
    told = []
    for row in rows:
        twins = [runs[other.group].params for other in rows if _identity(other) == _identity(row)]
        rolled_back = runs[row.group].rolled_back
        words = [_difference(runs[row.group].params, twins), f"rolled back: {rolled_back}" if rolled_back else ""]
        told.append(replace(row, remark=", ".join(filter(None, words))))
    return told


def _difference(own: Mapping[str, str], twins: Sequence[Mapping[str, str]]) -> str:
    keys = sorted({key for twin in twins for key in twin if not key.startswith(("run.", "evals.", "recipe"))})
    different = [key for key in keys if len({twin.get(key) for twin in twins}) > 1]
    words = [f"{key}={own.get(key, 'unset')}" for key in different[:3]]
    return ", ".join(words + ["..."] * (len(different) > 3))


def _mark_best(rows: Sequence[Row], columns: Sequence[Column]) -> list[Row]:
    best = {column: _best(rows, column) for column in columns}
    return [
        replace(row, cells={c: replace(cell, best=row is best[c]) for c, cell in row.cells.items()})
        for row in rows
    ]


def _best(rows: Sequence[Row], column: Column) -> Row | None:
    """The best row among methods without labels; none if there is nothing to choose from."""
    ranked = [row for row in rows if column in row.cells and not row.uses_labels]
    ranked = [row for row in ranked if not math.isnan(row.cells[column].mean)]
    if len(ranked) < 2:
        return None
    sign = 1 if column.direction == "max" else -1
    return max(ranked, key=lambda row: sign * row.cells[column].mean)
