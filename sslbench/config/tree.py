"""Nested configuration values as plain data: flatten, merge, parse ``key=value``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from sslbench.errors import ConfigError

Tree = dict[str, Any]

_DEEPEST, _MOST_VALUES = 50, 200_000
#: What can begin a level; a text with fewer of them, and shorter, is not deep enough to do harm.
_OPENING = re.compile(r"[\[{]|[-?]\s")
_OPENINGS, _LONGEST = 5000, 2 << 20


def parse_overrides(items: Iterable[str]) -> Tree:
    """``["train.epochs=10"]`` to a nested tree; values are YAML.

    Raises:
        ConfigError: an item without ``=`` or with a value that is not YAML.
    """
    tree: Tree = {}
    for item in items:
        key, equals, text = item.partition("=")
        if not equals or not key or key.startswith("-"):
            raise ConfigError(
                f"'{item}' is not an option",
                hint="write options as section.key=value, such as train.epochs=10; flags start with --",
            )
        try:
            value = read_yaml(text) if text else None
        except yaml.YAMLError as error:
            raise ConfigError(f"the value of '{key}' is not valid YAML: {text}") from error
        _plant(tree, key.replace("/", ".").split("."), _number(value))
    return tree


def read_yaml(text: str) -> Any:
    """YAML as plain data, by libyaml where it is there: ten times faster.

    Raises:
        yaml.YAMLError: it is no YAML, or so large or deep that it can only be meant to do harm.
    """
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    if len(text) > _LONGEST or len(_OPENING.findall(text)) > _OPENINGS:
        _check_depth(text, loader)
    value = yaml.load(text, Loader=loader)
    if _expanded(value, {}) > _MOST_VALUES:
        raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
    return value


def _check_depth(text: str, loader: Any) -> None:
    """Refuse what would overflow the stack: libyaml's binding recurses without a bound, and the process dies."""
    depth = 0
    for event in yaml.parse(text, Loader=loader):
        opens = isinstance(event, yaml.CollectionStartEvent)
        depth += opens - isinstance(event, yaml.CollectionEndEvent)
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels")


def _expanded(value: Any, known: dict[int, int], depth: int = 0) -> int:
    """Number of values, those behind an alias counted each time: a few lines can stand for billions."""
    if not isinstance(value, dict | list):
        return 1
    if depth > _DEEPEST:
        raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST} levels, or contains itself")
    if id(value) not in known:
        items = value.values() if isinstance(value, dict) else value
        known[id(value)] = 1 + sum(_expanded(item, known, depth + 1) for item in items)
    return known[id(value)]


def flatten(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested mappings and sequences of mappings to (dotted key, value) pairs."""
    items = _children(tree)
    if items is None:
        yield prefix, tree
        return
    for key, value in items:
        yield from flatten(value, f"{prefix}.{key}" if prefix else key)


def plain(value: Any) -> Any:
    """Options, tuples and paths as data that YAML and JSON can hold."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Readable rows for the keys whose values differ."""
    keys = sorted(set(old) | set(new))
    return [
        f"{key}: {old.get(key, '(unset)')} -> {new.get(key, '(unset)')}"
        for key in keys
        if plain(old.get(key)) != plain(new.get(key))
    ]


def merge(into: Tree, values: Mapping[str, Any], origin: str, origins: dict[str, str], prefix: str = "") -> None:
    """Lay ``values`` over ``into`` and note the origin of every leaf. ``{"0": ...}`` addresses a list's items."""
    for raw_key, value in values.items():
        key = str(raw_key)
        path = f"{prefix}{key}"
        current = into.get(key)
        if isinstance(current, list) and isinstance(value, dict) and all(str(k).isdigit() for k in value):
            _check_numbers(path, current, value, origin)
            current = into[key] = _as_indexed(current)
        if isinstance(value, Mapping) and isinstance(current, dict):
            merge(current, value, origin, origins, path + ".")
            if current and all(str(k).isdigit() for k in current):
                into[key] = [current[k] for k in sorted(current, key=int)]
            continue
        into[key] = plain(value)
        for known in [known for known in origins if known.startswith(path + ".")]:
            del origins[known]
        origins.update({leaf: origin for leaf, _ in flatten(into[key], path)})


def _check_numbers(path: str, items: list[Any], values: Mapping[str, Any], origin: str) -> None:
    beyond = [str(number) for number in values if int(number) >= len(items)]
    if beyond:
        raise ConfigError(
            f"{path} has {len(items)} item{'s' if len(items) != 1 else ''}, numbered from 0; "
            f"there is no number {', '.join(beyond)}   [{origin}]",
            hint=f"write the whole list to add items: {path}=[...]",
        )


def _as_indexed(items: list[Any]) -> Tree:
    return {str(number): item for number, item in enumerate(items)}


def _children(tree: Any) -> list[tuple[str, Any]] | None:
    """Named children of a node, or None for a leaf. Lists of plain values are leaves."""
    if isinstance(tree, Mapping) and tree:
        return [(str(key), value) for key, value in tree.items()]
    if isinstance(tree, list | tuple) and any(isinstance(item, Mapping) for item in tree):
        return [(str(number), value) for number, value in enumerate(tree)]
    return None


def _plant(tree: Tree, path: Sequence[str], value: Any) -> None:
    for part in path[:-1]:
        child = tree.setdefault(part, {})
        if not isinstance(child, dict):
            raise ConfigError(f"'{'.'.join(path)}' and '{part}' are both given a value")
        tree = child
    tree[path[-1]] = value


def _number(value: Any) -> Any:
    """YAML 1.1 reads ``1e-3`` as text; a user means a number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and value[0] in "+-.0123456789" else value
        except ValueError:
            return value
    return [_number(item) for item in value] if isinstance(value, list) else value
