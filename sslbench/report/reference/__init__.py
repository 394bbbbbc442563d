"""The reference pages of the documentation, generated from option models, catalogue, commands and docstrings.

``python -m sslbench.report.reference docs/reference`` writes them all.
"""

from __future__ import annotations

from pathlib import Path

from sslbench.config.registry import Registry
from sslbench.plugin.catalog import Catalog
from sslbench.report.reference.commands import commands_page
from sslbench.report.reference.contracts import blocks_page, contracts_page, hooks_page
from sslbench.report.reference.markdown import HEADER
from sslbench.report.reference.options import options_page
from sslbench.report.reference.plugins import plugin_pages

__all__ = ["pages", "write"]


def pages(catalog: Catalog, registry: Registry) -> dict[str, str]:
    """Markdown by the path of its page, such as ``methods/simclr.md``."""
    written = {
        "options.md": options_page(),
        "cli.md": commands_page(),
        "hooks.md": hooks_page(),
        "contracts.md": contracts_page(),
        "blocks.md": blocks_page(),
        **plugin_pages(catalog, registry),
    }
    return {path: _marked(text) for path, text in written.items()}


def write(folder: Path, fresh: dict[str, str]) -> None:
    """Write the pages and remove generated ones that are no longer among them."""
    for old in folder.rglob("*.md"):
        if old.relative_to(folder).as_posix() not in fresh and HEADER in old.read_text(encoding="utf-8"):
            old.unlink()
    for path, text in fresh.items():
        page = folder / path
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text(text, encoding="utf-8")


def _marked(text: str) -> str:
    """With the remark that it is generated, below the title, which must be first to become the name in a menu."""
    title, rest = text.split("\n", 1)
    return f"{title}\n\n{HEADER}{rest}"
