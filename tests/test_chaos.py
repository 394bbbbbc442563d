"""A few of the faults of the report, inflicted in the quick run; ``make chaos`` inflicts all of them often."""

from __future__ import annotations

from pathlib import Path

import pytest
from chaos.fault import Fault
from chaos.report import find_faults, inflict

QUICK = {key: fault for key, fault in find_faults().items() if fault.quick}


@pytest.mark.parametrize("key", QUICK)
def test_what_is_promised_of_a_fault_holds(key: str, tmp_path: Path) -> None:
    fault: Fault = QUICK[key]
    row = inflict(key, fault, tmp_path / key, fault.quick, seed=0)
    assert row.held, row.finding.result
