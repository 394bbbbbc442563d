"""The generated reference pages, and the words they are made of."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from sslbench.config.options import Options, cosmetic
from sslbench.plugin.api import MethodConfig
from sslbench.plugin.catalog import Catalog
from sslbench.report.describe import as_yaml, describe_options, nested_models, type_name
from sslbench.report.reference import options_page, plugins_page

REFERENCE = Path(__file__).parents[1] / "docs" / "reference"


class Inner(Options):
    depth: int = 1


class Outer(Options):
    rate: float | None = Field(None, gt=0, le=1)
    """A rate,
    in units."""
    inner: tuple[Inner, ...] = (Inner(depth=2), Inner())
    label: str = cosmetic(..., min_length=1)


@pytest.mark.parametrize("page", ["options.md", "plugins.md"])
def test_the_committed_reference_is_up_to_date(page: str) -> None:
    fresh = options_page() if page == "options.md" else plugins_page(Catalog())
    assert (REFERENCE / page).read_text(encoding="utf-8") == fresh, "run: make docs"


def test_every_built_in_option_says_what_it_means() -> None:
    rows = [line for page in REFERENCE.glob("*.md") for line in page.read_text().splitlines() if line[:3] == "| `"]
    assert len(rows) > 100
    assert [row for row in rows if row.endswith("|  |")] == []


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
