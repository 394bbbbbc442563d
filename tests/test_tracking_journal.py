"""The journal survives what kills a run."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from sslbench.tracking.journal import Journal


@pytest.fixture
def journal(tmp_path: Path) -> Journal:
    return Journal(tmp_path / "metrics.jsonl")


def test_lines_are_strict_json_and_keep_values_that_are_not_finite(journal: Journal) -> None:
    journal.append(3, {"a": 1.5, "nan": math.nan, "inf": math.inf})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(journal.path.read_text(), parse_constant=refuse)
    assert line["step"] == 3
    (entry,) = journal.entries()
    assert entry.metrics["a"] == 1.5
    assert math.isnan(entry.metrics["nan"])
    assert entry.metrics["inf"] == math.inf


def test_half_a_last_line_is_passed_over_and_does_not_swallow_the_next(journal: Journal) -> None:
    journal.append(1, {"a": 1.0})
    with journal.path.open("a") as file:
        file.write('{"step": 2, "time": 1, "metr')
    assert [e.step for e in journal.entries()] == [1]
    journal.append(3, {"a": 3.0})
    assert [e.step for e in journal.entries()] == [1, 3]


def test_entries_continue_behind_an_offset(journal: Journal) -> None:
    for step in range(4):
        journal.append(step, {"a": step})
    second = list(journal.entries())[1]
    assert [e.step for e in journal.entries(second.end)] == [2, 3]
    assert list(journal.entries())[-1].end == journal.size()


def test_truncation_drops_what_lies_beyond_a_step(journal: Journal) -> None:
    for step in (1, 2, 3, 4):
        journal.append(step, {"a": step}, headline=step == 2)
    before = list(journal.entries())
    assert [e.step for e in journal.truncate_after(2)] == [3, 4]
    assert list(journal.entries()) == before[:2]
    assert journal.truncate_after(2) == []
