"""A terminal that names from files cannot steer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from sslbench.untrusted import printable


class Screen(Console):
    """Rich's console without markup in texts, and with every steering character of them made visible.

    Styles are for what we make bold ourselves (``Text``): names of runs, classes and recipes are other people's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(highlight=False, markup=False, emoji=False, **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            # Rich's own steering (of progress bars) is in control segments.
            yield segment if segment.control else segment._replace(text=printable(segment.text))
