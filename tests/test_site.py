"""The documentation as a site builds without a warning, holds every page and needs no network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
#: What a browser fetches by itself; links that a reader may follow are others.
FETCHED = re.compile(r"""<(?:script|img|iframe)[^>]*\ssrc="(https?:[^"]*)|<link[^>]*\shref="(https?:[^"]*)""")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("material", reason="the site needs: pip install sslbench[docs]")
    folder = tmp_path_factory.mktemp("site")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    told = [line for line in build.stderr.splitlines() if not line.startswith("INFO")]
    assert build.returncode == 0, "\n".join(
        ["a page is missing in the menu of mkdocs.yml, or a link leads nowhere:", *told]
    )
    return folder


def test_every_page_is_in_the_site(site: Path) -> None:
    pages = [page.relative_to(ROOT / "docs") for page in (ROOT / "docs").rglob("*.md")]
    built = [
        page.with_name("index.html") if page.name == "README.md" else page.with_suffix(".html") for page in pages
    ]
    assert [str(page) for page in built if not (site / page).is_file()] == []
    assert (site / "CHANGELOG.html").is_file()
    assert (site / "benchmarks" / "results" / "equality.html").is_file()


def test_no_page_fetches_anything_from_elsewhere(site: Path) -> None:
    fetched = {
        match for page in site.rglob("*.html") for match in FETCHED.findall(page.read_text(encoding="utf-8"))
    }
    assert fetched == set()


def test_bars_in_code_are_shown_without_their_escape(site: Path) -> None:
    assert "\\|" not in (site / "reference" / "options.html").read_text(encoding="utf-8")
    assert "<code>int | null (≥ 1)</code>" in (site / "reference" / "options.html").read_text(encoding="utf-8")
