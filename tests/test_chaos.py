"""A few of the faults of the report, inflicted in the quick run; ``make chaos`` inflicts all of them often."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from chaos.fault import Fault, Finding
from chaos.report import Row, find_faults, inflict, write

QUICK = {key: fault for key, fault in find_faults().items() if fault.quick}


@pytest.mark.parametrize("key", QUICK)
def test_what_is_promised_of_a_fault_holds(key: str, tmp_path: Path) -> None:
    fault: Fault = QUICK[key]
    row = inflict(key, fault, tmp_path / key, fault.quick, seed=0)
    assert row.held, row.finding.result


def test_a_part_of_the_report_can_be_made_anew(tmp_path: Path) -> None:
    first, second = list(find_faults())[:2]
    write([Row(key, key, Finding(3, 3, 0, "before"), 1.0, "") for key in (second, first)], tmp_path)
    write([Row(second, second, Finding(4, 3, 0, "now"), 1.0, "")], tmp_path)
    rows = json.loads((tmp_path / "chaos.json").read_text())["rows"]
    assert [(row["key"], row["finding"]["result"], row["ok"]) for row in rows] == [
        (first, "before", True),
        (second, "now", False),
    ]
    assert "2 faults, inflicted 7 times; as promised 6 times" in (tmp_path / "chaos.md").read_text()
