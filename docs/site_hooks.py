"""What the site has beyond the pages of this folder: the changelog, results of benchmarks, folders in the menu."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
CHANGELOG = "CHANGELOG.md"
RESULTS = "benchmarks/results"


def on_config(config: Any) -> Any:
    """A folder in the menu stands for the pages in it."""
    config.nav = [_opened(item, Path(config.docs_dir)) for item in config.nav]
    return config


def on_files(files: Files, config: Any) -> Files:
    """Pages that lie outside the folder of the documentation."""
    for page in [CHANGELOG, *_pages(ROOT, RESULTS)]:
        files.append(File.generated(config, page, abs_src_path=str(ROOT / page)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links and tables as they are right in a checkout become right in the site."""
    markdown = re.sub(r"^\|.*$", _bars, markdown, flags=re.MULTILINE)
    if page.file.src_uri.startswith(RESULTS):
        return markdown
    if page.file.src_uri == CHANGELOG:
        return markdown.replace("](docs/", "](")
    inside = markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/").replace(f"](../{CHANGELOG}", f"]({CHANGELOG}")
    first = Path(_pages(ROOT, RESULTS)[0]).name
    return re.sub(rf"\]\(\.\./{RESULTS}/?\)", f"]({RESULTS}/{first})", inside)


def _bars(row: re.Match[str]) -> str:
    """Within code a bar is no border here, and its escape would be shown; on GitHub it is one."""
    return re.sub(r"`[^`]*`", lambda code: code[0].replace("\\|", "|"), row[0])


def _opened(item: Any, docs: Path) -> Any:
    if isinstance(item, dict):
        return {title: _opened(value, docs) for title, value in item.items()}
    if isinstance(item, list):
        return [_opened(value, docs) for value in item]
    return _pages(ROOT if item.startswith(RESULTS) else docs, item) if item.endswith("/") else item


def _pages(root: Path, folder: str) -> list[str]:
    return sorted(page.relative_to(root).as_posix() for page in (root / folder).glob("*.md"))
