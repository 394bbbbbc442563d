"""What users and plugins rely on changes only on purpose: with a version, a changelog and a deprecation."""

from __future__ import annotations

import difflib

import public_surface
import pytest
from public_surface import ADVICE, OF_A_RUN, QUICK, SNAPSHOTS, as_text


def difference(name: str, kept: str, found: str) -> str:
    """What changed, in lines; empty if nothing did."""
    lines = difflib.unified_diff(kept.splitlines(), found.splitlines(), "promised", "found", lineterm="", n=2)
    changed = "\n".join(lines)
    return f"The public surface '{name}' has changed:\n\n{changed}\n{ADVICE}" if changed else ""


def compare(name: str, found: str) -> None:
    __tracebackhide__ = True
    told = difference(name, (SNAPSHOTS / f"{name}.json").read_text(encoding="utf-8"), found)
    if told:
        pytest.fail(told, pytrace=False)


@pytest.mark.parametrize("name", QUICK)
def test_it_is_as_promised(name: str) -> None:
    compare(name, as_text(QUICK[name]()))


@pytest.mark.slow
@pytest.mark.parametrize("name", OF_A_RUN)
def test_what_runs_leave_and_print_is_as_promised(name: str) -> None:
    compare(name, as_text(OF_A_RUN[name]()))


def test_every_snapshot_has_its_surface() -> None:
    assert {file.stem for file in SNAPSHOTS.glob("*.json")} == {*QUICK, *OF_A_RUN}


def test_every_command_with_json_is_run_for_its_keys() -> None:
    import json

    shown = {line.split()[0] for line in json.loads((SNAPSHOTS / "json_keys.json").read_text(encoding="utf-8"))}
    with_json = {name for name, params in QUICK["commands"]().items() if "--json" in params}
    assert with_json <= shown


def test_a_change_is_shown_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    before = as_text(QUICK["options"]())
    real = public_surface.describe_options
    monkeypatch.setattr(
        public_surface, "describe_options", lambda model: [row for row in real(model) if row["key"] != "epochs"]
    )
    told = difference("options", before, as_text(QUICK["options"]()))
    assert '-  "epochs": "int (≥ 1) = 20"' in told
    assert "CHANGELOG.md" in told
    assert difference("options", before, before) == ""
