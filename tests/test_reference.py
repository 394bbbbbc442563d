"""The generated reference pages, and the words they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from sslbench.config.options import Options, cosmetic
from sslbench.config.registry import FILE_NAME, load_registry
from sslbench.plugin import api
from sslbench.plugin.api import MethodConfig
from sslbench.plugin.catalog import Catalog
from sslbench.report.describe import as_yaml, describe_options, nested_models, type_name
from sslbench.report.reference import pages, write
from sslbench.report.reference.markdown import prose, table
from sslbench.report.reference.source import read_module

ROOT = Path(__file__).parents[1]
REFERENCE = ROOT / "docs" / "reference"


class Inner(Options):
    depth: int = 1


class Outer(Options):
    rate: float | None = Field(None, gt=0, le=1)
    """A rate,
    in units."""
    inner: tuple[Inner, ...] = (Inner(depth=2), Inner())
    label: str = cosmetic(..., min_length=1)


@pytest.fixture(scope="module")
def fresh() -> dict[str, str]:
    return pages(Catalog(), load_registry(ROOT / FILE_NAME))


def test_the_committed_reference_is_up_to_date(fresh: dict[str, str]) -> None:
    kept = {
        page.relative_to(REFERENCE).as_posix(): page.read_text(encoding="utf-8")
        for page in REFERENCE.rglob("*.md")
    }
    stale = sorted(page for page in {*fresh, *kept} if fresh.get(page) != kept.get(page))
    assert stale == [], "run: make docs"


def test_every_built_in_option_says_what_it_means(fresh: dict[str, str]) -> None:
    of_options = [text for page, text in fresh.items() if page == "options.md" or "/" in page]
    rows = [line for text in of_options for line in text.splitlines() if line[:3] == "| `"]
    assert len(rows) > 300
    assert [row for row in rows if row.endswith("|  |")] == []


def test_a_plugins_page_has_its_paper_options_recipes_and_published_results(fresh: dict[str, str]) -> None:
    page = fresh["methods/simclr.md"]
    for part in (
        "ICML 2020",
        "| `method.temperature` |",
        "| `demo/simclr` |",
        "## Published results",
        "name: adamw",
    ):
        assert part in page, part


def test_every_command_is_in_the_reference(fresh: dict[str, str]) -> None:
    import typer.main

    from sslbench.cli import app

    program = typer.main.get_command(app)
    assert [c for c in program.commands if f"## sslbench {c}\n" not in fresh["cli.md"]] == []  # type: ignore[attr-defined]
    assert "sslbench eval [OPTIONS] PROTOCOL [RUN] [KEY=VALUE]..." in fresh["cli.md"]


def test_what_all_lists_is_read_from_where_it_is_defined() -> None:
    module = read_module("sslbench.plugin.api")
    assert {member.name for member in module.members} == set(api.__all__)
    protocol = next(member for member in module.members if member.name == "EvalProtocol")
    assert ("primary", "ClassVar[str]", "") in [(a.name, a.type, a.default) for a in protocol.attributes]
    assert {"__init__", "subject", "run"} <= {method.name for method in protocol.methods}


def test_docstrings_become_markdown() -> None:
    doc = """Of :class:`Method`, ``x``.

    Args:
        rows: ``[B,D]``; a long
            explanation.
    """
    assert prose(doc) == "Of `Method`, `x`.\n\nArguments:\n\n- `rows`: `[B,D]`; a long\n    explanation."
    assert table(("a", "b"), [("x | y", "two\nlines")]) == "| a | b |\n|---|---|\n| x \\| y | two lines |\n"


def test_pages_that_are_no_longer_generated_go_and_others_stay(tmp_path: Path, fresh: dict[str, str]) -> None:
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "gone.md").write_text(fresh["options.md"])
    (tmp_path / "ours.md").write_text("# Written by hand\n")
    write(tmp_path, {"options.md": fresh["options.md"]})
    assert sorted(page.name for page in tmp_path.rglob("*.md")) == ["options.md", "ours.md"]


@pytest.mark.parametrize(
    ("annotation", "words"),
    [
        (float | None, "float | null"),
        (Literal["sgd", "lars"], '"sgd" | "lars"'),
        (tuple[float, float], "[float, float]"),
        (tuple[str, ...], "list of string"),
        (tuple[Inner, ...], "list of Inner"),
        (dict[str, int], "mapping of int"),
        (Path, "path"),
    ],
)
def test_types_read_well(annotation: object, words: str) -> None:
    assert type_name(annotation) == words


def test_rows_have_range_default_meaning_and_what_stays_out_of_the_hash() -> None:
    rate, inner, label = describe_options(Outer, "x.")
    assert rate == {
        "key": "x.rate",
        "type": "float | null (> 0, ≤ 1)",
        "default": "null",
        "meaning": "A rate, in units.",
        "cosmetic": False,
    }
    assert inner["default"] == "[{depth: 2}, {}]"
    assert (label["type"], label["default"], label["cosmetic"]) == ("string (length ≥ 1)", "required", True)


def test_nested_models_are_found_once_and_before_their_parts() -> None:
    assert nested_models(Outer) == [Inner]
    assert [model.__name__ for model in nested_models(MethodConfig)] == ["ViewSpec", "Jitter", "Blur"]


@pytest.mark.parametrize(("value", "text"), [(None, "null"), (True, "true"), ([0.5, 1], "[0.5, 1]"), ("a", "a")])
def test_values_are_shown_as_they_are_typed(value: object, text: str) -> None:
    assert as_yaml(value) == text
