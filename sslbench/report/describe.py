"""Option models in words: keys, types, defaults and meanings, as a user writes them in YAML."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
import yaml
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from sslbench.config.tree import plain

_NAMES: dict[Any, str] = {
    str: "string",
    Path: "path",
    dict: "mapping",
    types.NoneType: "null",
    Any: "anything",
}
_BOUNDS = (
    (annotated_types.Ge, "ge", "≥ {}"),
    (annotated_types.Gt, "gt", "> {}"),
    (annotated_types.Le, "le", "≤ {}"),
    (annotated_types.Lt, "lt", "< {}"),
    (annotated_types.MinLen, "min_length", "length ≥ {}"),
)


def describe_options(model: type[BaseModel], prefix: str = "") -> list[dict[str, Any]]:
    """Rows (key, type, default, meaning, cosmetic) of an option model.

    :func:`nested_models` gives what lies deeper.
    """
    return [
        {
            "key": f"{prefix}{name}",
            "type": _bounded(field),
            "default": _default(field),
            "meaning": " ".join((field.description or "").split()),
            "cosmetic": isinstance(field.json_schema_extra, dict) and "cosmetic" in field.json_schema_extra,
        }
        for name, field in model.model_fields.items()
    ]


def nested_models(model: type[BaseModel]) -> list[type[BaseModel]]:
    """The option models inside a model's types, such as ``ViewSpec``, each once and before its own parts."""
    found: list[type[BaseModel]] = []
    for field in model.model_fields.values():
        for inner in _models_in(field.annotation):
            found += [part for part in (inner, *nested_models(inner)) if part not in found]
    return found


def type_name(annotation: Any) -> str:
    """A type as a reader of a configuration file thinks of it: ``float | null``, ``"sgd" | "lars"``."""
    origin, inside = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " | ".join(f'"{value}"' if isinstance(value, str) else as_yaml(value) for value in inside)
    if origin in (Union, types.UnionType):
        return " | ".join(map(type_name, inside))
    if origin is tuple:
        return _sequence_name(inside)
    if origin is dict:
        return f"mapping of {type_name(inside[1])}"
    return _NAMES.get(annotation) or str(getattr(annotation, "__name__", annotation))


def as_yaml(value: Any) -> str:
    """A value on one line, as it is typed after ``key=``."""
    text: str = yaml.safe_dump(plain(value), default_flow_style=True, width=float("inf"), sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _sequence_name(items: Sequence[Any]) -> str:
    if items[-1] is Ellipsis:
        return f"list of {type_name(items[0])}"
    return f"[{', '.join(map(type_name, items))}]"


def _bounded(field: FieldInfo) -> str:
    limits = [
        words.format(getattr(bound, attribute))
        for bound in field.metadata
        for kind, attribute, words in _BOUNDS
        if isinstance(bound, kind)
    ]
    name = type_name(field.annotation)
    return f"{name} ({', '.join(limits)})" if limits else name


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    return as_yaml(_as_declared(field.get_default(call_default_factory=True)))


def _as_declared(value: Any) -> Any:
    """Of a nested model only what its owner sets: the rest is in the nested model's own table."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_unset=True)
    return [_as_declared(item) for item in value] if isinstance(value, tuple) else value


def _models_in(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inside in get_args(annotation):
        yield from _models_in(inside)
