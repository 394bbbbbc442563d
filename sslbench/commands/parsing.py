"""Typer without the conversions that a command does not need.

Typer converts every value with pydantic, options that were not given and plain text included, and importing
pydantic takes longer than a listing.
"""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

_TEXT = (str, list[str])


class Command(TyperCommand):
    """A command of ``sslbench``."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _spared(super().get_params(ctx))


class Group(TyperGroup):
    """``sslbench`` itself."""

    def get_params(self, ctx: Any) -> list[Any]:
        return _spared(super().get_params(ctx))


def _spared(params: list[Any]) -> list[Any]:
    for param in params:
        if "process_value" not in vars(param):
            param.process_value = _sparing(param)
    return params


def _sparing(param: Any) -> Any:
    convert = param.process_value
    several = getattr(param, "multiple", False) or param.nargs == -1
    # Typer before 0.29 names the type elsewhere, and converts cheaply.
    is_text = getattr(getattr(param, "type_descriptor", None), "annotation", None) in _TEXT

    def process_value(ctx: typer.Context, value: Any) -> Any:
        if value is None and not param.required:
            value = () if several else None
        elif not (is_text and _is_text(value)):
            return convert(ctx, value)
        return param.callback(ctx, param, value) if param.callback else value

    return process_value


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or (
        isinstance(value, tuple) and bool(value) and all(isinstance(v, str) for v in value)
    )
