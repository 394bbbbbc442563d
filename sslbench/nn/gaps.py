"""What state dicts lacked that other libraries have loaded."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def noting_gaps() -> Iterator[list[str]]:
    """Collects the entries of networks for which the state dicts that are loaded meanwhile have nothing.

    Libraries load leniently, and tell of it in a log if at all; what is missing then stays random. They do so
    while they build a network, so that the class has to be watched: one thread at a time.
    """
    missing: list[str] = []
    original = nn.Module.load_state_dict

    def noting(network: nn.Module, *arguments: Any, **options: Any) -> Any:
        result = original(network, *arguments, **options)
        missing.extend(result.missing_keys)
        return result

    nn.Module.load_state_dict = noting  # type: ignore[assignment, method-assign]
    try:
        yield missing
    finally:
        nn.Module.load_state_dict = original  # type: ignore[method-assign]
